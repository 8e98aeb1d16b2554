"""The configuration of one training run: the flags and the four files they name, as one tree."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.config.checks import (
    ModelFacts,
    check_evaluation,
    check_flags,
    check_frozen_dtype,
    check_model,
    check_muon,
    check_parallel,
    join_expert_sizes,
    join_recompute,
    loss_mode,
    resolve_lora,
    router_aux_loss_coef,
)
from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.files import load_config
from mindspeed_mm.config.flags import TrainingArgs, option_name
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.config.model_options import LossMode, ModelOptions
from mindspeed_mm.config.recipe_file import read_recipe, split_command_line, unused_sections, with_keys
from mindspeed_mm.config.schema import NO_EFFECT, Model, StrictModel, effective, walk
from mindspeed_mm.config.tools_config import ToolsConfig
from mindspeed_mm.config.trackers import check_tracker_flags
from mindspeed_mm.errors import UserError


class JobConfig(StrictModel):
    """Flags and files as one tree, checked against each other as far as that needs neither model nor device."""

    args: TrainingArgs
    data: DataConfig
    model: ModelOptions
    fsdp: FSDPConfig = FSDPConfig()
    tools: ToolsConfig = ToolsConfig()
    recipe_keys: dict[str, str] = effective({}, "flag's field name -> file and key of a recipe that sets it")
    recipe_notes: list[str] = effective([], "sentences on what the keys of a v1 recipe became")

    @property
    def loss_mode(self) -> LossMode:
        """Which mean of the token losses is minimised."""
        return loss_mode(self.args, self.model)

    @property
    def router_aux_loss_coef(self) -> float:
        """Coefficient of the routers' load-balancing loss; 0 for none."""
        return router_aux_loss_coef(self.args, self.model)

    def check_model(self, facts: ModelFacts, *, world_size: int) -> None:
        """Check flags and files against the model; see :func:`checks.check_model`."""
        check_model(self.args, self.fsdp, self.model, facts, world_size=world_size)

    def describe_ignored(self) -> list[str]:
        """One sentence for each flag or group of fields that was given and has no effect, with the reason.

        Of a v1 recipe first what its keys became.
        """
        files = [(self.args.mm_data, self.data), (self.args.mm_model, self.model)]
        files += [(self.args.fsdp2_config_path, self.fsdp), (self.args.mm_tool, self.tools)]
        sentences = [
            f"{self.recipe_keys.get(use.path, option_name(use.path))}: {use.info.description}"
            for use in walk(self.args) if use.role == NO_EFFECT and use.given
        ]
        style = self.args.weight_decay_incr_style
        if style != "constant" and "weight_decay" in self.args.given:
            name = self.recipe_keys.get("weight_decay", "--weight-decay")
            sentences.append(f"{name}: --weight-decay-incr-style {style} goes from --start-weight-decay to "
                             "--end-weight-decay")
        for path, config in files:
            groups: dict[tuple[str, str], list[str]] = {}
            for use in walk(config):
                if use.role == NO_EFFECT and use.given:
                    parent, _, name = use.path.rpartition(".")
                    groups.setdefault((parent, str(use.info.description)), []).append(name)
            for (parent, reason), names in groups.items():
                sentences.append(f"{path}, {f'in {parent}, ' if parent else ''}{', '.join(names)}: {reason}")
        if self.model.weight_decay_scaling_plan and not any(self.args.weight_decay_range):
            sentences.append(f"{self.args.mm_model}, weight_decay_scaling_plan: --weight-decay is 0")
        basic = self.data.dataset_param.basic_parameters
        if basic.val_max_samples is not None and not (basic.val_dataset or basic.val_rate):
            sentences.append(f"{self.args.mm_data}, val_max_samples: there is neither val_dataset nor val_rate")
        sentences += unused_sections(self.args, self.recipe_keys)
        return self.recipe_notes + [f"accepted without effect: {sentence}" for sentence in sentences]

    def explain(self, message: str) -> str:
        """``message``, and which keys of a recipe set the flags that it names."""
        return with_keys(message, self.recipe_keys)

    def checkpoint_metadata(self) -> dict[str, Any]:
        """What a checkpoint's manifest records of the run, as plain JSON values."""
        return {
            "flags": {option_name(name): getattr(self.args, name) for name in sorted(self.args.given)},
            "data": self.data.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "fsdp2": self.fsdp.model_dump(mode="json"),
        }


@dataclasses.dataclass(frozen=True)
class JobFiles:
    """Flags and files, but for the data file, which estimates do without.

    Attributes:
        args: the flags, with what the files imply for them.
        model: the model file.
        fsdp: the FSDP2 file.
        tools: the tools file.
        sections: value of a flag that names a file -> the section of a recipe that is meant.
        keys: flag's field name -> file and key of a recipe that sets it.
        notes: sentences on what the keys of a v1 recipe became.
    """

    args: TrainingArgs
    model: ModelOptions
    fsdp: FSDPConfig
    tools: ToolsConfig
    sections: Mapping[str, StrictModel]
    keys: dict[str, str]
    notes: list[str]

    @property
    def data(self) -> DataConfig:
        """The data file.

        Raises:
            UserError: for the first mistake in it.
        """
        return _load(self.args, "mm_data", DataConfig, self.sections)


def read_job_files(
    argv: Sequence[str] | None = None, *, world_size: int, defaults: Mapping[str, str] | None = None
) -> JobFiles:
    """Parse ``argv``, read the files or the recipe, and check what needs neither data, model nor device.

    Args:
        argv: the flags (default: the process's own), and a recipe file with overrides (:mod:`recipe_file`).
        world_size: number of ranks.
        defaults: field name -> value of flags that neither gives.

    Raises:
        UserError: for the first mistake.
    """
    path, overrides, words = split_command_line(sys.argv[1:] if argv is None else argv)
    given = {word.partition("=")[0] for word in words}
    if path is None or {"-h", "--help"} & given:
        return _read_files(words, world_size, _of_one_length({}, defaults or {}, given), {}, {}, [])
    recipe = read_recipe(path, overrides, world_size=world_size)
    keys = recipe.without(given)
    try:
        flags, notes = _of_one_length(recipe.flags, defaults or {}, given), recipe.notes
        # as in MindSpeed-MM's files of v1
        if notes and "save" not in flags and "--save" not in given and flags.pop("save_interval", None):
            notes = [*notes, f"accepted without effect: {keys['save_interval']}: there is no save"]
        return _read_files(words, world_size, flags, recipe.sections, keys, notes)
    except UserError as error:
        raise UserError(with_keys(str(error), keys)) from None


def _of_one_length(file: Mapping[str, str], defaults: Mapping[str, str], given: set[str]) -> dict[str, str]:
    """``defaults`` and ``file``, without a length of the run where one that wins over it counts in other units."""
    flags = {**defaults, **file}
    for one, other in (("train_iters", "train_epochs"), ("train_epochs", "train_iters")):
        if option_name(one) in given or (one in file and other not in file):
            flags.pop(other, None)
    return flags


def _read_files(
    words: Sequence[str], world_size: int, defaults: Mapping[str, str], sections: Mapping[str, StrictModel],
    keys: dict[str, str], notes: list[str],
) -> JobFiles:
    args = parse_args(words, defaults=defaults)
    check_flags(args)
    check_tracker_flags(args)
    fsdp, tools = FSDPConfig(), ToolsConfig()
    if args.fsdp2_config_path is not None:
        fsdp = _load(args, "fsdp2_config_path", FSDPConfig, sections)
    if args.mm_tool is not None:
        tools = _load(args, "mm_tool", ToolsConfig, sections)
    model = _load(args, "mm_model", ModelOptions, sections)
    args = resolve_lora(args, model, fsdp)
    check_frozen_dtype(args, fsdp)
    check_muon(args, fsdp)
    args = join_recompute(join_expert_sizes(args, fsdp), model, fsdp)
    args = args.replace(global_batch_size=check_parallel(args, fsdp, world_size=world_size))
    return JobFiles(args, model, fsdp, tools, sections, keys, notes)


def _load(args: TrainingArgs, flag: str, model: type[Model], sections: Mapping[str, StrictModel]) -> Model:
    """The file that a flag names, or the section of a recipe that takes its place."""
    path = getattr(args, flag)
    if isinstance(section := sections.get(path), model):
        return section
    return load_config(path, model, flag=option_name(flag), allow_empty=model is FSDPConfig)


def load_job_config(argv: Sequence[str] | None = None, *, world_size: int | None = None) -> JobConfig:
    """Parse ``argv`` (default: the process's own), read the files, and check what needs neither model nor device.

    Args:
        argv: the flags, and a recipe file with overrides.
        world_size: number of ranks; by default :func:`launched_world_size`.

    Raises:
        UserError: for the first mistake.
    """
    files = read_job_files(argv, world_size=launched_world_size() if world_size is None else world_size)
    job = JobConfig(
        args=files.args, data=files.data, model=files.model, fsdp=files.fsdp, tools=files.tools,
        recipe_keys=files.keys, recipe_notes=files.notes,
    )
    try:  # properties that join a flag with a field of a file: raise here where the two contradict each other
        _ = job.loss_mode, job.router_aux_loss_coef
        check_evaluation(job.args, job.data)
    except UserError as error:
        raise UserError(job.explain(str(error))) from None
    return job


def launched_world_size() -> int:
    """Number of ranks that torchrun or the launcher gives in WORLD_SIZE; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_weights(job: JobConfig) -> None:
    """Check that the Hugging Face directories exist, with weights if ``--load`` names no checkpoint.

    Raises:
        UserError: naming the missing file, the option that names it, and the step of the guide that makes it.
    """
    model, preprocess = job.model, job.data.dataset_param.preprocess_parameters
    step = "download the model first (step 2 of the guide), or correct the path"
    directories = [
        (model.init_from_hf_path, f"init_from_hf_path in {job.args.mm_model}"),
        (preprocess.model_name_or_path, f"model_name_or_path in {job.args.mm_data}"),
    ]
    for directory, named_by in directories:
        if not Path(directory).is_dir():
            raise UserError(f"{directory} ({named_by}) does not exist; {step}")
    for (directory, named_by), pattern in zip(directories, ("config.json", "tokenizer*"), strict=True):
        if not any(Path(directory).glob(pattern)):
            raise UserError(f"{directory} ({named_by}) has no {pattern}; {step}")
    from_hf = job.args.load is None and not job.args.random_init
    if from_hf and not any(Path(model.init_from_hf_path).glob("*.safetensors")):
        raise UserError(f"{model.init_from_hf_path} ({directories[0][1]}) has no *.safetensors; {step}")


def check_data_files(job: JobConfig) -> None:
    """Check that the data files and their directory exist.

    Raises:
        UserError: naming the missing file, the option that names it, and what to do.
    """
    basic = job.data.dataset_param.basic_parameters
    remedy = "correct the path, or put the data there (docs/own_data.md: your own; examples/qwen3vl/README.md: LLaVA's)"
    for field, files in (("dataset", basic.dataset_files), ("val_dataset", basic.val_dataset_files)):
        for name in files:
            if not Path(name).is_file() and not Path(name).is_dir():  # what a directory holds is checked by its reader
                place = "" if os.path.isabs(name) else f" in {os.getcwd()}"
                raise UserError(f"{name} ({field} in {job.args.mm_data}) does not exist{place}; {remedy}")
    for dataset in (*job.data.train_datasets, *job.data.val_datasets):
        directory = dataset.config.dataset_param.basic_parameters.dataset_dir
        # of a data set with a name that has no images, nobody need make the default's directory
        default = type(basic).model_fields["dataset_dir"].default
        needed = not dataset.name or directory != default or "dataset_dir" in basic.model_fields_set
        if needed and not Path(directory).is_dir():
            of_one = f" of {dataset.name}" if directory != basic.dataset_dir else ""
            raise UserError(f"{directory} (dataset_dir{of_one} in {job.args.mm_data}) does not exist; {remedy}")
