# shellcheck shell=bash
# Detects an Ascend machine's toolkit (CANN), driver, devices and network. Sourced by install.sh; changes nothing.

ASCEND_ROOT=${ASCEND_ROOT:-/usr/local/Ascend} # default directory of drivers and toolkits

# cann_home: the toolkit's directory: the one whose set_env.sh was sourced, else the newest in the default places.
cann_home() {
    local directory
    for directory in "${ASCEND_HOME_PATH:-}" "${ASCEND_TOOLKIT_HOME:-}" "$ASCEND_ROOT"/ascend-toolkit/latest \
        "$ASCEND_ROOT"/cann "$ASCEND_ROOT"/latest; do
        if [[ -n $directory && -d $directory ]]; then
            realpath "$directory"
            return
        fi
    done
    return 1
}

# cann_version HOME: such as 8.3.RC1, from the file that torch_npu reads, or from version.cfg.
cann_version() {
    local file version
    for file in "$1"/*-linux/ascend_*_install.info "$1"/ascend_*_install.info; do
        [[ -f $file ]] || continue
        version=$(sed -n 's/^version=//p' "$file" | head -n 1)
        [[ -z $version ]] || { printf '%s\n' "$version" && return; }
    done
    # lines such as runtime_running_version=[7.7.0.1.238:8.2.RC1]
    version=$(sed -nE 's/^[a-z_]+_running_version=\[[^:]*:([^]]+)\].*/\1/p' "$1/version.cfg" 2>/dev/null | head -n 1)
    [[ -n $version ]] && printf '%s\n' "$version"
}

# torch_npu_for TORCH CANN: the torch_npu release for both, by torch_npu's version table.
torch_npu_for() {
    case "$1 $2" in
        '2.7.1 8.5'* | '2.8.0 8.5'*) printf '%s.post2\n' "$1" ;;
        *) printf '%s\n' "$1" ;;
    esac
}

# cann_is_old CANN: whether CANN is older than every supported torch_npu requires.
cann_is_old() {
    local major minor rest
    IFS=. read -r major minor rest <<<"$1"
    [[ $major =~ ^[0-9]+$ && $minor =~ ^[0-9]+$ ]] && ((major < 8 || (major == 8 && minor < 3)))
}

# te_wheel HOME: CANN's Python package te, which the guide installs in step 1.
te_wheel() {
    compgen -G "$1/lib64/te-*-py3-none-any.whl" | head -n 1
}

# ascend_report HOME VERSION: one line each on toolkit, driver, devices and network, with the remedy for problems.
ascend_report() {
    local home=$1 version=$2 driver devices
    if [[ -n $home ]]; then
        note "CANN ${version:-of unknown version} in $home"
        ! cann_is_old "$version" ||
            note "CANN $version is older than every supported torch_npu requires: install CANN 8.3.RC1 or later"
        [[ ${ASCEND_HOME_PATH:-} != '' ]] ||
            note "set_env.sh of CANN is not sourced in this shell; the launchers source it themselves (SET_ENV)"
    else
        note "found no CANN in $ASCEND_ROOT; torch_npu is installed, and loads once the toolkit is" \
            "(or name it: ASCEND_HOME_PATH)"
    fi
    driver=$(sed -n 's/^Version=//p' "$ASCEND_ROOT/driver/version.info" 2>/dev/null | head -n 1)
    devices=$(compgen -G "${DEVICE_ROOT:-/dev}/davinci[0-9]*" | wc -l)
    note "driver ${driver:-not found}, $devices NPU device(s)"
    if ((devices)) && [[ ! -w ${DEVICE_ROOT:-/dev}/davinci_manager ]]; then
        note "${DEVICE_ROOT:-/dev}/davinci_manager cannot be opened by $(id -un); add the user to the driver's group" \
            "(HwHiAiUser), or pass the device on to the container"
    fi
    [[ -f ${HCCN_CONF:-/etc/hccn.conf} ]] ||
        note "no ${HCCN_CONF:-/etc/hccn.conf}: fine for one machine; several machines need the NPU network configured (hccn_tool)"
}
