"""What the structure of the source tree has to satisfy. Each check takes text, so that it can be shown to fail."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80

# What the modules of one part may import of this project. A prefix matches itself and what lies below it.
PACKAGE = "mindspeed_mm"
ALLOWED_IMPORTS: dict[str, tuple[str, ...]] = {
    "mindspeed_mm.errors": (),
    "mindspeed_mm.inputs": ("errors",),
    "mindspeed_mm.progress": ("errors", "inputs"),
    "mindspeed_mm.backend": ("errors", "inputs"),
    "mindspeed_mm.interfaces": ("errors", "inputs"),
    "mindspeed_mm.config": ("errors", "inputs", "backend"),
    "mindspeed_mm.models": ("errors", "inputs", "backend", "config", "interfaces"),
    "mindspeed_mm.models.layers": (
        "errors", "inputs", "backend", "config", "interfaces", "models.lora", "models.memory", "models.model",
        "models.spec", "models.state_dict",
    ),
    "mindspeed_mm.models.layers.config": ("errors", "inputs"),
    "mindspeed_mm.models.qwen3_vl.config": ("errors", "inputs", "models.layers.config"),
    "mindspeed_mm.data": ("errors", "inputs", "progress", "backend", "config", "interfaces", "models.spec"),
    # parallelism is applied to models from outside: models know nothing of it
    "mindspeed_mm.parallel": ("errors", "inputs", "backend", "config", "interfaces", "models.layers", "models.model"),
    "mindspeed_mm.tools": ("errors", "inputs", "backend", "config"),
    "mindspeed_mm.tools.memory": (
        "errors", "inputs", "config", "models.lora", "models.memory", "models.optimizer_state",
        "models.parameter_rules", "models.spec",
    ),
    "mindspeed_mm.tools.show_data": ("errors", "inputs", "config", "data", "interfaces", "models.spec"),
    "mindspeed_mm.checkpoint": (
        "errors", "inputs", "progress", "backend", "models.lora", "models.optimizer_state", "models.spec",
        "models.state_dict",
    ),
    "mindspeed_mm.evaluation": (
        "errors", "inputs", "progress", "backend", "config", "data", "interfaces", "models.lora", "models.spec",
        "tools", "checkpoint",
    ),
    "mindspeed_mm.training": (
        "errors", "inputs", "progress", "backend", "config", "data", "interfaces", "models.layers", "models.lora",
        "models.matrices", "models.memory", "models.model", "models.optimizer_state", "models.parameter_rules",
        "models.spec", "parallel", "tools", "checkpoint", "evaluation",
    ),
    "mindspeed_mm.fsdp": (),  # a name for pretrain_transformers.py
    "checkpoint": ("errors", "inputs", "checkpoint"),
    # entry points see everything, and benchmarks the converter that they time
    "pretrain_transformers": ("",),
    "examples": ("",),
    "benchmarks": ("",),
    "scripts": ("",),
    "setup": (),
}
ENTRY_POINTS = ("checkpoint", "pretrain_transformers", "examples", "benchmarks", "scripts", "tests")

# Foreign modules that a part must not import at all.
FORBIDDEN_MODULES: dict[str, tuple[str, ...]] = {
    "mindspeed_mm.config": ("torch", "transformers", "megatron", "accelerate", "datasets"),
    "mindspeed_mm.data": ("torch.distributed",),
    "mindspeed_mm.interfaces": ("torch.distributed",),
    "mindspeed_mm.tools.memory": ("torch", "transformers", "megatron"),
    "mindspeed_mm.models.memory": ("torch", "transformers", "megatron"),
    "mindspeed_mm.models.optimizer_state": ("torch", "transformers", "megatron"),
    "mindspeed_mm.models.layers.config": ("torch", "transformers", "megatron"),
    "mindspeed_mm.models.layers.memory": ("torch", "transformers", "megatron"),
    "mindspeed_mm.models.qwen3_vl.memory": ("torch", "transformers", "megatron"),
    "mindspeed_mm.errors": ("torch",),
    "mindspeed_mm.inputs": ("torch",),
    "mindspeed_mm.progress": ("torch",),
}

# Files outside the family's folder that may name it: the registry, and the converter's name on the command line.
FAMILY_NAMES = re.compile(r"qwen3_?vl", re.IGNORECASE)
MAY_NAME_FAMILY = ("mindspeed_mm/models/qwen3_vl/", "mindspeed_mm/models/spec.py", "checkpoint/cli.py")
FAMILY_PARTS = ("text_decoder", "image_encoder")

DEVICE_WORDS = ("cuda", "npu", "nccl", "hccl", "gloo")
_DEVICE_NAME = re.compile(rf"(cpu:\w+,)?({'|'.join(DEVICE_WORDS)})([:,].*)?", re.IGNORECASE)
# hosts of package registries and their mirrors, and the places in a path by which an index is known
_REGISTRY = re.compile(
    r"\bpypi\.(org|python\.org|\w+\.\w+)|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|conda\.io"
    r"|mirrors?\.[\w-]+\.\w+|repo\.huaweicloud|https?://\S+/simple\b|https?://\S+/whl\b",
    re.IGNORECASE,
)


def repository_files() -> list[Path]:
    """Files that are tracked or could be: untracked ones count, ignored ones do not."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listing.split("\0") if name]
    return sorted(path for path in paths if path.is_file())


def module_name(path: Path) -> str:
    """Dotted name of the module in ``path``, which is relative to the repository."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _below(name: str, prefix: str) -> bool:
    return prefix == "" or name == prefix or name.startswith(prefix + ".")


def _part(module: str, table: dict[str, tuple[str, ...]]) -> str | None:
    """The longest key of ``table`` that ``module`` lies below."""
    return max((key for key in table if _below(module, key)), key=len, default=None)


def imported_modules(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, with the imported names, so that ``from a import b`` gives a.b."""
    base = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = [node.module] if node.module else []
            if node.level:
                stem = base[: len(base) - node.level + 1] + stem
            yield from ((node.lineno, ".".join([*stem, alias.name])) for alias in node.names)


def import_violations(source: str, path: Path) -> list[str]:
    """Imports against the one direction, and of foreign modules that the part must not know."""
    module = module_name(path)
    part = _part(module, ALLOWED_IMPORTS)
    if part is None:
        return [] if module.split(".")[0] == "tests" or module == PACKAGE else [f"{path}: belongs to no known part"]
    forbidden = FORBIDDEN_MODULES.get(_part(module, FORBIDDEN_MODULES) or "", ())
    found = []
    for line, name in imported_modules(ast.parse(source), module, is_package=path.name == "__init__.py"):
        top = name.split(".")[0]
        if any(_below(name, prefix) for prefix in forbidden):
            found.append(f"{path}:{line}: {part} must not import {name}")
        elif top in ENTRY_POINTS and top != part and (part, top) != ("benchmarks", "checkpoint"):
            found.append(f"{path}:{line}: {part} imports the entry point {name}")
        elif top == PACKAGE and not _below(name, part):
            inner = name.removeprefix(PACKAGE).removeprefix(".")
            if not any(_below(inner, prefix) for prefix in ALLOWED_IMPORTS[part]):
                allowed = ", ".join(ALLOWED_IMPORTS[part]) or "nothing of this project"
                found.append(f"{path}:{line}: {part} imports {name}; it may import {allowed}")
    return found


def import_circles(sources: dict[Path, str]) -> list[str]:
    """Modules that import each other, directly or through others; by names from a package, the module that has them."""
    modules = {module_name(path): path for path in sources}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = imported_modules(ast.parse(sources[path]), module, is_package=path.name == "__init__.py")
        parts = {_part(name, dict.fromkeys(modules, ())) for _, name in names}
        graph[module] = {part for part in parts if part is not None} - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def device_violations(source: str, path: Path) -> list[str]:
    """Places outside the backend that name a device or its collective library."""
    if _below(module_name(path), f"{PACKAGE}.backend") or path.parts[0] == "tests":
        return []
    tree = ast.parse(source)
    found = []
    for line, name in imported_modules(tree, module_name(path), is_package=path.name == "__init__.py"):
        if "torch_npu" in name.split(".") or any(word in name.split(".") for word in DEVICE_WORDS):
            found.append(f"{path}:{line}: imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.lower() in DEVICE_WORDS:
            found.append(f"{path}:{node.lineno}: uses .{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _DEVICE_NAME.fullmatch(node.value):
            found.append(f"{path}:{node.lineno}: names the device {node.value!r}")
        elif isinstance(node, ast.keyword) and node.arg in DEVICE_WORDS:
            found.append(f"{path}:{node.value.lineno}: names the device {node.arg}")
    return [f"{violation}; only {PACKAGE}/backend may" for violation in found]


def family_violations(source: str, path: Path) -> list[str]:
    """Places outside a family's folder that name the family, or reach into its model or its config."""
    name = path.as_posix()
    if not name.startswith((f"{PACKAGE}/", "checkpoint/")) or name.startswith(MAY_NAME_FAMILY):
        return []
    found = []
    for number, line in enumerate(source.splitlines(), start=1):
        if (match := FAMILY_NAMES.search(line)) and "examples/" not in line:
            found.append(f"{path}:{number}: names the family {match.group()}")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
        in_model = node.attr in FAMILY_PARTS and name != f"{PACKAGE}/config/model_options.py"
        if in_model or (node.attr in ("text", "vision") and owner == "model_config"):
            found.append(f"{path}:{node.lineno}: reaches into {owner}.{node.attr}")
    return [f"{violation}; take it from the ModelSpec" for violation in found]


def size_violations(source: str, path: Path) -> list[str]:
    """Files of 600 lines or more, and in Python functions of 80 lines or more."""
    found = []
    lines = len(source.splitlines())
    if lines >= MAX_FILE_LINES:
        found.append(f"{path}: {lines} lines; files stay below {MAX_FILE_LINES}")
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length >= MAX_FUNCTION_LINES:
                    found.append(
                        f"{path}:{node.lineno}: {node.name} has {length} lines; functions stay below "
                        f"{MAX_FUNCTION_LINES}"
                    )
    return found


def registry_violations(text: str, path: Path) -> list[str]:
    """Lines that name the host of a package registry: where packages come from is the user's configuration."""
    return [
        f"{path}:{number}: names the registry {match.group()}"
        for number, line in enumerate(text.splitlines(), start=1)
        if (match := _REGISTRY.search(line))
    ]
