#!/usr/bin/env bash
# Installs this project and its dependencies: builds a plan, then runs it, or prints it with --dry-run.
set -uo pipefail
exec </dev/null # never prompt
CALLER_DIR=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
# shellcheck source=scripts/ascend.sh
source scripts/ascend.sh

DEFAULT_MSID=d76dbddd4517d48a2fc1cd494de8b9a6cfdbfbab
MINDSPEED_REPO=${MINDSPEED_REPO:-https://gitcode.com/Ascend/MindSpeed.git}
MINDSPEED_DIR=${MINDSPEED_DIR:-third_party/MindSpeed}
MEGATRON_VERSION=0.12.1 # the one version MindSpeed supports
ATTEMPTS=3
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 GIT_TERMINAL_PROMPT=0

usage() {
    cat <<'USAGE'
usage: bash scripts/install.sh [--arch x86|arm] [options]

  --arch x86|arm       processor of this machine; a wrong one is corrected, except in the plan of --dry-run
  --msid COMMIT        commit of MindSpeed, on NPUs (default: the guide's d76dbddd)
  --torchversion V     torch 2.7.1 to 2.13 (default: the installed one, else 2.7.1 on NPUs, 2.13.0)
  --device DEVICE      auto, npu, cuda or cpu (default: auto)
  --venv DIR           virtual environment to create or reuse (default: the active one, else .venv)
  --python PYTHON      interpreter for a new environment (default: python3.11, python3.10 or python3)
  --dev                also install test and lint tools
  --dry-run            print the plan and change nothing
  --help               print this

Environment: MINDSPEED_REPO and MINDSPEED_DIR (MindSpeed's source and directory), TORCH_NPU_VERSION (default: the
release for this machine's CANN, e.g. 2.7.1.post2), ASCEND_HOME_PATH (CANN, if not in /usr/local/Ascend),
INSTALL_RETRY_PAUSE (seconds between attempts, default 5). Packages come from pip's configured index (pip
config, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).
USAGE
}

note() { printf 'note: %s\n' "$*"; }

# fail STATUS WORD...: status 2 for a wrong option, 1 for an unsupported machine.
fail() {
    printf 'error: %s\n' "${*:2}" >&2
    exit "$1"
}

parse_options() {
    ARCH='' MSID='' TORCH='' DEVICE=auto VENV='' PYTHON='' DEV=0 DRY_RUN=0
    while (($#)); do
        case $1 in
            --arch | --msid | --torchversion | --device | --venv | --python)
                [[ $# -ge 2 && -n $2 && $2 != --* ]] || fail 2 "$1 needs a value; see --help"
                ;;&
            --arch) ARCH=$2 ;;
            --msid) MSID=$2 ;;
            --torchversion) TORCH=$2 ;;
            --device) DEVICE=$2 ;;
            --venv) VENV=$2 ;;
            --python) PYTHON=$2 ;;
            --dev) DEV=1 ;;
            --dry-run) DRY_RUN=1 ;;
            -h | --help) usage && exit 0 ;;
            *) fail 2 "unknown option $1; see --help" ;;
        esac
        case $1 in
            --dev | --dry-run) shift ;;
            *) shift 2 ;;
        esac
    done
    [[ $ARCH =~ ^(x86|arm|)$ ]] || fail 2 "--arch is $ARCH; choose x86 or arm"
    [[ $DEVICE =~ ^(auto|npu|cuda|cpu)$ ]] || fail 2 "--device is $DEVICE; choose auto, npu, cuda or cpu"
    [[ $MSID =~ ^([0-9a-fA-F]{7,40}|)$ ]] || fail 2 "--msid is $MSID; give a commit of 7 to 40 hexadecimal digits"
}

# Sets ARCH, and FOREIGN=1 if the plan is for another machine.
choose_arch() {
    local machine
    machine=$(machine_arch)
    FOREIGN=0
    if [[ -n $ARCH && $ARCH != "$machine" ]]; then
        if ((DRY_RUN)); then
            FOREIGN=1
            note "this machine is $machine; the plan is for $ARCH, as given"
        else
            note "--arch $ARCH contradicts this machine, which is $machine; installing for $machine"
            ARCH=$machine
        fi
    fi
    ARCH=${ARCH:-$machine}
    [[ $ARCH == x86 || $ARCH == arm ]] || fail 1 "this machine is $ARCH; there are wheels for x86 and arm only"
}

# installed NAME: the version in an existing environment without its build tag (2.13.0+cpu gives 2.13.0), or nothing.
installed() {
    [[ -z $BASE_PYTHON ]] || return 0
    "$PY" scripts/check_install.py report "$1" | sed -E 's/^ *[^ ]+ ([^+]+).*/\1/'
}

# Sets DEVICE, TORCH, TORCH_NPU, CANN_HOME, CANN_VERSION and MSID.
choose_versions() {
    local minor=0 micro=0 present
    [[ $DEVICE != auto ]] || DEVICE=$(detect_device)
    present=$(installed torch)
    if [[ -n $TORCH ]]; then
        [[ $TORCH =~ ^2\.([0-9]+)(\.([0-9]+))?$ ]] || fail 2 "--torchversion is $TORCH; choose 2.7.1 to 2.13.0"
        minor=${BASH_REMATCH[1]} micro=${BASH_REMATCH[3]:-0}
        TORCH=2.$minor.$micro
        ((minor >= 7 && minor <= 13 && !(minor == 7 && micro == 0))) ||
            fail 2 "--torchversion is $TORCH; choose 2.7.1 to 2.13.0"
    elif [[ $present =~ ^2\.(7\.[1-9]|[89]\.|1[0-3]\.) ]] &&
        [[ $DEVICE != npu || $(installed torch-npu) == "$present"* ]]; then
        TORCH=$present # from an earlier run, or the user's
    elif [[ $DEVICE == npu ]]; then
        TORCH=2.7.1
    else
        TORCH=2.13.0
    fi
    CANN_HOME='' CANN_VERSION=''
    if [[ $DEVICE == npu && $FOREIGN == 0 ]]; then
        CANN_HOME=$(cann_home) && CANN_VERSION=$(cann_version "$CANN_HOME")
        ascend_report "$CANN_HOME" "$CANN_VERSION"
    fi
    TORCH_NPU=${TORCH_NPU_VERSION:-$(torch_npu_for "$TORCH" "$CANN_VERSION")}
    if [[ $DEVICE == npu ]]; then
        # the releases that have a torch_npu
        [[ $TORCH =~ ^2\.(7\.1|8\.0|9\.0|9\.1|10\.0|11\.0|12\.0|13\.0)$ ]] ||
            fail 2 "--torchversion is $TORCH, which has no torch_npu;" \
                "choose 2.7.1, 2.8.0, 2.9.0, 2.10.0, 2.11.0, 2.12.0 or 2.13.0"
        [[ $TORCH_NPU == "$TORCH" || $TORCH_NPU == "$TORCH".post* ]] ||
            fail 2 "TORCH_NPU_VERSION is $TORCH_NPU, which does not belong to torch $TORCH;" \
                "choose $TORCH or $TORCH.postN"
    elif [[ -n $MSID ]]; then
        note "--msid has no effect on $DEVICE: MindSpeed is for NPUs only"
    fi
    MSID=${MSID:-$DEFAULT_MSID}
}

# Sets ENV_DIR, PY (its interpreter), BASE_PYTHON (the interpreter that creates it; empty if it exists) and PY_VERSION.
choose_environment() {
    [[ -z $VENV || $VENV == /* ]] || VENV=$CALLER_DIR/$VENV
    [[ $PYTHON != */* || $PYTHON == /* ]] || PYTHON=$CALLER_DIR/$PYTHON
    ENV_DIR=$(environment_dir "$VENV")
    PY=$ENV_DIR/bin/python
    BASE_PYTHON=''
    if [[ $FOREIGN == 0 ]] && PY_VERSION=$(python_version "$PY"); then
        if [[ -n $PYTHON && $(python_version "$PYTHON") != "$PY_VERSION" ]]; then
            fail 2 "$ENV_DIR exists with Python $PY_VERSION, and --python is $PYTHON;" \
                "name another directory with --venv"
        fi
    else
        if [[ -d $ENV_DIR && ! -e $ENV_DIR/pyvenv.cfg && -n $(ls -A "$ENV_DIR") ]]; then
            fail 2 "$ENV_DIR is a directory with other content; name another with --venv"
        fi
        BASE_PYTHON=${PYTHON:-$(find_python)}
        [[ -n $BASE_PYTHON ]] || fail 1 "found no Python 3.10 or 3.11 that can make a virtual environment;" \
            "install one (with its venv module) or name it with --python"
        PY_VERSION=$(python_version "$BASE_PYTHON") || fail 2 "--python is $BASE_PYTHON, which does not run"
    fi
    python_is_supported "$PY_VERSION" ||
        fail 2 "Python is $PY_VERSION in ${BASE_PYTHON:-$ENV_DIR}; this project needs 3.10 or 3.11:" \
            "name one with --python, and a new directory with --venv"
    if [[ ! $PY_VERSION =~ ^3\.1[01]\. ]]; then
        note "megatron-core $MEGATRON_VERSION has no wheel for Python $PY_VERSION and is built from source," \
            "which needs a C++ compiler; 3.10 and 3.11 need none"
    fi
}

# Sets MISSING: a line "component<TAB>reason" for each thing that this environment lacks.
find_missing() {
    local needs=('pip=pip>=21.3' 'build tools=setuptools>=77' "torch=torch==$TORCH"
        "megatron-core=megatron-core==$MEGATRON_VERSION" 'requirements=@requirements.txt'
        'requirements=@examples/qwen3vl/requirements.txt' "mindspeed-mm=editable:mindspeed-mm:$PWD")
    if [[ $DEVICE == npu ]]; then
        # CANN's Python package; its dependencies are in requirements-npu.txt
        [[ -z $CANN_HOME || -z $(te_wheel "$CANN_HOME") ]] || needs+=('te=te')
        # any torch_npu for this torch is accepted unless TORCH_NPU_VERSION names one, which must match the CANN version
        needs+=("torch-npu=torch-npu==${TORCH_NPU_VERSION:-$TORCH.*}"
            'requirements=@requirements-npu.txt' "MindSpeed=checkout:$MINDSPEED_DIR:$MSID"
            "MindSpeed=linked:mindspeed:$MINDSPEED_DIR")
    fi
    ((DEV)) && needs+=('dev tools=@requirements-dev.txt')
    if [[ -n $BASE_PYTHON ]]; then
        MISSING=$(printf '%s\tnot installed yet\n' "${needs[@]%%=*}" | sort -u)
    else
        MISSING=$("$PY" scripts/check_install.py missing "${needs[@]}") ||
            fail 1 "$PY could not inspect $ENV_DIR; remove that directory and run this again"
    fi
}

is_missing() { [[ $'\n'$MISSING == *$'\n'"$1"$'\t'* ]]; }

# add_step COMPONENT local|download TEXT: adds a line of shell to print or run.
add_step() {
    STEP_COMPONENT+=("$1") STEP_KIND+=("$2") STEP_COMMAND+=("$3")
}

# add_command COMPONENT local|download WORD...: the same for a plain command.
add_command() {
    local command
    printf -v command '%q ' "${@:3}"
    add_step "$1" "$2" "${command% }"
}

# add_pip COMPONENT WORD...: pip install under the constraints, so that no step changes torch.
add_pip() {
    add_command "$1" download "$PY" -m pip install --constraint "$CONSTRAINTS" "${@:2}"
}

# Fills STEP_* with the steps that install what find_missing reported.
build_plan() {
    STEP_COMPONENT=() STEP_KIND=() STEP_COMMAND=()
    CONSTRAINTS=$ENV_DIR/install-constraints.txt
    local pins=("torch==$TORCH" "megatron-core==$MEGATRON_VERSION")
    local requirements=(-r requirements.txt -r examples/qwen3vl/requirements.txt)
    if [[ $DEVICE == npu ]]; then
        pins+=("torch-npu==${TORCH_NPU_VERSION:-$TORCH.*}" 'numpy<2') # MindSpeed needs numpy 1
        requirements+=(-r requirements-npu.txt)
    fi
    [[ -n $MISSING ]] || return
    if [[ -n $BASE_PYTHON ]]; then
        add_command environment local "$BASE_PYTHON" -m venv "$ENV_DIR"
    elif is_missing pip; then
        add_command environment local "$PY" -m ensurepip --upgrade --default-pip
    fi
    local pin_words
    printf -v pin_words '%q ' "${pins[@]}"
    add_step environment local "printf '%s\\n' $pin_words> $(printf %q "$CONSTRAINTS")"
    is_missing 'build tools' && add_pip 'build tools' 'setuptools>=77'
    is_missing torch && add_pip torch "torch==$TORCH"
    is_missing requirements && add_pip requirements "${requirements[@]}"
    is_missing 'dev tools' && add_pip 'dev tools' -r requirements-dev.txt
    # without dependencies: one of them replaces torch, and this project's use of megatron-core needs none;
    # last, because pip reports missing dependencies of an installed megatron-core as errors
    is_missing megatron-core && add_pip megatron-core --no-deps "megatron-core==$MEGATRON_VERSION"
    # without its dependency: its x86 wheel requires torch==V+cpu, which not every package index has
    is_missing torch-npu && add_pip torch-npu --no-deps "torch-npu==$TORCH_NPU"
    is_missing te && add_pip te --no-deps "$(te_wheel "$CANN_HOME")"
    is_missing MindSpeed && plan_mindspeed
    is_missing mindspeed-mm && add_pip mindspeed-mm --no-deps --no-build-isolation --editable .
    return 0
}

plan_mindspeed() {
    if [[ $FOREIGN == 0 && -d $MINDSPEED_DIR/.git ]]; then
        git -C "$MINDSPEED_DIR" cat-file -e "$MSID^{commit}" 2>/dev/null ||
            add_command MindSpeed download git -C "$MINDSPEED_DIR" fetch --quiet origin
    else
        add_command MindSpeed download git clone --quiet --no-checkout "$MINDSPEED_REPO" "$MINDSPEED_DIR"
    fi
    add_command MindSpeed local git -C "$MINDSPEED_DIR" checkout --quiet --detach "$MSID"
    # linked instead of installed: its setup.py runs pip on requirements that would downgrade tokenizers and numpy
    local site
    site="\"\$($(printf %q "$PY") -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')/mindspeed.pth\""
    add_step MindSpeed local "printf '%s\\n' $(printf %q "$(realpath -m "$MINDSPEED_DIR")") > ${site//\\\"/\"}"
}

print_plan() {
    local index
    printf 'plan: %s, %s, Python %s, torch %s, environment %s\n' "$ARCH" "$DEVICE" "$PY_VERSION" "$TORCH" "$ENV_DIR"
    ((${#STEP_COMMAND[@]})) || printf '  nothing to do: everything is installed\n'
    for ((index = 0; index < ${#STEP_COMMAND[@]}; index++)); do
        printf '  %d. [%s] %s\n' $((index + 1)) "${STEP_COMPONENT[index]}" "${STEP_COMMAND[index]}"
    done
}

# run_step INDEX: 0 if the step succeeded; downloads get ATTEMPTS attempts.
run_step() {
    local attempt=1 attempts=1 pause=${INSTALL_RETRY_PAUSE:-5}
    [[ ${STEP_KIND[$1]} == download ]] && attempts=$ATTEMPTS
    printf '\n[%d/%d] %s\n$ %s\n' $(($1 + 1)) ${#STEP_COMMAND[@]} "${STEP_COMPONENT[$1]}" "${STEP_COMMAND[$1]}"
    until eval "${STEP_COMMAND[$1]}"; do
        ((attempt < attempts)) || return 1
        note "attempt $attempt of $attempts failed; trying again in $pause s"
        sleep "$pause"
        ((attempt++))
    done
}

# Runs the steps. Skips the rest of a failed component; stops if the environment or torch fails.
run_plan() {
    local index component
    FAILED=''
    for ((index = 0; index < ${#STEP_COMMAND[@]}; index++)); do
        component=${STEP_COMPONENT[index]}
        [[ $FAILED != *"|$component|"* ]] || continue
        if ! run_step "$index"; then
            printf 'error: %s failed\n' "$component" >&2
            FAILED+="|$component|"
            case $component in environment | 'build tools' | torch) break ;; esac
        fi
    done
}

# Final check: everything is installed in the requested versions and can be imported. Sets PROBLEMS.
verify() {
    local modules='import torch, megatron.core' output set_env
    BASE_PYTHON=''
    PROBLEMS=''
    if [[ $(python_version "$PY") == '' ]]; then
        PROBLEMS="environment: $ENV_DIR has no working Python"
        return
    fi
    find_missing
    PROBLEMS=${MISSING//$'\t'/: }
    [[ -z $FAILED$MISSING ]] || return
    if [[ $DEVICE == npu ]]; then
        modules+=', torch_npu'
        for set_env in "$ASCEND_ROOT"/{ascend-toolkit,cann}/set_env.sh; do
            # shellcheck disable=SC1090 # set_env.sh of the machine's CANN, if any
            [[ ! -f $set_env ]] || source "$set_env" >/dev/null 2>&1 || true
        done
    fi
    output=$("$PY" -W ignore -c "$modules" 2>&1) || PROBLEMS="import: '$modules' fails: $(tail -n 1 <<<"$output")"
}

report() {
    local names=(torch torch-npu te megatron-core transformers datasets accelerate numpy mindspeed-mm)
    if [[ -x $PY ]]; then
        printf '\nInstalled in %s (Python %s):\n' "$ENV_DIR" "$PY_VERSION"
        "$PY" scripts/check_install.py report "${names[@]}"
        [[ ! -e $ENV_DIR/bin/mm-convert ]] || printf '  command mm-convert\n'
        [[ $DEVICE != npu || ! -d $MINDSPEED_DIR ]] || printf '  MindSpeed in %s\n' "$MINDSPEED_DIR"
    fi
    if [[ -n $PROBLEMS ]]; then
        printf 'Not installed:\n  %s\n' "${PROBLEMS//$'\n'/$'\n'  }"
        printf 'Fix the cause above and run the same command again; it continues where it stopped.\n'
    fi
    if [[ -f $ENV_DIR/bin/activate && ${VIRTUAL_ENV:-} != "$ENV_DIR" ]]; then
        printf 'Activate it with: source %q/bin/activate\n' "$ENV_DIR"
    fi
}

main() {
    parse_options "$@"
    # pip reports Ctrl-C as a failure, which would be retried
    trap 'echo "interrupted; the same command continues where this one stopped" >&2; exit 130' INT TERM
    choose_arch
    choose_environment
    choose_versions
    find_missing
    build_plan
    if is_missing torch && [[ $DEVICE != cuda ]]; then
        note "pip takes torch from its configured index; the CPU build suffices here," \
            "and a CUDA build is several GB larger"
    fi
    if ((DRY_RUN)); then
        print_plan
        exit 0
    fi
    if [[ -z $MISSING ]]; then
        printf 'Everything is installed already; nothing to do.\n'
        FAILED='' PROBLEMS=''
        report
        exit 0
    fi
    print_plan
    is_missing megatron-core ||
        note "pip may list dependencies that megatron-core lacks; it is deliberately installed without them"
    run_plan
    verify
    report
    [[ -z $FAILED$PROBLEMS ]]
}

main "$@"
