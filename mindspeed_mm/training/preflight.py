"""``python -m mindspeed_mm.training.preflight FLAGS``: checks a run before any rank is started.

Takes the launcher's flags, the number of ranks from the environment variable WORLD_SIZE and that on this machine from
LOCAL_WORLD_SIZE (default of both: 1). Where NNODES, NODE_RANK, MASTER_ADDR or MASTER_PORT are set, it checks them too.
Prints nothing and exits with 0, or prints one line and exits with 2. If MM_DEVICE_MEMORY_GB is set to a device's memory
in GiB, it warns of a run that is unlikely to fit. It imports torch only to look at an accelerator, so that it answers
at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mindspeed_mm.backend.device_check import check_device, needs_torch
from mindspeed_mm.checkpoint.best import check_best_files
from mindspeed_mm.checkpoint.save_directory import (
    check_new_stage,
    check_writable,
    disk_space_warning,
    earlier_run_warning,
)
from mindspeed_mm.config.job import JobConfig, check_data_files, check_weights, launched_world_size, load_job_config
from mindspeed_mm.config.tools_config import ToolsConfig
from mindspeed_mm.config.trackers import check_tracker_packages
from mindspeed_mm.data import mixture
from mindspeed_mm.data.encoder import check_same_tokenizer, check_special_tokens
from mindspeed_mm.data.sampler import SampleStream
from mindspeed_mm.data.validate import validate_data
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_directory, shorten
from mindspeed_mm.interfaces.media import MediaSettings, PixelNorm
from mindspeed_mm.models.lora import LoraOptions
from mindspeed_mm.models.memory import Plan
from mindspeed_mm.models.parameter_rules import compile_rules
from mindspeed_mm.models.spec import ModelConfig, ModelSpec, spec_of
from mindspeed_mm.tools.memory.advice import Device
from mindspeed_mm.tools.memory.plan import Run, checkpoint_bytes
from mindspeed_mm.tools.memory.report import GIB, RESERVE_GB, warning
from mindspeed_mm.training import launch_environment as environment
from mindspeed_mm.training.resume_checks import changed_settings_warning, check_base_is_kept, check_start

# a socket's path may have 107 bytes; Python's is DIRECTORY/pymp-12345678/listener-12345678
_LONGEST_TEMPORARY_DIRECTORY = 107 - len("/pymp-12345678/listener-12345678")


def preflight(job: JobConfig) -> None:
    """Check the results of the guide's earlier steps, in their order, and that they fit the configuration.

    Raises:
        UserError: naming the file or option that is missing or wrong, and the step of the guide that makes it.
    """
    check_weights(job)
    no_tensorboard = check_tracker_packages(job.args)
    spec = spec_of(job.model.init_from_hf_path)
    model_config = spec.read_config(job.model.init_from_hf_path)
    world_size = launched_world_size()
    job.check_model(spec.facts(model_config), world_size=world_size)
    rules = compile_rules(job.args, job.model, parts=spec.parts)
    settings = spec.parameter_settings(
        model_config, rules, lora=LoraOptions.from_args(job.args), muon=job.args.muon
    )
    if job.args.lora_init_from is not None:
        from mindspeed_mm.training.lora import LoraRun  # imports torch

        LoraRun.of(job.args, spec, model_config, rules).open(job.args.lora_init_from)
    if job.args.load is not None:
        check_start(job.args, spec, model_config, settings, model_directory=job.model.init_from_hf_path)
    elif job.args.save_trainable_only:
        check_base_is_kept(job.args, Path(job.model.init_from_hf_path))
    if job.args.save is not None:
        check_writable(Path(job.args.save))
        if job.args.keep_best:
            check_best_files(Path(job.args.save))
        if job.args.finetune:
            check_new_stage(job.args.save, job.args.load)
    basic = job.data.dataset_param.basic_parameters
    if basic.cache_dir and not basic.streaming:
        check_writable(Path(basic.cache_dir), name="cache_dir")
    for field, path in tool_directories(job.tools).items():
        check_writable(Path(path), name=f"--mm-tool: {field}")
    check_temporary_directory(job.args.num_workers)
    check_data_files(job)
    tokenizer = Path(job.data.dataset_param.preprocess_parameters.model_name_or_path)
    check_special_tokens(tokenizer, spec.special_token_ids(model_config), model=Path(job.model.init_from_hf_path))
    other_tokenizer = check_same_tokenizer(tokenizer, Path(job.model.init_from_hf_path))
    media = spec.read_media_settings(job.data, model_config)
    check_first_batch(job, records=validate_data(job.data, spec))
    run = Run(
        args=job.args, model=job.model, fsdp=job.fsdp, model_config=model_config, world_size=world_size,
        pixels=job.data.dataset_param.preprocess_parameters.image_max_pixels,
    )
    for line in (
        no_tensorboard,
        other_tokenizer,
        other_normalisation(job, spec, model_config, media),
        *environment.unknown_variables(os.environ),
        *tools_without_effect(job, world_size=world_size),
        *spec.ignored_settings(Path(job.model.init_from_hf_path), job.data),
        memory_warning(run, os.environ.get("MM_DEVICE_MEMORY_GB", "")),
        checkpoint_warning(job, run.plan),
        earlier_run_warning(job.args.save, job.args.load),
        changed_settings_warning(job, {"template": spec.chat_templates[0]}),
        environment.host_memory_warning(launched_local_ranks()),
        environment.shared_memory_warning(
            local_ranks=launched_local_ranks(),
            num_workers=job.args.num_workers,
            micro_batch_size=job.args.micro_batch_size,
            image_pixels=job.data.dataset_param.preprocess_parameters.image_max_pixels,
        ),
    ):
        if line is not None:
            _warn(environment.with_variables(job.explain(line), os.environ))


def tool_directories(tools: ToolsConfig) -> dict[str, str]:
    """Field of tools.json -> directory that an enabled tool writes to."""
    profile, memory = tools.profile, tools.memory_profile
    directories = {}
    if profile.enable and profile.profile_type == "static":
        directories["profile.static_param.save_path"] = profile.static_param.save_path
    elif profile.enable:
        directories["profile.dynamic_param.config_path"] = profile.dynamic_param.config_path
    if memory.enable:
        directories["memory_profile.save_path"] = memory.save_path
    return directories


def tools_without_effect(job: JobConfig, *, world_size: int) -> list[str]:
    """Lines about enabled tools that would record nothing: no such rank, or steps behind the run's end."""
    profile, memory, steps = job.tools.profile, job.tools.memory_profile, job.args.train_iters
    profiles = profile.enable and profile.profile_type == "static"
    lines = []
    for name, enabled, ranks, first in (
        ("profile", profiles, profile.ranks, profile.static_param.start_step),
        ("memory_profile", memory.enable, memory.dump_ranks, memory.start_step),
    ):
        nothing = f"--mm-tool: {name} records nothing"
        if enabled and not any(rank == -1 or 0 <= rank < world_size for rank in ranks):
            lines.append(f"{nothing}: its ranks are {ranks}, and the run's 0 to {world_size - 1}")
        elif enabled and steps is not None and first > steps:
            lines.append(f"{nothing}: its start_step is {first}, and the run's last {steps}")
    return lines


def other_normalisation(
    job: JobConfig, spec: ModelSpec, model_config: ModelConfig, media: MediaSettings | None
) -> str | None:
    """A line if the processor beside the model's weights normalises pixels in another way than the training's."""
    preprocess = job.data.dataset_param.preprocess_parameters
    source = job.model.init_from_hf_path
    if media is None or os.path.realpath(source) == os.path.realpath(preprocess.model_name_or_path):
        return None
    beside = job.data.replace(dataset_param=job.data.dataset_param.replace(
        preprocess_parameters=preprocess.replace(model_name_or_path=source)
    ))
    try:
        theirs = spec.read_media_settings(beside, model_config)
    except UserError:  # it has none, or one that the training does not read
        return None
    if theirs is None or theirs.norm == media.norm:
        return None
    return (
        f"the image processor in {preprocess.model_name_or_path} (model_name_or_path) normalizes pixels with "
        f"{_described(media.norm)}, that in {source} (init_from_hf_path) by {_described(theirs.norm)}"
    )


def _described(norm: PixelNorm) -> str:
    return f"mean {list(norm.mean)}, std {list(norm.std)}, factor {norm.rescale_factor:.6g}"


def _warn(line: str) -> None:
    """Say it once on this machine, and leave it for the launcher to begin the log with."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {line}", file=sys.stderr)
        if directory := os.environ.get(environment.RUN_STATE):
            with contextlib.suppress(OSError), open(Path(directory, "warnings"), "a", encoding="utf-8") as file:
                file.write(f" warning: {line}\n")


def launched_local_ranks() -> int:
    """Number of ranks on this machine that torchrun or the launcher gives in LOCAL_WORLD_SIZE; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_first_batch(job: JobConfig, *, records: Sequence[int]) -> None:
    """Check that the records fill a global batch, as far as it can be known before they are tokenized.

    Args:
        job: the run.
        records: of each data set, as :func:`validate_data` counts: of streamed files the first rows only.

    Raises:
        UserError: as training would raise it, see :class:`SampleStream` and :mod:`mixture`.
    """
    basic, options = job.data.dataset_param.basic_parameters, job.data.dataloader_param
    if basic.streaming:
        return
    rate = basic.val_rate or 0.0
    kept = [count - round(count * rate) for count in records]
    if not all(kept):
        raise UserError(f"val_rate {rate} leaves nothing of {min(records)} samples to train on; lower it")
    if not isinstance(basic.dataset, str):
        parts = mixture.parts_of(job.data, kept)
        try:
            kept = mixture.samples_per_epoch(parts, all_exhausted=basic.stopping_strategy == "all_exhausted")
        except UserError as error:
            raise UserError(f"{job.args.mm_data}: {error}") from None
    if basic.packing:  # a step holds packs, whose number only the lengths of the samples tell
        return
    assert job.args.global_batch_size is not None, "load_job_config fills it in"
    SampleStream((sum(kept),), job.args.global_batch_size, job.args.seed, options.shuffle, options.drop_last)


def check_temporary_directory(num_workers: int) -> None:
    """Check that data workers can pass tensors through sockets there; otherwise training would hang.

    Raises:
        UserError: if TMPDIR is no directory, or the sockets' paths would be longer than the system allows.
    """
    named = os.environ.get("TMPDIR")
    if named and not is_directory(named):  # Python would take another, and the launcher none
        raise UserError(f"TMPDIR {shorten(named)} is not a directory; set it to one, or unset it")
    directory = tempfile.gettempdir()
    length = len(os.fsencode(directory))
    if num_workers and length > _LONGEST_TEMPORARY_DIRECTORY:
        raise UserError(
            f"TMPDIR {directory} has {length} characters, and the data workers' sockets there may have "
            f"{_LONGEST_TEMPORARY_DIRECTORY}; set TMPDIR to a shorter path, or --num-workers 0"
        )


def memory_warning(run: Run, device_memory: str) -> str | None:
    """A line if samples of the full length are unlikely to fit into a device of ``device_memory`` GiB; empty: no check.

    Raises:
        UserError: see :func:`launch_environment.device_memory`.
    """
    size = environment.device_memory(device_memory)
    if size is None:
        return None
    return warning(run, Device(size=round(size * GIB), reserve=round(RESERVE_GB * GIB)))


def checkpoint_warning(job: JobConfig, plan: Plan) -> str | None:
    """A line if the run's checkpoints do not fit on the disk."""
    args = job.args
    if args.save is None:
        return None
    return disk_space_warning(
        Path(args.save),
        nbytes=checkpoint_bytes(plan, moments=not args.no_save_optim, trainable_only=args.save_trainable_only),
        count=-(-args.train_iters // args.save_interval) if args.train_iters and args.save_interval else 1,
        keep_last=args.keep_last,
        keep_best=args.keep_best,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and return the exit status."""
    job = None
    try:
        environment.check_numbers(os.environ)
        job = load_job_config(argv)
        environment.check_rendezvous(os.environ)
        device_last = needs_torch(job.args.device)  # whose import takes seconds
        if not device_last:
            check_device(job.args.device, local_ranks=launched_local_ranks())
        preflight(job)
        if device_last:
            check_device(job.args.device, local_ranks=launched_local_ranks())
    except UserError as error:
        message = str(error) if job is None else job.explain(str(error))
        print(f"error: {environment.with_variables(message, os.environ)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
