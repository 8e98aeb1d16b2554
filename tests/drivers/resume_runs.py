"""Started by torchrun: executes runs one after the other in the same processes, and writes what each logged.

Usage: resume_runs.py RUNS.json OUT.json

Each run is {"flags": [...], "fault": {...}}. A fault happens on one rank:
    {"rank": 1, "iteration": 5, "phase": "backward", "kind": "kill" | "kill workers" | "sleep" | "nan" | "signal"}
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import pretrain_transformers
from mindspeed_mm.config.job import load_job_config
from mindspeed_mm.errors import UserError
from mindspeed_mm.training import pretrain
from mindspeed_mm.training.callbacks.anomaly_detection import AnomalyDetector
from mindspeed_mm.training.context import PhaseTimer
from mindspeed_mm.training.metrics import StepRecord

Fault = dict[str, Any]


class Recorder(AnomalyDetector):
    """Records every step in addition to checking it."""

    steps: dict[int, dict[str, Any]]

    def on_step_end(self, record: StepRecord) -> None:
        """Record the exact numbers and this rank's sample ids."""
        self.steps[record.iteration] = {
            "loss": record.metrics["loss"].hex(),
            "norm": record.metrics["grad_norm"].hex(),
            "learning_rate": record.metrics["learning_rate"].hex(),
            "consumed": record.metrics["consumed_samples"],
            "skipped": bool(record.metrics["skipped_step"]),
            "samples": [list(part.sample_ids) for part in record.details.samples],
        }
        super().on_step_end(record)


def with_fault(fault: Fault | None) -> Any:
    """A phase timer that injects the fault when its rank reaches the phase."""
    plain = PhaseTimer.enter

    def enter(clock: PhaseTimer, phase: str) -> None:
        plain(clock, phase)
        due = fault and (phase, clock.iteration, dist.get_rank()) == (fault["phase"], fault["iteration"], fault["rank"])
        if not due or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return
        if fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault["kind"] == "kill workers":
            for worker in multiprocessing.active_children():
                worker.kill()
        elif fault["kind"] == "sleep":
            time.sleep(fault["seconds"])
        elif fault["kind"] == "signal":
            os.kill(os.getpid(), getattr(signal, fault["signal"]))

    return enter


def forward_with_fault(fault: Fault | None, recorded: dict[int, Any]) -> Any:
    """The recipe's forward step, with a NaN loss on the fault's rank from its iteration on."""

    def forward(model: Any, batch: Any, weight: Any) -> Any:
        torch.rand(())  # or the generator would not move, and a state that was not restored would pass for one that was
        output = pretrain_transformers.forward_step(model, batch, weight)
        iteration = max(recorded, default=0) + 1
        if fault and fault["kind"] == "nan" and iteration in fault["iterations"] and dist.get_rank() == fault["rank"]:
            losses = output.token_losses.clone()
            losses[batch.label_sample == 0] = float("nan")
            output = output._replace(loss=output.loss * float("nan"), token_losses=losses)
        return output

    return forward


def run(words: list[str], fault: Fault | None) -> dict[str, Any]:
    """One run, as in a new process: the random generators are reset."""
    torch.manual_seed(random.SystemRandom().randrange(2**32))
    random.seed()
    recorded: dict[int, Any] = {}
    Recorder.steps = recorded
    pretrain.AnomalyDetector = Recorder  # type: ignore[misc]
    plain = PhaseTimer.enter
    PhaseTimer.enter = with_fault(fault)  # type: ignore[method-assign]
    outcome: dict[str, Any] = {"status": 0, "error": None}
    try:
        outcome["status"] = pretrain.pretrain(
            load_job_config(words),
            pretrain_transformers.model_provider,
            pretrain_transformers.data_provider,
            forward_with_fault(fault, recorded),
        )
    except UserError as error:
        outcome.update(status=2, error=str(error))
    finally:
        PhaseTimer.enter = plain  # type: ignore[method-assign]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {"steps": recorded, **outcome})
    same = [{step: {**facts, "samples": None} for step, facts in own["steps"].items()} for own in gathered]
    assert all(own == same[0] for own in same), "ranks differ"
    steps = {
        step: {**facts, "samples": [own["steps"][step]["samples"] for own in gathered]}
        for step, facts in recorded.items()
    }
    return {**outcome, "steps": steps}


def main(runs: list[dict[str, Any]], out: str) -> None:
    """Execute all runs; results are written after each, and a restart continues from there."""
    torch.set_num_threads(1)
    pretrain.shutdown_distributed, stop = lambda: None, pretrain.shutdown_distributed
    results = []
    if os.path.exists(out):
        with open(out) as file:
            results = json.load(file)
    for number, description in enumerate(runs[len(results) :], len(results)):
        results.append(run(description["flags"], description.get("fault")))
        if dist.get_rank() == 0:
            print(f"run {number}: status {results[-1]['status']}", flush=True)
            with open(out, "w") as file:
                json.dump(results, file)
    stop()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file), sys.argv[2])
