"""Writes the tables of docs/configuration.md from the schema of the configuration files.

    python -m tests.tools.configuration_tables
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.config.schema import EFFECTIVE, NO_EFFECT, nested_model, role_of
from mindspeed_mm.config.tools_config import ToolsConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
MARK = "<!-- The rest is written by: python -m tests.tools.configuration_tables -->\n"
FILES = (
    ("Data file: `--mm-data`", DataConfig),
    ("Model file: `--mm-model`", ModelOptions),
    ("FSDP2 file: `--fsdp2-config-path`", FSDPConfig),
    ("Tools file: `--mm-tool`", ToolsConfig),
)


def fields(
    model: type[BaseModel], parent: str = "", seen: set[type[BaseModel]] | None = None
) -> Iterator[tuple[str, str, FieldInfo]]:
    """(path of the section, name, declaration) of every field, sections after a section's own fields.

    A section that stands in several places is given once, in the first.
    """
    seen = set() if seen is None else seen
    sections = []
    for name, info in model.model_fields.items():
        inner = nested_model(info)
        if inner is not info.annotation:
            yield parent, name, info
        if inner is not None and inner not in seen:
            seen.add(inner)
            sections.append((name if inner is info.annotation else f"{name}[]", inner))
    for name, inner in sections:
        yield from fields(inner, f"{parent}.{name}" if parent else name, seen)


def row(name: str, info: FieldInfo) -> str:
    """One line of a table."""
    default = "required" if info.is_required() else f"`{json.dumps(info.default)}`"
    role = {EFFECTIVE: "", NO_EFFECT: "no effect: "}.get(role_of(info), "only the default is accepted: ")
    return f"| `{name}` | {default} | {role}{info.description} |"


def tables() -> str:
    """The page after the mark."""
    lines = []
    for title, model in FILES:
        lines += ["", f"## {title}"]
        section = None
        for parent, name, info in fields(model):
            if parent != section:
                section = parent
                heading = [f"### `{parent}`", ""] if parent else []
                lines += ["", *heading, "| field | default | meaning |", "| --- | --- | --- |"]
            lines.append(row(name, info))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite the page."""
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(head + MARK + tables(), encoding="utf-8")


if __name__ == "__main__":
    main()
