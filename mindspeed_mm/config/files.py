"""Reading JSON and YAML files into typed models."""

from __future__ import annotations

from pathlib import Path

from mindspeed_mm.config.schema import Model, validate_config
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import kind_of, parse_json, parse_yaml, read_text


def load_config(path: str | Path, model: type[Model], *, flag: str, allow_empty: bool = False) -> Model:
    """Read ``path`` (YAML where its name ends so, else JSON) into ``model``.

    Args:
        path: the file.
        model: what it must hold.
        flag: the launcher's flag that named the file, for the message where there is none.
        allow_empty: whether an empty file stands for all defaults.

    Raises:
        UserError: naming the file, the place in it, the value and what is allowed.
    """
    path = Path(path)
    text = read_text(path, name=flag, remedy="correct the path, or write the file (docs/configuration.md)")
    is_yaml = path.suffix in (".yaml", ".yml")
    content = parse_yaml(text, str(path)) if is_yaml else parse_json(text, str(path), strict=True)
    if content is None and allow_empty:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {kind_of(content)}; it must hold an object with named fields")
    return validate_config(content, model, source=str(path))
