"""Whether torch_npu's wheels still publish the operator signatures that the NPU kernels and their tests build on.

``python -m pytest tests/st/test_npu_signatures.py -m slow`` downloads the wheels from the package index, or reads those
in the directory TORCH_NPU_WHEELS, and imports none of them. ``python -m tests.st.test_npu_signatures`` writes their
signatures into the file of the simulated torch_npu.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.npu_environment import SIMULATED_NPU

FILE = SIMULATED_NPU / "torch_npu/signatures.yaml"
OPERATORS = SIMULATED_NPU / "torch_npu/operators.txt"
CALLERS = {"repeat_interleave.Tensor": "repeat_interleave.self_Tensor"}  # what torch makes of which, torch_npu does not
KERNELS = Path(__file__).parents[2] / "mindspeed_mm/backend/kernels/npu.py"
IN_WHEEL = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
HEADER = """# Signatures of the operators that the NPU kernels use, as torch_npu's wheels publish them in
# torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml; tests/st/test_npu_signatures.py compares and rewrites them.
"""


def wheel(version: str, directory: Path) -> Path:
    """The wheel of torch_npu ``version``, downloaded into ``directory`` unless TORCH_NPU_WHEELS has it."""
    given = Path(os.environ.get("TORCH_NPU_WHEELS", directory))
    if not (found := sorted(given.glob(f"torch_npu-{version}-*.whl"))):
        platforms = [word for name in ("manylinux_2_28", "manylinux2014") for word in ("--platform", f"{name}_x86_64")]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *platforms,
             "--python-version", "3.11", "--dest", str(directory), f"torch-npu=={version}"],
            check=True,
        )
        found = sorted(directory.glob(f"torch_npu-{version}-*.whl"))
    return found[0]


def published(version: str, directory: Path) -> dict[str, str]:
    """Operator -> schema, of all that torch_npu ``version`` registers."""
    with zipfile.ZipFile(wheel(version, directory)) as archive:
        text = archive.read(IN_WHEEL).decode()
    schemas = re.findall(r"^[- ] func: ((\S+?)\(.*\) -> .*)$", text, re.MULTILINE)
    return {name: schema for schema, name in schemas}


def recorded() -> dict[str, dict[str, str]]:
    """Version -> operator -> schema, as committed."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def calls() -> Iterator[tuple[str, int, list[str]]]:
    """(operator, positional arguments, keywords) of each call that our kernels make."""
    for node in ast.walk(ast.parse(KERNELS.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch_npu":
            yield node.func.attr, len(node.args), [str(keyword.arg) for keyword in node.keywords]


@pytest.mark.slow
@pytest.mark.parametrize("version", recorded())
def test_wheels_publish_the_recorded_signatures(version, tmp_path_factory):
    ours, theirs = recorded()[version], published(version, tmp_path_factory.getbasetemp())
    assert {name: theirs.get(name) for name in ours} == ours
    # the fused optimizer step is torch's own operator, under torch's own signature
    assert "_fused_adamw_" in theirs
    names = re.findall(r" (\w+)(?:=\w+)?[,)]", theirs["_fused_adamw_"].partition("->")[0])
    assert [argument.name for argument in torch.ops.aten._fused_adamw_.default._schema.arguments] == names


@pytest.mark.slow
@pytest.mark.parametrize("version", recorded())
def test_wheels_register_every_operator_of_a_step(version, tmp_path_factory):
    """One that is not would run on the host, with a warning, after waiting for the device."""
    with zipfile.ZipFile(wheel(version, tmp_path_factory.getbasetemp())) as archive:
        texts = [archive.read(name).decode() for name in (IN_WHEEL, IN_WHEEL.replace("_by_codegen", ""))]
    theirs = {name for text in texts for name in re.findall(r"^\s*(?:- )?(?:func: |- )([\w.]+)", text, re.MULTILINE)}
    assert len(theirs) > 1000
    for operator in OPERATORS.read_text().split():
        name = operator.partition("::")[2]
        # torch leads an operator that returns its result to the one that writes it; torch_npu has one of them
        returning = re.sub(r"\.(grad_input|out)$|_out$", "", name)
        assert {name, returning, CALLERS.get(name)} & theirs, operator


@pytest.mark.parametrize("version", recorded())
def test_our_calls_fit_every_version(version):
    found = list(calls())
    assert {name for name, *_ in found} == {
        "npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_grouped_matmul",
        "npu_moe_token_permute", "npu_moe_token_unpermute",
    }
    for name, positional, keywords in found:
        arguments = torch._C.parse_schema(recorded()[version][name]).arguments
        assert positional <= sum(not argument.kwarg_only for argument in arguments), name
        assert set(keywords) <= {argument.name for argument in arguments}, name


def test_a_drifted_signature_is_noticed(tmp_path, monkeypatch):
    """A wheel whose operator has another name for an argument."""
    version, schemas = "2.7.1", recorded()["2.7.1"]
    lines = [f"- func: {schema}\n  impl_ns: op_api\n" for schema in schemas.values()]
    with zipfile.ZipFile(tmp_path / f"torch_npu-{version}-cp311-cp311-any.whl", "w") as archive:
        archive.writestr(IN_WHEEL, "".join(lines).replace("actual_seq_qlen", "seq_lengths"))
    monkeypatch.setenv("TORCH_NPU_WHEELS", str(tmp_path))
    read = published(version, tmp_path)
    assert read["npu_rms_norm"] == schemas["npu_rms_norm"]
    assert read["npu_fusion_attention"] != schemas["npu_fusion_attention"]


def main() -> None:
    """Write the wheels' signatures, of the versions and operators that the file has."""
    text = HEADER
    with tempfile.TemporaryDirectory() as directory:
        for version, schemas in recorded().items():
            theirs = published(version, Path(directory))
            text += f"{version}:\n" + "".join(f"  {name}: {_quoted(theirs[name])}\n" for name in schemas)
    FILE.write_text(text, encoding="utf-8")


def _quoted(schema: str) -> str:
    return "'" + schema.replace("'", "''") + "'"


if __name__ == "__main__":
    main()
