"""scripts/install.sh: its plans, its refusals, its retries, and that it leaves alone what is in place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"x86_64": "x86", "aarch64": "arm"}.get(os.uname().machine, "x86")
OTHER = {"x86": "arm", "arm": "x86"}[MACHINE]

PYTHON_STUB = """#!/bin/bash
# a Python {version} whose pip and venv only write down what they are asked
case "$*" in
    "-c import sys; print("*) echo {version} ;;
    "-c import venv"*) exit 0 ;;
    "-m pip "*)
        echo "$*" >>"$STUB_LOG"
        [[ $* == *"$STUB_FAIL_MATCH"* ]] || exit 0
        count=$(($(cat "$STUB_LOG.count" 2>/dev/null || echo 0) + 1))
        echo $count >"$STUB_LOG.count"
        ((count > ${{STUB_FAILURES:-0}})) ;;
    scripts/check_install.py*)
        [[ $2 == missing ]] || {{ [[ $3 != torch || -z ${{STUB_TORCH:-}} ]] || echo "  torch $STUB_TORCH"; exit 0; }}
        # everything is missing until pip has installed this package
        grep -q -- --editable "$STUB_LOG" 2>/dev/null || printf '%s\\tis missing\\n' torch megatron-core mindspeed-mm ;;
esac
"""


def write_stub(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def install(tmp_path):
    """Runs install.sh with stubs before everything else on PATH, and no environment active."""
    stubs = tmp_path / "stubs"
    for version in ("3.11.9", "3.10.9"):
        write_stub(stubs / f"python{version[:4]}", PYTHON_STUB.format(version=version))

    def run(*options: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
        environment |= {"PATH": f"{stubs}:/usr/bin:/bin", "STUB_LOG": str(tmp_path / "log"), "INSTALL_RETRY_PAUSE": "0"}
        environment = {name: value for name, value in environment.items() if not name.startswith("ASCEND_")}
        environment["ASCEND_ROOT"] = str(tmp_path / "Ascend")
        return subprocess.run(
            ["bash", str(ROOT / "scripts/install.sh"), *options],
            cwd=tmp_path, env=environment | variables, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    run.stubs = stubs
    run.ascend = tmp_path / "Ascend"
    return run


@pytest.fixture
def npu_machine(install, tmp_path):
    """Runs install.sh on what looks like a machine with eight NPUs; ``cann`` is where its toolkit is made."""
    cann = install.ascend / "ascend-toolkit/8.3.RC1"
    (cann / "x86_64-linux").mkdir(parents=True)
    (cann / "x86_64-linux/ascend_toolkit_install.info").write_text(
        "package_name=Ascend-cann-toolkit\nversion=8.3.RC1\ninnerversion=V100R001C23\narch=x86_64\n"
    )
    (install.ascend / "ascend-toolkit/latest").symlink_to(cann)
    (install.ascend / "driver").mkdir()
    (install.ascend / "driver/version.info").write_text("Version=25.2.0\nascendhal_version=7.35.23\n")
    devices = tmp_path / "dev"
    devices.mkdir()
    for name in (*(f"davinci{index}" for index in range(8)), "davinci_manager"):
        (devices / name).touch()
    (tmp_path / "hccn.conf").write_text("address_0=10.0.0.1\n")
    write_stub(install.stubs / "npu-smi", "#!/bin/bash\n")

    def run(*options: str, **variables: str) -> subprocess.CompletedProcess:
        variables = {"DEVICE_ROOT": str(devices), "HCCN_CONF": str(tmp_path / "hccn.conf"), **variables}
        return install("--venv", "env", "--dry-run", *options, **variables)

    run.cann = cann
    run.ascend = install.ascend
    return run


def environment_with(python_stub: str, directory: Path) -> Path:
    """A virtual environment whose interpreter is a stub."""
    write_stub(directory / "bin/python", python_stub)
    (directory / "pyvenv.cfg").touch()
    return directory


@pytest.mark.parametrize("arch", ["x86", "arm"])
@pytest.mark.parametrize("device", ["npu", "cuda", "cpu"])
@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_plan_for_every_machine(install, arch, device, python, tmp_path):
    result = install("--arch", arch, "--device", device, "--python", f"python{python}", "--venv", "env", "--dry-run")
    plan = result.stdout
    assert result.returncode == 0, result.stderr
    assert f"plan: {arch}, {device}, Python {python}.9," in plan
    assert f"python{python} -m venv {tmp_path}/env" in plan
    assert "--no-deps megatron-core==0.12.1" in plan
    torch = "2.7.1" if device == "npu" else "2.13.0"
    assert f"install-constraints.txt torch=={torch}" in plan
    for line in plan.splitlines():
        assert "pip install" not in line or f"--constraint {tmp_path}/env/install-constraints.txt" in line
    assert ("--no-deps torch-npu==2.7.1\n" in plan) == (device == "npu")
    assert ("checkout --quiet --detach d76dbddd4517d48a2fc1cd494de8b9a6cfdbfbab" in plan) == (device == "npu")
    assert not (tmp_path / "env").exists() and not (tmp_path / "log").exists()


def test_device_is_found_by_its_tools(install):
    if list(Path("/dev").glob("davinci*")):
        pytest.skip("this machine has an NPU")
    write_stub(install.stubs / "nvidia-smi", "#!/bin/bash\nexit 9\n")
    assert ", cpu, " in install("--venv", "env", "--dry-run").stdout  # a driver without a GPU
    write_stub(install.stubs / "nvidia-smi", "#!/bin/bash\necho 'GPU 0: some'\n")
    assert ", cuda, " in install("--venv", "env", "--dry-run").stdout
    write_stub(install.stubs / "npu-smi", "#!/bin/bash\n")
    assert ", npu, " in install("--venv", "env", "--dry-run").stdout


def plan_lines(result: subprocess.CompletedProcess) -> list[str]:
    return [line.partition("] ")[2] for line in result.stdout.splitlines() if line.startswith("  ")]


def test_the_whole_plan_on_an_npu_machine(npu_machine, tmp_path):
    wheel = npu_machine.cann / "lib64/te-0.4.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    result = npu_machine("--msid", "0123456", "--arch", MACHINE)
    assert result.returncode == 0, result.stderr
    pip = f"{tmp_path}/env/bin/python -m pip install --constraint {tmp_path}/env/install-constraints.txt"
    lines = plan_lines(result)
    assert lines[0].endswith(f"-m venv {tmp_path}/env")
    assert lines[1].startswith("printf '%s\\n' torch==2.7.1 megatron-core==0.12.1 torch-npu==2.7.1.\\* numpy\\<2 > ")
    # torch before what depends on it; megatron-core, torch_npu and te without what they declare
    assert lines[2:] == [
        f"{pip} setuptools\\>=77",
        f"{pip} torch==2.7.1",
        f"{pip} -r requirements.txt -r examples/qwen3vl/requirements.txt -r requirements-npu.txt",
        f"{pip} --no-deps megatron-core==0.12.1",
        f"{pip} --no-deps torch-npu==2.7.1",
        f"{pip} --no-deps {wheel}",
        "git clone --quiet --no-checkout https://gitcode.com/Ascend/MindSpeed.git third_party/MindSpeed",
        "git -C third_party/MindSpeed checkout --quiet --detach 0123456",
        lines[10],
        f"{pip} --no-deps --no-build-isolation --editable .",
    ]
    assert lines[10].startswith(f"printf '%s\\n' {ROOT}/third_party/MindSpeed > ")
    assert f"note: CANN 8.3.RC1 in {npu_machine.cann}" in result.stdout
    assert "note: driver 25.2.0, 8 NPU device(s)" in result.stdout
    assert "hccn" not in result.stdout and "davinci_manager" not in result.stdout
    assert "set_env.sh of CANN is not sourced" in result.stdout
    sourced = npu_machine(ASCEND_HOME_PATH=str(npu_machine.cann))
    assert "set_env.sh" not in sourced.stdout


@pytest.mark.parametrize(
    ("cann", "torch", "torch_npu"),
    [("8.3.RC1", "2.7.1", "2.7.1"), ("8.5.0", "2.7.1", "2.7.1.post2"), ("8.5.0", "2.8.0", "2.8.0.post2"),
     ("8.5.0", "2.9.0", "2.9.0"), ("8.3.RC2", "2.8.0", "2.8.0")],
)
def test_torch_npu_is_the_one_for_the_machines_cann(npu_machine, cann, torch, torch_npu):
    (npu_machine.cann / "x86_64-linux/ascend_toolkit_install.info").unlink()
    (npu_machine.cann / "version.cfg").write_text(
        f"# version: 1.0\nruntime_running_version=[7.7.0.1.238:{cann}]\nruntime_upgrade_version=[7.7.0:{cann}]\n"
    )
    result = npu_machine("--torchversion", torch)
    assert f"note: CANN {cann} in" in result.stdout
    assert f"--no-deps torch-npu=={torch_npu}\n" in result.stdout
    asked = npu_machine("--torchversion", torch, TORCH_NPU_VERSION=f"{torch}.post7")
    assert f"--no-deps torch-npu=={torch}.post7\n" in asked.stdout


def test_what_an_npu_machine_lacks_is_said(npu_machine, tmp_path):
    info = npu_machine.cann / "x86_64-linux/ascend_toolkit_install.info"
    info.write_text("version=8.0.RC3\n")
    assert "CANN 8.0.RC3 is older than every supported torch_npu" in npu_machine().stdout
    (tmp_path / "hccn.conf").unlink()
    (tmp_path / "dev/davinci_manager").unlink()
    shutil.rmtree(npu_machine.ascend)
    result = npu_machine()
    assert result.returncode == 0
    assert "found no CANN in" in result.stdout and "hccn.conf" in result.stdout
    assert "davinci_manager cannot be opened" in result.stdout and "driver not found, 8 NPU" in result.stdout


def test_another_machines_plan_says_nothing_of_this_ones_cann(npu_machine):
    result = npu_machine("--arch", OTHER)
    assert "CANN" not in result.stdout and "driver" not in result.stdout
    assert "--no-deps torch-npu==2.7.1\n" in result.stdout


def test_shim_that_does_not_run_is_passed_over(install):
    write_stub(install.stubs / "python3.11", "#!/bin/bash\necho 'command not found' >&2\nexit 127\n")
    assert "Python 3.10.9," in install("--venv", "env", "--dry-run").stdout


def test_newer_python_is_told_about_the_compiler(install):
    newer = write_stub(install.stubs / "newer", PYTHON_STUB.format(version="3.12.1"))
    result = install("--venv", "env", "--dry-run", "--python", str(newer))
    assert result.returncode == 0 and "needs a C++ compiler" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch"], "--arch needs a value"),
        (["--arch", "--dev"], "--arch needs a value"),
        (["--arch", "mips"], "--arch is mips; choose x86 or arm"),
        (["--device", "tpu"], "--device is tpu"),
        (["--msid", "main"], "--msid is main"),
        (["--torchversion", "2.7.0"], "choose 2.7.1 to 2.13.0"),
        (["--torchversion", "2.14"], "choose 2.7.1 to 2.13.0"),
        (["--torchversion", "newest"], "choose 2.7.1 to 2.13.0"),
        (["--torchversion", "2.12.1", "--device", "npu"], "has no torch_npu"),
        (["--python", "no-such-python", "--venv", "env"], "does not run"),
        (["--venv", "stubs"], "directory with other content"),
        (["--verbose"], "unknown option --verbose"),
        (["x86"], "unknown option x86"),
    ],
)
def test_wrong_option_is_one_line(install, options, message):
    result = install(*options, "--dry-run")
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")


def test_old_python_is_refused(install):
    old = write_stub(install.stubs / "old", PYTHON_STUB.format(version="3.9.18"))
    result = install("--venv", "env", "--dry-run", "--python", str(old))
    assert result.returncode == 2 and "Python is 3.9.18" in result.stderr


def test_help_names_every_option(install):
    result = install("--help")
    options = ["--arch", "--msid", "--torchversion", "--device", "--venv", "--python", "--dev", "--dry-run"]
    assert result.returncode == 0 and all(option in result.stdout for option in options)


def test_torch_version_and_commit_reach_the_plan(install):
    commit = "0123456789abcdef0123456789abcdef01234567"
    plan = install("--device", "npu", "--torchversion", "2.13", "--msid", commit, "--venv", "env", "--dry-run").stdout
    assert " torch==2.13.0\n" in plan and "--no-deps torch-npu==2.13.0\n" in plan and f"--detach {commit}" in plan
    plan = install("--device", "npu", "--venv", "env", "--dry-run", TORCH_NPU_VERSION="2.7.1.post2").stdout
    assert "--no-deps torch-npu==2.7.1.post2\n" in plan


@pytest.mark.parametrize(
    ("device", "present", "options", "wanted"),
    [
        ("cpu", "2.7.1+cpu", (), "2.7.1"),
        ("cuda", "2.11.0+cu126", (), "2.11.0"),
        ("cpu", "2.7.1", ("--torchversion", "2.9.0"), "2.9.0"),
        ("cpu", "2.7.0", (), "2.13.0"),
        ("cpu", "2.14.0", (), "2.13.0"),
        ("npu", "2.13.0+cpu", (), "2.7.1"),  # without its torch_npu it was not put there for an NPU
    ],
)
def test_torch_that_serves_is_kept(install, tmp_path, device, present, options, wanted):
    directory = environment_with(PYTHON_STUB.format(version="3.11.9"), tmp_path / "env")
    plan = install("--device", device, "--venv", str(directory), "--dry-run", *options, STUB_TORCH=present).stdout
    assert f", torch {wanted}, " in plan


def test_other_arch_is_planned_but_not_installed(install, tmp_path):
    planned = install("--arch", OTHER, "--venv", "env", "--dry-run")
    assert f"plan: {OTHER}," in planned.stdout
    directory = environment_with(PYTHON_STUB.format(version="3.11.9"), tmp_path / "env")
    installed = install("--arch", OTHER, "--device", "cpu", "--venv", str(directory))
    assert f"--arch {OTHER} contradicts this machine, which is {MACHINE}" in installed.stdout
    assert f"plan: {MACHINE}," in installed.stdout


def test_plan_is_what_runs(install, tmp_path):
    directory = environment_with(PYTHON_STUB.format(version="3.11.9"), tmp_path / "env")
    options = ("--device", "cpu", "--venv", str(directory))
    plan = install(*options, "--dry-run").stdout
    planned = [line.split("python ", 1)[1].replace("\\", "") for line in plan.splitlines() if "-m pip" in line]
    result = install(*options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "log").read_text().splitlines() == planned and len(planned) == 3
    assert (directory / "install-constraints.txt").read_text() == "torch==2.13.0\nmegatron-core==0.12.1\n"
    again = install(*options)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert (tmp_path / "log").read_text().splitlines() == planned


@pytest.mark.parametrize(("failures", "status"), [(2, 0), (3, 1)])
def test_failed_download_is_tried_three_times(install, tmp_path, failures, status):
    directory = environment_with(PYTHON_STUB.format(version="3.11.9"), tmp_path / "env")
    result = install("--device", "cpu", "--venv", str(directory), STUB_FAILURES=str(failures),
                     STUB_FAIL_MATCH=" torch==2.13.0")  # fmt: skip
    assert result.returncode == status
    assert result.stdout.count("trying again") == 2
    assert (tmp_path / "log").read_text().count(" torch==2.13.0") == 3
    # without torch nothing else is tried, and the end says what is not there
    assert ("--editable" in (tmp_path / "log").read_text()) == (status == 0)
    assert ("Not installed:\n  torch: is missing" in result.stdout) == (status == 1)


def test_unreachable_mindspeed_does_not_stop_the_rest(install, tmp_path):
    write_stub(install.stubs / "git", "#!/bin/bash\nexit 128\n")
    python = PYTHON_STUB.format(version="3.11.9")
    python = python.replace("mindspeed-mm ;;", "mindspeed-mm; echo -e 'MindSpeed\\tno' ;;")
    directory = environment_with(python, tmp_path / "env")
    result = install("--device", "npu", "--venv", str(directory), MINDSPEED_DIR=str(tmp_path / "MindSpeed"))
    assert result.returncode == 1 and "error: MindSpeed failed" in result.stderr
    assert "Not installed:\n  MindSpeed: no" in result.stdout
    log = (tmp_path / "log").read_text()
    assert "--editable ." in log and " torch==2.7.1\n" in log
    assert "\n$ git clone" in result.stdout and "\n$ git -C" not in result.stdout


def test_missing_is_found_by_what_is_installed(tmp_path):
    def missing(*wants: str) -> str:
        command = [sys.executable, str(ROOT / "scripts/check_install.py"), "missing", *wants]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# comment\npytest>=1  # met\nno-such-thing>=2\nother; python_version < '3'\n")
    assert missing("a=pytest>=1", "b=@" + str(ROOT / "requirements-dev.txt")).count("pytest") == 0
    assert missing("a=pytest==0.1").startswith("a\tpytest is ")
    assert missing(f"r=@{requirements}") == "r\tno-such-thing is not installed\n"
    assert "not installed" in missing("p=editable:no-such-thing:/")
    assert "not on the import path" in missing(f"m=linked:no-such-link:{tmp_path}")
    assert "is not checked out" in missing(f"m=checkout:{tmp_path}:d76dbddd")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/HEAD").write_text("d76dbddd4517\n")
    assert missing(f"m=checkout:{tmp_path}:d76dbddd") == ""
    assert "required abcdef1" in missing(f"m=checkout:{tmp_path}:abcdef1")


def test_requirements_never_bring_in_torch():
    """A plain ``pip install .`` must not choose a torch: nothing that requirements.txt leads to may ask for one."""
    from importlib import metadata

    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    queue = [Requirement(line).name for line in lines if line and not line.startswith("#")]
    seen: set[str] = set()
    while queue:
        name = queue.pop().lower().replace("_", "-")
        assert name not in ("torch", "torch-npu", "megatron-core", "nvidia-modelopt"), f"{seen} lead to {name}"
        if name in seen:
            continue
        seen.add(name)
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, wanted):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    assert "transformers" in seen
