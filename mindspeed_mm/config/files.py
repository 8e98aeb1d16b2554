"""Reading JSON and YAML files into typed models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspeed_mm.config.schema import Model, validate_config
from mindspeed_mm.errors import UserError


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
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{flag} {path} does not exist; correct the path, or write the file (step 4 of the guide)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} cannot be read: {error}") from error
    content = _parse_yaml(text, path) if path.suffix in (".yaml", ".yml") else _parse_json(text, path)
    if content is None and allow_empty:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must hold an object with named fields")
    return validate_config(content, model, source=str(path))


def _parse_json(text: str, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{path}: {key} occurs twice in one object; remove one")
        return dict(pairs)

    def no_constant(name: str) -> Any:
        raise UserError(f"{path}: {name} is not a JSON value; write a finite number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno} is not valid JSON: {error.msg}"
        ) from error


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml  # here, since only one of the files is YAML

    class UniqueLoader(yaml.SafeLoader):
        """PyYAML keeps the last of two equal keys and says nothing."""

    def unique(loader: UniqueLoader, node: yaml.MappingNode) -> dict[str, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"{path}, line {line}: {key_node.value} occurs twice; remove one")
            seen.add(key_node.value)
        return loader.construct_mapping(node, deep=True)

    UniqueLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, unique)
    try:
        return yaml.load(text, Loader=UniqueLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from error
