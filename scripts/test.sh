#!/usr/bin/env bash
# Installs missing packages, lints, and runs the tests; see usage().
set -euo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

usage() {
    cat <<'USAGE'
usage: bash scripts/test.sh [--stack npu] [pytest arguments]

Installs missing packages, lints, and runs the tests that take seconds: on all cores, and then those of several ranks.

  -m "slow or not slow"   all tests
  -m st                   only tests that start launchers or several ranks
  tests/ut/data -k mask   a selection; all arguments go to pytest
  -m "not st" -n 4        in 4 processes
  --stack npu             test in an environment like that of NPU users, .venv-npu-stack: Python 3.10, torch 2.7.1, and
                          the newest transformers and numpy that support them
  --help                  print this

Environment: STACK_VENV and STACK_PYTHON (directory and interpreter of the environment of --stack npu).
USAGE
}

for argument in "$@"; do # before anything is installed
    [[ $argument != --help && $argument != -h ]] || { usage && exit 0; }
done
directory=$(environment_dir "")
if [[ ${1:-} == --stack ]]; then
    [[ ${2:-} == npu ]] || { echo "error: --stack is '${2:-}'; choose npu" >&2 && exit 2; }
    shift 2
    directory=${STACK_VENV:-.venv-npu-stack}
    bash scripts/install.sh --arch "$(machine_arch)" --dev --device cpu --venv "$directory" --python "${STACK_PYTHON:-python3.10}" \
        --torchversion 2.7.1
    # further packages of an NPU user, numpy 1 among them
    "$directory/bin/python" -m pip install --quiet --constraint "$directory/install-constraints.txt" \
        -r requirements.txt -r examples/qwen3vl/requirements.txt -r requirements-npu.txt
    VIRTUAL_ENV=$(cd "$directory" && pwd)
    export VIRTUAL_ENV
else
    bash scripts/install.sh --arch "$(machine_arch)" --dev
fi
PATH=$(cd "$directory" && pwd)/bin:$PATH
export PATH

status=0
tests() { # -m and -n of the arguments win, being the last
    python -m pytest -m "not slow" --durations 10 "$@" || status=$?
}
ruff check . || status=$?
if (($#)); then
    tests "$@"
else
    jobs=$(nproc) # each worker takes whole files, and one core
    OMP_NUM_THREADS=1 tests -m "not slow and not st" -n "$((jobs < 8 ? jobs : 8))" --dist loadfile
    tests -m "st and not slow" # several ranks fill the cores by themselves
fi
exit "$status"
