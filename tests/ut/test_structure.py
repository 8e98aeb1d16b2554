"""The source tree keeps its structure; and each check of that can fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import structure

Check = Callable[[str, Path], list[str]]


def violations(check: Check, suffixes: tuple[str, ...]) -> list[str]:
    """What ``check`` finds in all files of the repository with one of ``suffixes`` (none: in every text file)."""
    found = []
    for path in structure.repository_files():
        if suffixes and path.suffix not in suffixes:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += check(text, path.relative_to(structure.ROOT))
    return found


@pytest.mark.parametrize(
    ("check", "suffixes"),
    [
        (structure.import_violations, (".py",)),
        (structure.device_violations, (".py",)),
        (structure.family_violations, (".py",)),
        (structure.size_violations, (".py", ".sh")),
        (structure.registry_violations, ()),
    ],
)
def test_tree(check, suffixes):
    found = violations(check, suffixes)
    assert not found, "\n" + "\n".join(found)


def test_no_module_imports_itself_through_others():
    sources = {
        path.relative_to(structure.ROOT): path.read_text(encoding="utf-8")
        for path in structure.repository_files()
        if path.suffix == ".py" and path.relative_to(structure.ROOT).parts[0] in ("mindspeed_mm", "checkpoint")
    }
    assert len(sources) > 100 and not structure.import_circles(sources)
    sources[Path("mindspeed_mm/errors.py")] += "\ndef f():\n    from mindspeed_mm.training.trainer import Trainer\n"
    assert "mindspeed_mm.errors" in structure.import_circles(sources)[0]


def test_tree_is_not_empty():
    paths = {str(path.relative_to(structure.ROOT)) for path in structure.repository_files()}
    assert {"setup.py", "mindspeed_mm/errors.py", "scripts/install.sh"} <= paths


@pytest.mark.parametrize(
    "module", ["mindspeed_mm.config", "mindspeed_mm.models.qwen3_vl.spec", "mindspeed_mm.tools.memory.__main__"]
)
def test_it_loads_without_torch(module):
    code = f"import sys, {module}; print(*{{'torch', 'transformers', 'megatron'}} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=structure.ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mindspeed_mm/errors.py", "import mindspeed_mm.backend"),
        ("mindspeed_mm/backend/device.py", "from mindspeed_mm.config.command_line import parse_args"),
        ("mindspeed_mm/backend/device.py", "from ..arguments import parse_args"),
        ("mindspeed_mm/backend/__init__.py", "from .. import arguments"),
        ("mindspeed_mm/config/flags.py", "from mindspeed_mm.models import spec"),
        ("mindspeed_mm/config/flags.py", "def f():\n    import torch"),
        ("mindspeed_mm/config/flags.py", "from torch import nn"),
        ("mindspeed_mm/data/loader.py", "from mindspeed_mm import training"),
        ("mindspeed_mm/data/loader.py", "from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig"),
        ("mindspeed_mm/data/loader.py", "import torch.distributed as dist"),
        ("mindspeed_mm/interfaces/batch.py", "from torch import distributed"),
        ("mindspeed_mm/interfaces/batch.py", "from mindspeed_mm.data.images import PixelNorm"),
        ("mindspeed_mm/models/qwen3_vl/config.py", "from mindspeed_mm.models import specs"),
        ("mindspeed_mm/models/layers/moe.py", "from mindspeed_mm.data import collator"),
        ("mindspeed_mm/models/layers/moe.py", "from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig"),
        ("mindspeed_mm/models/layers/memory.py", "import torch"),
        ("mindspeed_mm/parallel/mesh.py", "from mindspeed_mm.models.qwen3_vl.model import Qwen3VLModel"),
        ("mindspeed_mm/checkpoint/manager.py", "from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig"),
        ("mindspeed_mm/models/layers/moe.py", "from mindspeed_mm.parallel import dispatch"),
        ("mindspeed_mm/models/layers/specs.py", "from mindspeed_mm.parallel import expert"),
        ("mindspeed_mm/parallel/mesh.py", "from mindspeed_mm.data.loader import BatchLoader"),
        ("mindspeed_mm/training/loop.py", "import pretrain_transformers"),
        ("mindspeed_mm/training/loop.py", "from checkpoint import cli"),
        ("checkpoint/cli.py", "from mindspeed_mm.training.trainer import pretrain"),
        ("checkpoint/cli.py", "from examples import anything"),
        ("setup.py", "import mindspeed_mm.errors"),
        ("stray/module.py", "import os"),
    ],
)
def test_wrong_import_is_found(path, source):
    assert len(structure.import_violations(source, Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mindspeed_mm/backend/device.py", "import torch\nfrom mindspeed_mm.errors import UserError"),
        ("mindspeed_mm/config/flags.py", "from .fields import Field\nfrom mindspeed_mm.config import fields"),
        ("mindspeed_mm/data/collator.py", "from mindspeed_mm.models.spec import ModelSpec"),
        ("mindspeed_mm/models/qwen3_vl/model.py", "from mindspeed_mm.interfaces.batch import Batch"),
        ("mindspeed_mm/parallel/expert_parallel.py", "from mindspeed_mm.models.layers.moe import MoELayer"),
        ("mindspeed_mm/models/layers/specs.py", "from mindspeed_mm.models.layers import moe"),
        ("checkpoint/cli.py", "from mindspeed_mm.checkpoint import directory\nfrom checkpoint import reader"),
        ("pretrain_transformers.py", "from mindspeed_mm.training import pretrain"),
        ("tests/ut/test_any.py", "from mindspeed_mm.training import pretrain\nimport checkpoint"),
    ],
)
def test_right_import_passes(path, source):
    assert structure.import_violations(source, Path(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.cuda.synchronize()",
        "x = tensor.npu()",
        "import torch_npu",
        "from torch import cuda",
        "import torch.cuda",
        "device = 'cuda'",
        "device = f'npu:{rank}'",
        "init(backend='cpu:gloo,cuda:nccl')",
        "backend = 'hccl'",
        "choices = ['gloo']",
        "activity = ProfilerActivity.CUDA",
        "devices = dict(npu=1)",
    ],
)
def test_device_name_is_found(source):
    assert structure.device_violations(source, Path("mindspeed_mm/training/loop.py"))
    assert structure.device_violations(source, Path("examples/qwen3vl/demo.py"))
    assert not structure.device_violations(source, Path("mindspeed_mm/backend/device.py"))


@pytest.mark.parametrize(
    "source",
    ['"""Runs on cuda and npu."""', "config.use_npu_fused_moe", "device = 'cpu'", "os.environ['CUDA_VISIBLE_DEVICES']"],
)
def test_other_names_pass(source):
    assert structure.device_violations(source, Path("mindspeed_mm/training/loop.py")) == []


@pytest.mark.parametrize(
    "source",
    [
        "from mindspeed_mm.models.qwen3_vl import model",
        "def f(config: Qwen3VLConfig): ...",
        "kind = 'qwen3_vl_moe'",
        "layers = model.text_decoder.layers",
        "merge = self.model_config.vision.merge_unit",
        "experts = model_config.text.num_experts",
    ],
)
def test_knowledge_of_a_family_is_found(source):
    assert structure.family_violations(source, Path("mindspeed_mm/training/loop.py"))
    assert not structure.family_violations(source, Path("mindspeed_mm/models/qwen3_vl/model.py"))
    assert not structure.family_violations(source, Path("benchmarks/any.py"))


@pytest.mark.parametrize(
    "source", ["count = model_config.num_experts", "batch.vision.pixels", "'see examples/qwen3vl/README.md'"]
)
def test_other_attributes_pass(source):
    assert structure.family_violations(source, Path("mindspeed_mm/training/loop.py")) == []


def test_long_file_and_function_are_found():
    function = "def f():\n" + "    pass\n" * (structure.MAX_FUNCTION_LINES - 2)
    path = Path("mindspeed_mm/errors.py")
    assert structure.size_violations(function, path) == []
    assert "f has 80 lines" in structure.size_violations(function + "    pass\n", path)[0]
    file = "x = 1\n" * (structure.MAX_FILE_LINES - 1)
    assert structure.size_violations(file, path) == []
    assert "600 lines" in structure.size_violations(file + "x = 1\n", path)[0]
    assert structure.size_violations(file + "x = 1\n", Path("scripts/install.sh"))


@pytest.mark.parametrize(
    "parts",
    [
        ("pip install -i https://py", "pi.org/simple x"),
        ("--index-url https://example.com/sim", "ple"),
        ("https://download.pyt", "orch.org/whl/cpu"),
        ("https://mirrors.exam", "ple.com/pypi"),
        ("https://files.python", "hosted.org/packages"),
    ],
)
def test_registry_is_found(parts):
    # in two parts, because this file is searched too
    assert len(structure.registry_violations("first line\n" + "".join(parts), Path("README.md"))) == 1
    assert structure.registry_violations("a simple sentence about mirrors", Path("README.md")) == []


def test_directories_of_tests_are_packages():
    """Or two files of one name, in different directories, stop pytest from collecting any."""
    directories = {path.parent for path in structure.repository_files() if path.match("tests/**/test_*.py")}
    assert [str(directory) for directory in sorted(directories) if not (directory / "__init__.py").is_file()] == []
