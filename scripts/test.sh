#!/usr/bin/env bash
# Installs missing packages, lints, and runs the fast tests. Further arguments go to pytest:
#   bash scripts/test.sh                       tests that take seconds
#   bash scripts/test.sh -m "slow or not slow" all tests
#   bash scripts/test.sh -m st                 tests with launchers and several ranks only
#   bash scripts/test.sh tests/ut/data -k mask a selection, in pytest's syntax
#   bash scripts/test.sh --stack npu           in an environment like NPU users': Python 3.10, torch 2.7.1, the newest
#                                              transformers and numpy for these, in .venv-npu-stack (or
#                                              STACK_VENV), by STACK_PYTHON or python3.10
set -euo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

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
ruff check . || status=$?
python -m pytest -m "not slow" "$@" || status=$?
exit "$status"
