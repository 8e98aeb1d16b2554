"""How command-line programs end: one line on standard error, and a status that says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mindspeed_mm.errors import UserError, report_errors

DEMO = Path(__file__).resolve().parents[2] / "examples/qwen3vl/inference_demo.py"
INTERRUPTED = """
import sys
from mindspeed_mm.errors import report_errors
def command():
    print("started", flush=True)
    import time
    time.sleep(60)
sys.exit(report_errors(command, interrupted="interrupted; nothing was written"))
"""


def _fail(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [(UserError("file f is empty; fill it"), 2, "error: file f is empty; fill it"),
     (PermissionError(13, "Permission denied", "/f"), 2,
      "error: /f: Permission denied; change its permissions, or run as its owner"),
     (OSError(5, "Input/output error"), 2, "error: Input/output error"),
     (OSError(2, "No such file", "two\nlines"), 2, "error: two lines: No such file"),
     (KeyboardInterrupt(), 130, "interrupted")],
)
def test_each_end_is_one_line(capsys: pytest.CaptureFixture, error: BaseException, status: int, line: str) -> None:
    assert report_errors(lambda: _fail(error)) == status
    assert capsys.readouterr().err == line + "\n"


def test_the_status_of_the_command() -> None:
    assert [report_errors(lambda: None), report_errors(lambda: 1), report_errors(lambda: sys.exit(3))] == [0, 1, 3]


def test_a_fault_of_the_program_itself_stays_visible() -> None:
    with pytest.raises(KeyError):
        report_errors(lambda: _fail(KeyError("x")))


@pytest.mark.parametrize("end", [">&-", ">/dev/full"])
def test_output_that_cannot_be_written(end: str) -> None:
    code = ("import sys; from mindspeed_mm.errors import report_errors; "
            "sys.exit(report_errors(lambda: print('x', sys.stdout.isatty())))")
    result = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}" {end}'], capture_output=True, text=True, timeout=60
    )
    full = (2, "error: standard output cannot be written: No space left on device\n")
    assert (result.returncode, result.stderr) == ((0, "") if end == ">&-" else full)


def test_output_without_the_characters() -> None:
    code = "from mindspeed_mm.errors import report_errors\nreport_errors(lambda: print('\u4e2d'))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (result.stdout, result.stderr) == ("\\u4e2d\n", "")


def test_ctrl_c() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "interrupted; nothing was written\n")


@pytest.mark.parametrize("program", ["show_data", "inference_demo"])
def test_ctrl_c_while_torch_is_imported(tmp_path: Path, program: str) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    words = {
        "show_data": ["-m", "mindspeed_mm.tools.show_data", "--mm-data", "d", "--mm-model", "m", "--seq-length", "8"],
        "inference_demo": [str(DEMO), "--model", str(tmp_path), "--image", str(tmp_path / "image.png")],
    }
    result = subprocess.run(
        [sys.executable, *words[program]], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{DEMO.parents[2]}"},
    )
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
