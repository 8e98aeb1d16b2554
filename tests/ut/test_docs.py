"""README and docs: links, flags and paths that they name exist, and translations (``*_zh.md``) mirror the originals."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from mindspeed_mm.models.spec import ModelSpec
from tests.tools import configuration_tables

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md"), *ROOT.glob("examples/**/*.md")]
)

# Commands whose flags the docs may name. Benchmarks and test drivers are scanned, to avoid starting each.
HELP_COMMANDS = (
    ("pretrain_transformers.py", "--help"),
    ("-m", "checkpoint.cli", "Qwen3VLConverter", "hf_to_dcp", "--help"),
    ("-m", "checkpoint.cli", "Qwen3VLConverter", "dcp_to_hf", "--help"),
    ("-m", "checkpoint.cli", "Qwen3VLConverter", "verify", "--help"),
    ("-m", "checkpoint.cli", "Qwen3VLConverter", "inspect", "--help"),
    ("-m", "checkpoint.cli", "Qwen3VLConverter", "check_hf", "--help"),
    ("-m", "checkpoint.cli", "Qwen3VLConverter", "lora_to_hf", "--help"),
    ("-m", "checkpoint.cli", "Qwen3VLConverter", "lora_hf_to_dcp", "--help"),
    ("-m", "checkpoint.cli", "Qwen3VLConverter", "merge_lora", "--help"),
    ("-m", "checkpoint.cli", "Qwen3VLConverter", "verify_lora", "--help"),
    ("-m", "checkpoint.cli", "GenericDCPConverter", "hf_to_dcp", "--help"),
    ("-m", "checkpoint.cli", "GenericDCPConverter", "dcp_to_hf", "--help"),
    ("-m", "mindspeed_mm.tools.memory", "--help"),
)
SCANNED = ("scripts/*", "benchmarks/*.py", "examples/**/*.py", "examples/**/*.sh", "mindspeed_mm/tools/**/*.py",
           "mindspeed_mm/evaluation/cli.py", "tests/drivers/*.py", "tests/tools/*.py", "tests/fuzz/*.py",
           "tests/st/*.py")
FOREIGN_FLAGS = {  # pytest, pip, ...; vLLM; SGLang; MindSpeed-MM; lmms-eval, VLMEvalKit, EvalScope; TensorBoard, MLflow
    "--basetemp", "--no-deps", "--target", "--standalone", "--fix", "--signal",
    "--enable-lora", "--max-lora-rank", "--lora-modules", "--enable-tower-connector-lora",
    "--served-model-name", "--tensor-parallel-size", "--max-model-len", "--limit-mm-per-prompt",
    "--allowed-local-media-path", "--generation-config",
    "--model-path", "--lora-paths", "--tp-size", "--context-length", "--port", "--is_lora_base",
    "--model", "--model_args", "--tasks", "--batch_size", "--output_path", "--num_processes",
    "--config", "--work-dir", "--data", "--base-url", "--key",
    "--api-url", "--api-key", "--eval-type", "--datasets", "--eval-batch-size", "--limit",
    "--logdir", "--bind_all", "--samples_per_plugin", "--backend-store-uri",
}
WRITTEN_BY_COMMANDS = {"docs/performance_gpu.md"}
_FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
_PATH = re.compile(r"(?<![\w./-])(?:tests|mindspeed_mm|benchmarks|examples|scripts|checkpoint|docs)/[\w*/.-]*[\w*/]")
_MODULE = re.compile(r"python3? -m ((?:tests|benchmarks|mindspeed_mm|checkpoint)[\w.]*)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@cache
def known_flags() -> frozenset[str]:
    flags = set(FOREIGN_FLAGS)
    for command in HELP_COMMANDS:
        result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
        flags.update(_FLAG.findall(result.stdout))
    for pattern in SCANNED:
        for path in filter(Path.is_file, ROOT.glob(pattern)):
            flags.update(_FLAG.findall(path.read_text(encoding="utf-8")))
    return frozenset(flags | {flag.replace("_", "-") for flag in flags})


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(text: str, page: Path) -> list[str]:
    broken = []
    for target in _LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        if not path.exists():
            broken.append(f"{page}: {target}: no such file")
        elif anchor and anchor not in anchors(text if path == page else path.read_text(encoding="utf-8")):
            broken.append(f"{page}: {target}: no such heading")
    return broken


def unknown_flags(text: str, flags: frozenset[str]) -> list[str]:
    return sorted(set(_FLAG.findall(text)) - flags)


def missing_paths(text: str) -> list[str]:
    """Files, directories and modules of this repository that the text names and that do not exist."""
    names = [name for name in _PATH.findall(text) if name not in WRITTEN_BY_COMMANDS]
    missing = [name for name in names if not any(ROOT.glob(name.rstrip("/")))]
    for module in _MODULE.findall(text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            missing.append(module)
    return missing


def skeleton(text: str) -> dict[str, list[str]]:
    """What a translation has in common with its original: heading levels, commands, links, code spans, tables."""
    blocks = []
    for language, body in _FENCE.findall(text):
        for line in body.splitlines():
            command = re.sub(r"(^|\s)#.*", "", line)
            command = re.sub(r'"[^"]*"$', '""', command).rstrip()
            blocks.append(command if language == "bash" else " ".join(line.split()[:1]))
    prose = _FENCE.sub("", text)
    return {
        "headings": re.findall(r"^(#+) ", prose, re.MULTILINE),
        "code blocks": blocks,
        "links": sorted(link.partition("#")[0].replace("_zh.md", ".md") for link in _LINK.findall(prose)),
        "code spans": sorted(set(re.findall(r"`([^`]+)`", prose))),
        "table rows": re.findall(r"^(\|)", prose, re.MULTILINE),
        "list items": re.findall(r"^(- )", prose, re.MULTILINE),
    }


def differences(original: str, translation: str) -> list[str]:
    first, second = skeleton(original), skeleton(translation)
    return [
        f"{name}: {sorted(set(first[name]) ^ set(second[name])) or (len(first[name]), len(second[name]))}"
        for name in first
        if first[name] != second[name]
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_flags_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert broken_links(text, page) == []
    assert unknown_flags(text, known_flags()) == []
    assert missing_paths(text) == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem.endswith("_zh")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_translation_mirrors_original(page: Path) -> None:
    original = page.with_name(page.name.replace("_zh", ""))
    assert differences(original.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")) == []


def test_every_page_is_linked_from_the_readmes() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")]
    linked = {link.partition("#")[0] for text in texts for link in _LINK.findall(text)}
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} - linked - WRITTEN_BY_COMMANDS == set()


def test_configuration_tables_are_those_of_the_schema() -> None:
    _, _, tables = configuration_tables.PAGE.read_text(encoding="utf-8").partition(configuration_tables.MARK)
    assert tables == configuration_tables.tables(), "run: python -m tests.tools.configuration_tables"


def test_every_metric_is_documented() -> None:
    sources = [ROOT / "mindspeed_mm" / "training" / name for name in ("trainer.py", "metrics.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    names = set(re.findall(r'metrics\.(?:add|set)\("(\w+)"|rates\["(\w+)"\]', text))
    documented = re.findall(r"`(\w+)`", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"))
    assert {"loss", "grad_norm", "mfu"} <= {name for pair in names for name in pair if name} <= set(documented)


def test_the_whole_model_spec_is_documented() -> None:
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "model_family.md").read_text(encoding="utf-8")))
    members = {name for name in (*vars(ModelSpec), *ModelSpec.__annotations__) if not name.startswith("_")}
    assert {"build_model", "parts"} <= members <= documented, members - documented


def test_wrong_texts_are_found() -> None:
    page = ROOT / "README.md"
    text = "# Title\n[a](docs/data.md) [b](docs/nothing.md) [c](#title) [d](#other) [e](https://example.org)"
    assert broken_links(text, page) == [
        f"{page}: docs/nothing.md: no such file", f"{page}: #other: no such heading",
    ]
    assert unknown_flags("`--seq-length 3 --seq-lenght=4`, --hf_dir; a--b", known_flags()) == ["--seq-lenght"]
    assert missing_paths("`tests/ut/test_docs.py` docs/*.md tests/ut/test_nothing.py; python -m tests.nothing 3") == [
        "tests/ut/test_nothing.py", "tests.nothing",
    ]


@pytest.mark.parametrize(
    "translation",
    [
        "# 甲\n见 [页](docs/data.md)，`--save`\n```bash\nrun --save a  # 注\n```",
        "# 甲\n## 乙\n见 [页](docs/data.md)，`--load`\n```bash\nrun --save a  # 注\n```",
        "# 甲\n## 乙\n见 [页](docs/data.md)，`--save`\n```bash\nrun --save b  # 注\n```",
        "# 甲\n## 乙\n见 [页](docs/media.md)，`--save`\n```bash\nrun --save a  # 注\n```",
        "# 甲\n## 乙\n见 [页](docs/data.md)，`--save`\n```bash\nrun --save a\n```\n| 表 |",
    ],
)
def test_different_translations_are_found(translation: str) -> None:
    original = "# A\n## B\nsee [page](docs/data.md), `--save`\n```bash\nrun --save a  # comment\n```"
    same = "# 甲\n## 乙\n见 [页](docs/data.md)，`--save`\n```bash\nrun --save a  # 注\n```"
    assert differences(original, same) == []
    assert differences(original, translation) != []
