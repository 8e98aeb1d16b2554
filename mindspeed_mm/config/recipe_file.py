"""A recipe in one YAML file, with the sections of MindSpeed-MM's: ``gpt_args``, ``data``, ``model`` and ``lora_args``.

``gpt_args`` and ``lora_args`` hold flags, with underscores in their names; the other sections hold what a file of its
own holds otherwise. ``section.key=value`` on the command line replaces a value of the file, and a flag wins over both.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.datasets import Attributes, DatasetEntry
from mindspeed_mm.config.flags import FileArgs, LoraArgs, TrainingArgs, option_name
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.config.recipe_v1 import V1_SECTIONS, is_v1, translate
from mindspeed_mm.config.schema import StrictModel, effective, nested_model, unknown_key, validate_config
from mindspeed_mm.config.tools_config import ToolsConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import kind_of, parse_yaml, read_text, shorten

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=", re.ASCII)
_NAMES = re.compile(r"(?<![\w.-])(--[a-z][a-z0-9-]*|[a-z]+(?:_[a-z]+)+)")
_PATH = re.compile(r"[a-z]\w*(?:\.\w+)+")
_SUFFIXES = (".yaml", ".yml")
_SECTIONS_ONLY = ("mm_data", "mm_model")
_PARTS = {"mm_data": "data", "mm_model": "model", "fsdp2_config_path": "fsdp2", "mm_tool": "tools"}
"""Flags that name a file -> the section that may hold its content instead."""


def _optional(info: FieldInfo) -> Any:
    """The declaration of a flag for pydantic's ``create_model``, as one that need not be given; null is not given."""
    kind: Any = typing.Union[info.annotation, None]  # noqa: UP007 - of a type that is known only now
    kind = Annotated[(kind, *info.metadata)] if info.metadata else kind
    default = None if info.is_required() else info.default
    return kind, Field(default, description=info.description, json_schema_extra=info.json_schema_extra)


GptArgs: Any = create_model(
    "GptArgs", __base__=StrictModel, __doc__="All flags but those that name the sections data and model.",
    **{name: _optional(info) for name, info in TrainingArgs.model_fields.items() if name not in _SECTIONS_ONLY},
)


class RecipeFile(StrictModel):
    """The whole file."""

    gpt_args: GptArgs
    lora_args: LoraArgs = LoraArgs()
    data: DataConfig
    model: ModelOptions
    fsdp2: FSDPConfig = FSDPConfig()
    tools: ToolsConfig = ToolsConfig()
    MM_TOOL_PATH: str | None = effective(None, "as gpt_args.mm_tool; null: no tools")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe file that has been read.

    Attributes:
        content: the file, with the overrides.
        flags: flag's field name -> value as on a command line. Where a section takes a file's place, it is the
            section's name in messages.
        keys: flag's field name -> file and key that set it.
        notes: of a v1 recipe, sentences on what its keys became.
    """

    content: RecipeFile
    flags: dict[str, str]
    keys: dict[str, str]
    notes: list[str]

    @property
    def sections(self) -> dict[str, StrictModel]:
        """Value in ``flags`` of a flag that names a file -> the section that takes the file's place."""
        return {
            self.flags[flag]: getattr(self.content, section)
            for flag, section in _PARTS.items() if section in self.content.model_fields_set
        }

    def without(self, options: Iterable[str]) -> dict[str, str]:
        """``keys`` but for flags on the command line, which replace the file's; a whole section is still named."""
        given = set(options)
        replaced = {flag for flag in self.keys if option_name(flag) in given}
        return {flag: key for flag, key in self.keys.items() if flag not in replaced or key == self.flags[flag]}


def split_command_line(argv: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """Recipe file, overrides and other words of a command line.

    The recipe is the first word that ends in ``.yaml`` and is not the value of a flag; without one there are no
    overrides.
    """
    recipe: str | None = None
    overrides: list[str] = []
    words: list[str] = []
    for index, word in enumerate(argv):
        of_flag = index > 0 and _takes_value(argv[index - 1])
        if not of_flag and recipe is None and word.endswith(_SUFFIXES) and not word.startswith("-"):
            recipe = word
        elif not of_flag and _OVERRIDE.match(word):
            overrides.append(word)
        else:
            words.append(word)
    return (recipe, overrides, words) if recipe is not None else (None, [], list(argv))


def read_recipe(path: str, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Recipe:
    """Read a recipe file, also one of v1.

    Args:
        path: the file.
        overrides: ``section.key=value``, the value in YAML.
        world_size: number of ranks, on which the global batch of v1 depends; None: it is not set.

    Raises:
        UserError: naming file and key, the value and what is allowed, or the nearest known key.
    """
    text = read_text(path, remedy="correct the path")
    content = parse_yaml(text, path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {kind_of(content)}; it must hold the sections gpt_args, data and model")
    known = RecipeFile.model_fields
    v1 = is_v1(content)
    variables = _anchored_keys(text) - (known.keys() | V1_SECTIONS if v1 else known.keys())
    content = {key: value for key, value in content.items() if key not in variables}
    for word in overrides:
        name, _, value = word.partition("=")
        names = name.split(".")
        if names[0] in variables:
            raise UserError(f"{shorten(word)}: {names[0]} holds an anchor of {path}; replace the keys that repeat it")
        if not v1:  # whose keys are checked when they are translated
            _check_path(names, word)
        content = _replaced(content, names, parse_yaml(value, word), word)
    source = f"{path} with {shorten(' '.join(overrides))}" if overrides else path
    moved: dict[str, str] = {}
    notes: list[str] = []
    if v1:
        content, moved, ignored = translate(content, source=source, sections=frozenset(known), world_size=world_size)
        notes = [f"{path}: {', '.join(f'{old} is {new}' for new, old in of_section)}"
                 for _, of_section in itertools.groupby(moved.items(), lambda pair: pair[1].partition(".")[0])]
        notes += [f"accepted without effect: {path}: {sentence}" for sentence in ignored]
    try:
        recipe = validate_config(content, RecipeFile, source=source)
    except UserError as error:
        raise UserError(_PATH.sub(lambda match: _as_written(match[0], moved), str(error))) from None
    return _as_flags(recipe, path, moved, notes)


def _as_written(path: str, moved: Mapping[str, str]) -> str:
    """A key of this project, or of an entry of a list that it holds, as the file names it."""
    for key, written in moved.items():
        if path == key or path.startswith(f"{key}."):
            return written + path[len(key):]
    return path


def with_keys(message: str, keys: Mapping[str, str]) -> str:
    """``message``, and which keys of the recipe set the flags that it names."""
    named = dict.fromkeys(name.removeprefix("--").replace("-", "_") for name in _NAMES.findall(message))
    said = [f"{keys[flag]} sets {option_name(flag)}" for flag in named if flag in keys and keys[flag] not in message]
    return f"{message} ({'; '.join(said)})" if said else message


def _takes_value(word: str) -> bool:
    info = TrainingArgs.model_fields.get(word.removeprefix("--").replace("-", "_"))
    return word.startswith("--") and info is not None and info.annotation is not bool


def _anchored_keys(text: str) -> set[str]:
    """Keys of the outermost mapping whose value has an anchor: they need not be sections.

    An object must be repeated by an alias: it may be a section whose name is misspelt.
    """
    import yaml

    depth, nodes, repeated = 0, [], set()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.NodeEvent) and depth == 1:
            anchor = None if isinstance(event, yaml.AliasEvent) else event.anchor
            nodes.append((getattr(event, "value", None), anchor, isinstance(event, yaml.ScalarEvent)))
        if isinstance(event, yaml.AliasEvent):
            repeated.add(event.anchor)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
    return {
        key for (key, _, _), (_, anchor, is_scalar) in zip(nodes[::2], nodes[1::2], strict=True)
        if anchor is not None and (is_scalar or anchor in repeated)
    }


def _check_path(names: Sequence[str], word: str) -> None:
    """Check the path of an override by the schema, so that a mistake in it is not looked for in the file."""
    owner: type[StrictModel] | None = RecipeFile
    chosen = False  # whether the next name is the user's: of a data set
    for index, name in enumerate(names):
        if chosen:
            chosen, owner = False, DatasetEntry
            continue
        if owner is None:
            raise UserError(f"{shorten(word)}: {'.'.join(names[:index])} has no keys; leave out .{name}")
        if name not in owner.model_fields:
            raise UserError(f"{shorten(word)}: {unknown_key(names[: index + 1], owner, RecipeFile)}")
        info = owner.model_fields[name]
        inner = nested_model(info)
        chosen = inner is DatasetEntry
        # a list of objects has an inner model, too, and no keys
        owner = inner if inner is info.annotation or inner is Attributes else None


def _replaced(content: Any, names: Sequence[str], value: Any, word: str) -> Any:
    """A copy of ``content`` with another value at a path; not in place, since aliases share their values."""
    if not names:
        return value
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{shorten(word)}: the file has {kind_of(content)} where {names[0]} would belong; correct it")
    content = content or {}
    return {**content, names[0]: _replaced(content.get(names[0]), names[1:], value, word)}


def _as_flags(content: RecipeFile, path: str, moved: Mapping[str, str], notes: list[str]) -> Recipe:
    flags: dict[str, str] = {}
    keys: dict[str, str] = {}

    def add(flag: str, key: str, value: Any) -> None:
        if value is None:
            return
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if flags.setdefault(flag, text) != text:
            raise UserError(f"{path}: {key} {shorten(text)} contradicts {keys[flag].rpartition(' ')[2]} "
                            f"{shorten(flags[flag])}; keep one of the two")
        keys.setdefault(flag, f"{path}: {moved.get(key, key)}")

    for section in ("gpt_args", "lora_args"):
        options = getattr(content, section)
        for name in type(options).model_fields:
            if name in options.model_fields_set:
                add(name, f"{section}.{name}", getattr(options, name))
    add("mm_tool", "MM_TOOL_PATH", content.MM_TOOL_PATH)
    for flag, section in _PARTS.items():
        if section in content.model_fields_set:
            if flag in flags:
                raise UserError(f"{keys[flag]} {shorten(flags[flag])} and the section {section} exclude each other; "
                                "keep one")
            flags[flag] = keys[flag] = f"{path}, section {section}"
    return Recipe(content, flags, keys, notes)


def unused_sections(args: TrainingArgs, keys: Mapping[str, str]) -> list[str]:
    """One sentence for each section of a recipe that a flag on the command line replaces."""
    return [
        f"{keys[name]}: {option_name(name)} {getattr(args, name)} replaces it"
        for name in FileArgs.model_fields if ", section " in keys.get(name, "") and getattr(args, name) != keys[name]
    ]
