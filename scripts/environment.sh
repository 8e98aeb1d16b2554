# shellcheck shell=bash
# Selects the Python environment, device and architecture. Sourced from the repository root by other scripts.

# environment_dir [DIR]: the directory of the environment: DIR, else the active one, else .venv of this repository.
environment_dir() {
    local directory
    for directory in "${1:-}" "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        # skip an activated environment that was deleted; a named one is created
        if [[ -n $directory && ( $directory == "${1:-}" || -x $directory/bin/python ) ]]; then
            printf '%s\n' "$directory"
            return
        fi
    done
    printf '.venv\n'
}

# python_version PYTHON: prints major.minor.micro. Fails if PYTHON is absent or does not run, such as a version manager's
# shim for a version that is not installed.
python_version() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

# python_is_supported VERSION: 3.10 or later.
python_is_supported() {
    local major minor rest
    IFS=. read -r major minor rest <<<"$1"
    [[ $major == 3 && ${minor:-0} -ge 10 ]]
}

# find_python: the interpreter for a new environment. 3.11 and 3.10 first, because megatron-core has wheels for them.
find_python() {
    local candidate version
    for candidate in python3.11 python3.10 python3; do
        version=$(python_version "$candidate") || continue
        if python_is_supported "$version" && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# detect_device: npu, cuda or cpu.
detect_device() {
    if command -v npu-smi >/dev/null || compgen -G '/dev/davinci*' >/dev/null || [[ -d ${ASCEND_ROOT:-/usr/local/Ascend} ]]; then
        echo npu
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        echo cuda
    else
        echo cpu
    fi
}

# machine_arch: x86, arm, or the kernel's name of another architecture.
machine_arch() {
    case $(uname -m) in
        x86_64 | amd64) echo x86 ;;
        aarch64 | arm64) echo arm ;;
        *) uname -m ;;
    esac
}
