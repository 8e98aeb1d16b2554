"""Reading JSON and YAML files into typed models, with errors a user can act on."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mindspeed_mm.config.fields import REFUSED, StrictModel, walk
from mindspeed_mm.errors import UserError

Model = TypeVar("Model", bound=StrictModel)


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


def validate_config(content: dict[str, Any], model: type[Model], *, source: str) -> Model:
    """Check parsed ``content`` against ``model``; ``source`` names it in messages.

    Raises:
        UserError: for the first mistake, telling how many more there are.
    """
    try:
        config = model.model_validate(content)
    except ValidationError as error:
        messages = [_explain(item, model) for item in error.errors()]
        more = f" (mistakes in this file: {len(messages)})" if len(messages) > 1 else ""
        raise UserError(f"{source}: {messages[0]}{more}") from None
    for use in walk(config):
        if use.role == REFUSED and use.value != use.info.default:
            raise UserError(
                f"{source}: {use.path} is {_show(use.value)}, but {use.info.description}; "
                f"set it to {_show(use.info.default)} or leave it out"
            )
    return config


def nearest(word: str, known: list[str]) -> str | None:
    """The entry of ``known`` that ``word`` was probably meant to be, or None."""
    matches = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _parse_json(text: str, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{path}: {key} stands twice in one object; remove one")
        return dict(pairs)

    def no_constant(name: str) -> Any:
        raise UserError(f"{path}: {name} is no JSON value; write a finite number")

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
                raise UserError(f"{path}, line {line}: {key_node.value} stands twice; remove one")
            seen.add(key_node.value)
        return loader.construct_mapping(node, deep=True)

    UniqueLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, unique)
    try:
        return yaml.load(text, Loader=UniqueLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _explain(item: Any, model: type[BaseModel]) -> str:
    """One pydantic error as a phrase: the dotted path, the value found and what is allowed."""
    names, owner = _resolve(item["loc"], model)
    path = ".".join(names) or "the file"
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(names, owner, model)
    if kind == "missing":
        return f"{path} is missing; add it"
    if kind == "value_error":
        message = str(context["error"])
        return f"{path} is {_show(item['input'])}; it {message}" if message.startswith("must") else f"{path}: {message}"
    if kind == "literal_error":
        return f"{path} is {_show(item['input'])}; choose {context['expected'].replace(chr(39), '')}"
    expected = {
        "string_type": "a string", "int_type": "a whole number", "int_from_float": "a whole number",
        "float_type": "a number", "bool_type": "true or false", "list_type": "a list",
        "model_type": "an object with named fields", "model_attributes_type": "an object with named fields",
        "greater_than": f"greater than {context.get('gt')}", "less_than": f"less than {context.get('lt')}",
        "greater_than_equal": f"at least {context.get('ge')}", "less_than_equal": f"at most {context.get('le')}",
    }.get(kind)
    wanted = f"it must be {expected}" if expected else item["msg"]
    return f"{path} is {_show(item['input'])}; {wanted}"


def _resolve(location: tuple[str | int, ...], model: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """Path of a pydantic location, and the model that its last key belongs to."""
    names: list[str] = []
    owner = model
    for depth, part in enumerate(location):
        names.append(str(part))
        info = owner.model_fields.get(str(part))
        kind = info.annotation if info else None
        if depth + 1 < len(location) and isinstance(kind, type) and issubclass(kind, BaseModel):
            owner = kind
    return names, owner


def _unknown_key(names: list[str], owner: type[BaseModel], root: type[BaseModel]) -> str:
    path, key = ".".join(names), names[-1]
    elsewhere = [other for other in _all_paths(root) if other.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"{path} is unknown here; did you mean {elsewhere[0]}?"
    guess = nearest(key, list(owner.model_fields))
    if guess:
        return f"{path} is unknown; did you mean {'.'.join([*names[:-1], guess])}?"
    return f"{path} is unknown; known here: {', '.join(owner.model_fields)}"


def _all_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, info in model.model_fields.items():
        paths.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            paths += _all_paths(info.annotation, f"{prefix}{name}.")
    return paths


def _show(value: Any) -> str:
    """A value as its JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
