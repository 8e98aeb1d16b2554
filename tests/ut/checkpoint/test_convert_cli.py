"""Mistakes in the command line and in what it names are one line that says what to do, and nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from checkpoint.cli import CONVERTERS, main
from mindspeed_mm.checkpoint import directory, hf_to_dcp
from tests.ut.checkpoint.test_convert import read_all
from tests.ut.checkpoint.tiny import random_config, write_hf_directory

Run = Callable[..., str]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Hugging Face directory ``hf`` and a converted checkpoint ``dcp``, in a place that any user can reach."""
    root = Path(tempfile.mkdtemp(prefix="with spaces "))
    write_hf_directory(root / "hf", random_config(random.Random(1), moe=True, tie=False))
    hf_to_dcp.hf_to_dcp(root / "hf", root / "dcp")
    for path in (root, *root.rglob("*")):
        path.chmod(0o755)
    (root / "out").mkdir()
    (root / "out").chmod(0o777)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def run(places: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line, with ``@`` for the place; returns what it says when it fails as it should."""

    def fail(*arguments: str) -> str:
        assert main(["Qwen3VLConverter", *(word.replace("@", str(places) + "/") for word in arguments)]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("error: "), message
        return message.replace(str(places) + "/", "@")

    return fail


TO_DCP, TO_HF = ("hf_to_dcp", "--hf_dir", "@hf", "--dcp_dir"), ("dcp_to_hf", "--model_assets_dir", "@hf", "--save_dir")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("hf_to_dcp", "--hf_dir", "@dcp", "--dcp_dir", "@x"), "@dcp is a distributed checkpoint"),
        (("verify", "--dcp_dir", "@hf", "--hf_dir", "@dcp"), "--dcp_dir @hf is a Hugging Face directory"),
        (("verify", "--dcp_dir", "@dcp", "--hf_dir", "@dcp"), "--hf_dir @dcp is a distributed checkpoint"),
        ((*TO_HF, "@x", "--load_dir", "@hf"), "--load_dir @hf is a Hugging Face directory"),
        ((*TO_HF, "@x", "--load_dir", "@nothing"), "--load_dir @nothing does not exist"),
        ((*TO_HF, "@x", "--load_dir", "@hf/config.json"), "is a file; name the checkpoint's directory"),
        ((*TO_HF, "@x", "--load_dir", "@"), "neither latest_checkpointed_iteration.txt nor manifest.json"),
        (("dcp_to_hf", "--model_assets_dir", "@nothing", "--save_dir", "@x", "--load_dir", "@dcp"),
         "@nothing/config.json does not exist"),
        ((*TO_HF, "@hf/config.json", "--load_dir", "@dcp"), "is a file; name another directory"),
        ((*TO_DCP, "@hf/config.json"), "is a file; name a directory"),
        ((*TO_DCP, "@hf/config.json/below"), "cannot be written: Not a directory"),
        (("inspect", "--dir", "@nothing"), "@nothing does not exist"),
        ((*TO_DCP, "@hf"), "--dcp_dir @hf is --hf_dir, which is read from"),
        ((*TO_DCP, ""), "argument --dcp_dir: it is empty; name a directory"),
        (("inspect", "--dir", ""), "argument --dir: it is empty; name a directory"),
        (("inspect", "--dir", "@"), "so it is not a checkpoint"),
    ],
)
def test_wrong_places(run: Run, places: Path, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in run(*arguments)
    assert not (places / "x").exists() and sorted(os.listdir(places)) == ["dcp", "hf", "out"]


def test_a_loop_of_links_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for command in (TO_DCP, ("inspect", "--dir"), (*TO_HF, "@x", "--load_dir")):
        run(*command, str(tmp_path / "loop"))
    run(*TO_HF, str(tmp_path / "loop"), "--load_dir", "@dcp")


def test_an_unfinished_conversion_is_named(run: Run, places: Path, tmp_path: Path) -> None:
    directory.partial_name(tmp_path / "release").mkdir()
    for command in (("inspect", "--dir"), (*TO_HF, "@x", "--load_dir")):
        assert "holds an unfinished conversion; run the same hf_to_dcp command again" in run(*command, str(tmp_path))


@pytest.fixture
def unprivileged(places: Path) -> Iterator[None]:
    """An ordinary user, for whom permissions count."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def without_permission(places: Path) -> Iterator[Callable[[str, int], None]]:
    """Changes permissions, and gives them back at the end."""
    changed: list[tuple[Path, int]] = []

    def change(name: str, mode: int) -> None:
        path = places / name
        changed.append((path, path.stat().st_mode & 0o777))
        path.chmod(mode)

    yield change
    for path, mode in reversed(changed):
        path.chmod(mode)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("hf", (*TO_DCP, "@out/x")),
        ("hf/config.json", (*TO_DCP, "@out/x")),
        ("hf/model-00002-of-00003.safetensors", (*TO_DCP, "@out/x")),
        ("hf/model.safetensors.index.json", (*TO_DCP, "@out/x")),
        ("dcp/release", (*TO_HF, "@out/x", "--load_dir", "@dcp")),
        ("dcp/release/manifest.json", (*TO_HF, "@out/x", "--load_dir", "@dcp")),
        ("dcp/release/__0_0.distcp", (*TO_HF, "@out/x", "--load_dir", "@dcp")),
        ("hf", ("inspect", "--dir", "@hf")),
    ],
)
def test_unreadable(
    run: Run, without_permission: Callable[[str, int], None], request: pytest.FixtureRequest, name: str,
    arguments: tuple[str, ...], places: Path,
) -> None:
    """Said before anything is written, or with nothing left of it."""
    without_permission(name, 0)
    request.getfixturevalue("unprivileged")
    message = run(*arguments)
    assert "Permission denied" in message and f"@{name}" in message
    assert not list((places / "out").rglob("*"))


def test_unwritable_target(
    run: Run, without_permission: Callable[[str, int], None], request: pytest.FixtureRequest, places: Path
) -> None:
    (places / "locked").mkdir(mode=0o555)
    try:
        request.getfixturevalue("unprivileged")
        for name in ("locked", "locked/below"):
            message = run(*TO_DCP, f"@{name}")
            assert "cannot be written: Permission denied" in message and "name another directory" in message
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        (places / "locked").rmdir()


COMMAND_LINES = [
    (["Qwen3vlConvertor", "hf_to_dcp"], "did you mean Qwen3VLConverter?"),
    (["Qwen3VLConverter", "hf_2_dcp"], "did you mean hf_to_dcp?"),
    (["Qwen3VLConverter", "hf_to_dcp", "--hfdir", "x"], "did you mean --hf_dir?"),
    (["hf_to_dcp", "--hf_dir", "x"], "mm-convert Qwen3VLConverter hf_to_dcp"),
    (["Qwen3VLConverter", "--hf_dir", "x"], "the command comes before its options"),
    (["Qwen3VLConverter", "hf_to_dcp", "--hf_dir", "x"], "--dcp_dir"),
    (["Qwen3VLConverter", "hf_to_dcp", "--hf_dir", "my", "model", "--dcp_dir", "x"], "a path with spaces needs quotes"),
    (["Qwen3VLConverter", "hf_to_dcp", "--expert_layout", "hubb"], "'auto', 'hub', 'v5'"),
    (["Qwen3VLConverter", "dcp_to_hf", "--max_shard_size", "5XB"], "5GB"),
    (["Qwen3VLConverter", "dcp_to_hf", "--workers", "0"], "at least 1"),
    (["Qwen3VLConverter", "hf_to_dcp", "--dtype", "int8"], "fp32"),
    (["Qwen3VLConverter", "hf_to_dcp", "--overwrite", "3"], "argument --overwrite"),
    *(
        (["Qwen3VLConverter", "dcp_to_hf", *dtype, "--to-bf16"], f"--to_bf16 contradicts --dtype {dtype[-1]}")
        for dtype in (("--dtype", "fp32"), ("--dtype", "keep"), ("--dtype", "auto"))
    ),
    (["GenericDCPConverter", "hf_to_dcp", "--dtype=keep", "--to_bf16", "true"], "--to_bf16 contradicts --dtype keep"),
    (["GenericDCPConverter", "verify"], "unknown command 'verify'"),
    (["GenericDCPConverter", "dcp_to_hf", "--hf_dir", "x"], "unknown option --hf_dir"),
    (["GenericDCPConverter", "hf_to_dcp", "--tie_weight_mapping", "a,b,c"], "must hold pairs: target1,source1,"),
    (["GenericDCPConverter", "hf_to_dcp", "--fused_linear_names", "[a"], "argument --fused_linear_names"),
    (["GenericDCPConverter", "hf_to_dcp", "--config"], "argument --config: expected one argument"),
]


@pytest.mark.parametrize(("arguments", "expected"), COMMAND_LINES)
def test_command_lines(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and expected in message


def test_help_is_complete_and_imports_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == main(["Qwen3VLConverter", "--help"]) == 0
    assert "hf_to_dcp" in capsys.readouterr().out
    assert main(["GenericDCPConverter"]) == 0
    assert "safetensors -> distributed checkpoint" in capsys.readouterr().out
    for converter in CONVERTERS:
        code = (
            "import sys\nfrom checkpoint.cli import main\n"
            f"try:\n    main(['{converter}', 'dcp_to_hf', '--print_config'])\n"
            f"    main(['{converter}', 'dcp_to_hf', '--help'])\nfinally:\n    assert 'torch' not in sys.modules\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "default: 5GB" in result.stdout and "example:" in result.stdout


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    """What ``--print_config`` prints for a command line."""
    capsys.readouterr()
    assert main([*arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


GENERIC, OPTIONS = ("GenericDCPConverter", "hf_to_dcp"), {
    "hf_dir": None, "dcp_dir": None, "dtype": "keep", "overwrite": False, "workers": None, "hf_prefix": "",
    "dcp_prefix": "", "fused_linear_names": [], "tie_weight_mapping": {},
}


def test_the_options_of_every_command_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, *GENERIC) == OPTIONS
    for converter, (_, commands) in CONVERTERS.items():
        for name, command in commands.items():
            keys = {key.partition(" ")[0].partition("|")[0] for key in command.options}
            keys -= {"to_bf16", "lora_target_modules", "scaling"}  # printed as the dtype; without effect
            assert printed(capsys, converter, name).keys() == keys
    assert printed(capsys, "Qwen3VLConverter", "dcp_to_hf")["max_shard_size"] == 5 * 10**9


def test_an_option_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values of all kinds; the command line overrides them; what is printed is such a file."""
    content = {
        "hf-dir": "my models/a", "dcp_dir": "wrong", "hf_prefix": "-model.", "workers": 3, "overwrite": True,
        "tie_weight_mapping": {"lm_head.weight": "embed, tokens.weight"}, "fused_linear_names": ["experts", "w2"],
        "dtype": None,
    }
    file, again = tmp_path / "options.yaml", tmp_path / "printed.yaml"
    file.write_text(yaml.safe_dump(content))
    expected = {**OPTIONS, **content, "hf_dir": "my models/a", "dcp_dir": "right", "overwrite": False, "dtype": "keep"}
    del expected["hf-dir"]
    given = ["--config", str(file), "--dcp-dir", "right", "--overwrite", "false"]
    assert printed(capsys, *GENERIC, *given) == expected
    assert printed(capsys, *GENERIC, "--overwrite=false", "--dcp_dir=right", f"--config={file}") == expected
    again.write_text(yaml.safe_dump(expected))
    assert printed(capsys, *GENERIC, "--config", str(again)) == expected
    again.write_text(yaml.safe_dump(OPTIONS))
    assert printed(capsys, *GENERIC, "--config", str(again)) == OPTIONS


@pytest.mark.parametrize(
    ("text", "arguments", "dtype"),
    [
        ("to_bf16: true", [], "bf16"),
        ("to_bf16: false", [], "keep"),
        ("dtype: fp32", ["--to_bf16"], "bf16"),
        ("to_bf16: true", ["--dtype", "fp32"], "fp32"),
        ("to_bf16: true\ndtype: bf16", ["--to_bf16", "--dtype", "bf16"], "bf16"),
        ("dtype: fp32", ["--to_bf16", "false"], "fp32"),
    ],
)
def test_to_bf16_is_a_dtype(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, arguments: list[str], dtype: str
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert printed(capsys, *GENERIC, "--config", str(tmp_path / "a.yaml"), *arguments) == {**OPTIONS, "dtype": dtype}


def test_lists_and_mappings_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    expected = {**OPTIONS, "fused_linear_names": ["a", "b"], "tie_weight_mapping": {"c": "d", "e": "f"}}
    for lists in (["a,b", "c,d,e,f"], ['["a", "b"]', '{"c": "d", "e": "f"}'], [" a, b", "c,d, e,f,"]):
        options = ["--fused_linear_names", lists[0], "--tie_weight_mapping", lists[1]]
        assert printed(capsys, *GENERIC, *options) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "options.yaml does not exist"),
        ("a: [", "options.yaml, line 1 is not valid YAML"),
        ("- 1", "options.yaml must map option names to values"),
        ("", "options.yaml must map option names to values"),
        ("hfdir: x", "options.yaml: unknown option --hfdir; did you mean --hf_dir?"),
        ("over_write: null", "options.yaml: unknown option --over_write; did you mean --overwrite?"),
        ("config: other.yaml", "options.yaml: unknown option --config; it has no such option"),
        ("1: 2", "options.yaml, line 1: the key 1 is a number"),
        ("workers: 0", "at least 1"),
        ("workers: true", "at least 1"),
        ("overwrite: 3", "argument --overwrite"),
        ("dtype: int8", "'keep', 'bf16', 'fp32'"),
        ("dtype: fp32\nto_bf16: true", "--to_bf16 contradicts --dtype fp32"),
        ("tie_weight_mapping: [a]", "must hold pairs"),
    ],
)
def test_faulty_option_files(
    tmp_path: Path, text: str | None, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    if text is not None:
        file.write_text(text)
    assert main([*GENERIC, "--config", str(file), "--hf_dir", "x", "--dcp_dir", str(tmp_path / "y")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and expected in message
    assert not (tmp_path / "y").exists()


def test_a_command_runs_from_an_option_file(places: Path, tmp_path: Path) -> None:
    content = {"load_dir": str(places / "dcp"), "model_assets_dir": str(places / "hf"), "to_bf16": True}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(content))
    given = ["--config", str(tmp_path / "options.yaml"), "--save_dir", str(tmp_path / "out")]
    assert main(["Qwen3VLConverter", "dcp_to_hf", *given]) == 0
    tensors = read_all(tmp_path / "out")
    assert tensors and all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    given = ["--hf_dir", str(tmp_path / "out"), "--dcp_dir", str(tmp_path / "dcp"), "--to_bf16"]
    assert main(["Qwen3VLConverter", "hf_to_dcp", *given]) == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("5GB", 5 * 10**9), ("500mb", 500 * 10**6), ("1.5 GiB", 3 * 2**29), ("4096", 4096), ("2G", 2 * 10**9)],
)
def test_sizes(text: str, value: int) -> None:
    from checkpoint.cli import size

    assert size(text) == value
