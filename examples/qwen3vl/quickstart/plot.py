"""Plots of a run: the loss curve from its metrics, and a sheet of held-out images with the model's answers. Usage:

    python examples/qwen3vl/quickstart/plot.py --metrics save_dir/metrics.jsonl --loss-png loss.png \\
        --predictions predictions.json --samples-png samples.png
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.config.command_line import OneLineParser
from mindspeed_mm.errors import UserError, report_errors
from mindspeed_mm.inputs import DATA_BYTES, read_json, read_text, reading, reason

_SMOOTHING = 10  # iterations that the smoothed curve averages over
_BLUE, _GREY, _GREEN, _RED = "#1f5fa8", "#9fb8d3", "#1a7f37", "#c4261d"


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of the metrics file."""

    iteration: int
    loss: float
    learning_rate: float


def read_metrics(path: str | Path) -> list[Step]:
    """Steps of a run's ``metrics.jsonl``, in order; a loss that was not finite is NaN.

    Raises:
        UserError: if the file cannot be read or has no step.
    """
    steps = []
    for number, line in enumerate(read_text(path, limit=DATA_BYTES).splitlines(), start=1):
        try:
            values = json.loads(line)
            loss = math.nan if values["loss"] is None else float(values["loss"])
            steps.append(Step(int(float(values["iteration"])), loss, float(values["learning_rate"])))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}, line {number}, has no step ({error}); name a run's metrics.jsonl") from error
    if not steps:
        raise UserError(f"{path} has no step: training ended before the first one")
    return steps


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """Mean of the ``width`` values around each one, of fewer at the ends."""
    before, after = width // 2, width - width // 2
    windows = (values[max(0, place - before) : place + after] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # files only: there may be no display
    from matplotlib import pyplot

    return pyplot


def plot_loss(steps: Sequence[Step], path: str | Path) -> None:
    """Loss per iteration on a logarithmic axis, with the learning rate below."""
    pyplot = _pyplot()
    iterations = [step.iteration for step in steps]
    losses = [step.loss for step in steps]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 5.6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    top.plot(iterations, losses, color=_GREY, linewidth=1, label="each iteration")
    top.plot(
        iterations, moving_average(losses, _SMOOTHING), color=_BLUE, linewidth=2, label=f"mean of {_SMOOTHING}"
    )
    top.set_yscale("log")
    top.set_ylabel("loss per target token (nats)")
    top.set_title(f"Fine-tuning loss over {len(steps)} iterations: from {losses[0]:.2f} to {losses[-1]:.3f}")
    top.grid(True, which="both", alpha=0.25)
    top.legend()
    bottom.plot(iterations, [step.learning_rate for step in steps], color=_BLUE)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("iteration")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.grid(True, alpha=0.25)
    _save(figure, path)


def choose_samples(predictions: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first ``count`` predictions; wrong ones, where there are any, come last and make up a third at most."""
    wrong = [prediction for prediction in predictions if not prediction["right"]][: count // 3]
    right = [prediction for prediction in predictions if prediction["right"]]
    return right[: count - len(wrong)] + wrong


def plot_samples(result: dict[str, Any], path: str | Path, *, count: int = 15, columns: int = 5) -> None:
    """Images with question and answer, green where right and red where wrong; ``result`` is inference_demo.py's."""
    from PIL import Image

    pyplot = _pyplot()
    samples = choose_samples(result["predictions"], count)
    rows = math.ceil(len(samples) / columns)
    # inches; each row leaves space for two lines above and below an image
    width, height, head = 2.6 * columns, 3.3 * rows, 0.9
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width, height + head), squeeze=False,
        gridspec_kw={"left": 0.01, "right": 0.99, "top": height / (height + head), "bottom": 0.6 / (height + head),
                     "wspace": 0.1, "hspace": 0.55},
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, sample in zip(axes.flat, samples, strict=False):
        if sample["images"]:
            with Image.open(sample["images"][0]) as image:
                axis.imshow(image.convert("RGB"))
        question = " ".join(sample["text"].replace("<image>", " ").split())
        # a question's dollar signs are no formulas
        axis.set_title("\n".join(textwrap.wrap(question, 32)), fontsize=9, parse_math=False)
        verdict = sample["answer"] if sample["right"] else f"{sample['answer']}\n(expected: {sample['reference']})"
        lines = [line for part in verdict.splitlines() for line in textwrap.wrap(part, 32)]
        axis.set_xlabel("\n".join(lines), fontsize=10, color=_GREEN if sample["right"] else _RED, fontweight="bold",
                        parse_math=False)
    figure.suptitle(
        f"Held-out images: {result['right']} of {result['total']} answered correctly "
        f"({100 * result['accuracy']:.1f}%); wrong answers, in red, are shown last",
        y=1 - 0.15 / (height + head), va="top",
    )
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {reason(error)}; give another path") from error
    finally:
        _pyplot().close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return report_errors(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--metrics", help="metrics.jsonl of the run, in its --save directory")
    parser.add_argument("--loss-png", help="loss curve to write")
    parser.add_argument("--predictions", help="file that inference_demo.py wrote")
    parser.add_argument("--samples-png", help="sample sheet to write")
    args = parser.parse_args(argv)
    if bool(args.metrics) != bool(args.loss_png) or bool(args.predictions) != bool(args.samples_png):
        raise UserError("--metrics goes with --loss-png, and --predictions with --samples-png; give both, or neither")
    if not (args.metrics or args.predictions):
        raise UserError("nothing to draw; give --metrics and --loss-png, or --predictions and --samples-png")
    if args.metrics:
        plot_loss(read_metrics(args.metrics), args.loss_png)
        print(args.loss_png)
    if args.predictions:
        result = read_json(args.predictions, limit=DATA_BYTES)
        with reading(args.predictions, "name a file that inference_demo.py wrote"):
            plot_samples(result, args.samples_png)
        print(args.samples_png)


if __name__ == "__main__":
    sys.exit(main())
