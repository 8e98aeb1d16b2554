"""What a run needs of the machine and of the environment's variables, checked before any rank is started.

``python -m mindspeed_mm.training.launch_environment`` prints a free port, which the launcher uses where the user has
named none. Imports no torch.
"""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import available_memory

GIB = 1 << 30
_RANK_BYTES = GIB // 2  # an imported torch and the model's code, without any weight
_PREFETCHED_PER_WORKER = 4  # of data.loader, which imports torch
_BYTES_PER_PIXEL = 6  # three colours of a byte each, twice: a patch spans two frames, and an image is both of them
_RESOLVE_SECONDS = 10.0
RUN_STATE = "MM_RUN_STATE"
"""The variable by which the launchers name a directory for messages to them; without a launcher there is none."""
VARIABLES = {
    "--micro-batch-size": "MBS", "--global-batch-size": "MBS x GRAD_ACC_STEP x data-parallel ranks",
    "--seq-length": "SEQ_LEN", "--lr": "LR", "--min-lr": "MIN_LR", "--lr-warmup-fraction": "LR_WARMUP_FRACTION",
    "--weight-decay": "WEIGHT_DECAY", "--clip-grad": "CLIP_GRAD", "--adam-beta1": "ADAM_BETA1",
    "--adam-beta2": "ADAM_BETA2", "--train-iters": "TRAIN_ITERS",
    "--train-epochs": "TRAIN_EPOCHS", "--seed": "SEED", "--num-workers": "NUM_WORKERS",
    "--expert-model-parallel-size": "EP", "--context-parallel-size": "CP", "--tensor-model-parallel-size": "TP",
    "--pipeline-model-parallel-size": "PP", "--mm-data": "MM_DATA", "--mm-model": "MM_MODEL", "--mm-tool": "MM_TOOL",
    "--fsdp2-config-path": "FSDP2_PATH", "--load": "LOAD_PATH", "--save": "SAVE_PATH",
    "--save-interval": "SAVE_INTERVAL", "--eval-interval": "EVAL_INTERVAL", "--eval-iters": "EVAL_ITERS",
    "--log-interval": "LOG_INTERVAL", "--lora-target-modules": "LORA_TARGETS", "--lora-r": "LORA_R",
    "--lora-alpha": "LORA_ALPHA", "--lora-expert-r": "LORA_EXPERT_R",
}
"""Flags -> the launchers' variables that they are set by."""
_MORE_VARIABLES = (
    "NPUS_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS", "GRAD_ACC_STEP", "LOSS_ARGS",
    "RECOMPUTE_ARGS", "CKPT_ARGS", "MM_RECIPE", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
)
_OTHER_NAMES = {  # of other launchers
    "MICRO_BATCH_SIZE": "MBS", "BATCH_SIZE": "MBS", "GLOBAL_BATCH_SIZE": "GRAD_ACC_STEP", "GBS": "GRAD_ACC_STEP",
    "GRADIENT_ACCUMULATION_STEPS": "GRAD_ACC_STEP", "SAVE_DIR": "SAVE_PATH", "OUTPUT_DIR": "SAVE_PATH",
    "LOAD_DIR": "LOAD_PATH", "CKPT_LOAD_DIR": "LOAD_PATH", "CKPT_SAVE_DIR": "SAVE_PATH", "SEQ_LENGTH": "SEQ_LEN",
    "MAX_LENGTH": "SEQ_LEN", "LEARNING_RATE": "LR", "MAX_STEPS": "TRAIN_ITERS", "NPROC_PER_NODE": "NPUS_PER_NODE",
    "GPUS_PER_NODE": "NPUS_PER_NODE", "LORA_RANK": "LORA_R", "LORA_TARGET_MODULES": "LORA_TARGETS",
}
_NAMES = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]*|[a-z]+(?:_[a-z]+)+)(?![\w-])")


def with_variables(message: str, environment: Mapping[str, str]) -> str:
    """``message``, and under a launcher which of its variables set the flags that the message names.

    Not of flags of which it already says what sets them: a recipe's keys.
    """
    if RUN_STATE not in environment:
        return message
    named = dict.fromkeys("--" + name.removeprefix("--").replace("_", "-") for name in _NAMES.findall(message))
    unsaid = [f"{VARIABLES[flag]} sets {flag}" for flag in named
              if flag in VARIABLES and not re.search(rf" sets {flag}(?![\w-])", message)
              and not re.search(rf"\b{VARIABLES[flag].partition(' ')[0]}\b", message)]
    return f"{message} ({', '.join(unsaid)})" if unsaid else message


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Lines about variables whose names resemble the launchers', and which nothing reads; none without a launcher."""
    if RUN_STATE not in environment:
        return []
    known = [*(name for name in VARIABLES.values() if " " not in name), *_MORE_VARIABLES]
    lines = []
    for name in environment:
        if name in known or not name.isupper():
            continue
        guess = _OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.86)), None)
        if guess is not None and len(name) > 4:
            lines.append(f"{name} is set but not read; did you mean {guess}?")
    return lines


def check_numbers(variables: Mapping[str, str]) -> None:
    """Check the variables that hold numbers and that libraries read without a readable error.

    Raises:
        UserError: naming the variable and its value.
    """
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "NUMBA_NUM_THREADS"):
        if name in variables:
            _whole(variables, name, 1, 999_999)
    threads = variables.get("OMP_NUM_THREADS", "")
    if threads and not re.fullmatch(r"[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", threads):
        raise UserError(f"OMP_NUM_THREADS is {threads!r}; it must be a whole number of at least 1, or unset")
    device_memory(variables.get("MM_DEVICE_MEMORY_GB", ""))


def device_memory(value: str) -> float | None:
    """MM_DEVICE_MEMORY_GB as a number of GiB; None if it is empty.

    Raises:
        UserError: if ``value`` is not a finite number above 0.
    """
    if not value:
        return None
    try:
        size = float(value)
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and size > 0):
        raise UserError(f"MM_DEVICE_MEMORY_GB is {value!r}; it must be a number of GiB above 0, or empty")
    return size


def check_rendezvous(variables: Mapping[str, str]) -> None:
    """Check where the ranks meet: NODE_RANK, MASTER_ADDR, and MASTER_PORT, which must be free on the first machine.

    A variable that is not there, or is empty, is not checked.

    Raises:
        UserError: naming the variable, its value and the remedy.
    """
    given = {name: value for name, value in variables.items() if value}
    nodes = _whole(given, "NNODES", 1, 999_999) if "NNODES" in given else 1
    node = _whole(given, "NODE_RANK", 0, nodes - 1, why=f" with NNODES={nodes}") if "NODE_RANK" in given else 0
    port = _whole(given, "MASTER_PORT", 1, 65535) if "MASTER_PORT" in given else None
    if "MASTER_ADDR" in given:
        check_address(given["MASTER_ADDR"])
    if port is not None and node == 0 and (reason := why_unusable(port)):
        raise UserError(f"port {port} {reason} on this machine; set MASTER_PORT to another")


def check_address(address: str, *, seconds: float = _RESOLVE_SECONDS) -> None:
    """Check that a name server, or /etc/hosts, knows MASTER_ADDR.

    Raises:
        UserError: if it does not, or gives no answer within ``seconds``.
    """
    outcome: list[str | None] = []

    def resolve() -> None:
        try:
            socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            outcome.append(getattr(error, "strerror", None) or str(error))
        else:
            outcome.append(None)

    # the resolver has no time limit of its own; the program may end while such a thread still waits
    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(seconds)
    reason = outcome[0] if outcome else f"no answer within {seconds:g} s"
    if reason is not None:
        raise UserError(
            f"MASTER_ADDR {address!r} has no address ({reason}); set it to the name or address of the machine with "
            "NODE_RANK=0"
        )


def why_unusable(port: int) -> str | None:
    """Why torchrun's store could not listen on ``port``; None if it could."""
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):  # noqa: S104 - as the store does
        try:
            server = socket.socket(family, socket.SOCK_STREAM)
        except OSError:
            continue  # without IPv6 the store takes IPv4
        with server:
            # without this option a port would seem taken for a minute after a run that used it
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                server.bind((address, port))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    continue
                return "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            return None
    return None


def free_port() -> int:
    """A free port of the system's choice, and so another for each of several runs that start at once."""
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])


def host_memory_warning(local_ranks: int) -> str | None:
    """A line if the ranks' processes alone, without a model, are unlikely to fit into this machine's memory."""
    available, need = available_memory(), local_ranks * _RANK_BYTES
    if available is None or available >= need:
        return None
    return (
        f"{local_ranks} ranks on this machine need at least {need / GIB:.1f} GiB of host memory, and "
        f"{available / GIB:.1f} GiB are available; lower NPUS_PER_NODE"
    )


def shared_memory_warning(
    *, local_ranks: int, num_workers: int, micro_batch_size: int, image_pixels: int, directory: Path = Path("/dev/shm")
) -> str | None:
    """A line if the data workers' batches, of one image per sample, may not fit into the memory that they pass through.

    A worker that finds none left is killed in the midst of training.

    Args:
        local_ranks: ranks on this machine.
        num_workers: data workers of each.
        micro_batch_size: samples of a micro-batch.
        image_pixels: most pixels of an image.
        directory: file system that holds shared memory.
    """
    try:
        state = os.statvfs(directory)
    except OSError:
        return None
    free = state.f_bavail * state.f_frsize
    need = local_ranks * num_workers * _PREFETCHED_PER_WORKER * micro_batch_size * image_pixels * _BYTES_PER_PIXEL
    if free >= need:
        return None
    return (
        f"{directory} has {free / 2**20:.0f} MiB free, and {local_ranks * num_workers} data workers on this machine "
        f"may need {need / 2**20:.0f} MiB there; enlarge it (docker run --shm-size={-(-2 * need // GIB)}g), or lower "
        "--num-workers"
    )


def _whole(variables: Mapping[str, str], name: str, least: int, most: int, *, why: str = "") -> int:
    value = variables[name]
    # int() takes signs, spaces and underscores; bash reads a number that starts with 0 as an octal one
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", value) or not least <= int(value) <= most:
        raise UserError(f"{name} is {value!r}; it must be a whole number from {least} to {most}{why}")
    return int(value)


if __name__ == "__main__":
    print(free_port())
