"""Pictures of a run: the loss curve from its log, and a sheet of held-out pictures with the model's answers. Usage:

    python examples/qwen3vl/quickstart/plot.py --log logs/train_X.log --loss-png loss.png \\
        --predictions predictions.json --samples-png samples.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError

_ITERATION = re.compile(r"\biteration\s+(\d+)/\s*\d+\s*\|")
_FIELD = re.compile(r"\|\s*([^|:]+):\s*(-?[0-9.]+(?:[eE][-+]?\d+)?|nan|-?inf)\s*(?=\|)")
_SMOOTHING = 10  # iterations that the smoothed curve averages over
_BLUE, _GREY, _GREEN, _RED = "#1f5fa8", "#9fb8d3", "#1a7f37", "#c4261d"


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of the training log. ``milliseconds`` is the time of the iteration; the rest as in the line."""

    iteration: int
    loss: float
    learning_rate: float
    milliseconds: float


def parse_log(text: str) -> list[Step]:
    """Iterations of a training log, in order; of one that was logged twice (a resumed run) the later line counts.

    Raises:
        UserError: if no line holds an iteration with a loss.
    """
    steps: dict[int, Step] = {}
    for line in text.splitlines():
        match = _ITERATION.search(line)
        if not match:
            continue
        fields = {name.strip(): float(value) for name, value in _FIELD.findall(line[match.end() - 1 :])}
        if "loss" in fields:
            iteration = int(match[1])
            steps[iteration] = Step(
                iteration=iteration,
                loss=fields["loss"],
                learning_rate=fields.get("learning rate", math.nan),
                milliseconds=fields.get("elapsed time per iteration (ms)", math.nan),
            )
    if not steps:
        raise UserError("the log holds no line with an iteration and its loss; training ended before the first one")
    return [steps[iteration] for iteration in sorted(steps)]


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to ``width - 1`` before it."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
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
    top.set_ylabel("loss per supervised token (nats)")
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
    """Pictures with question and answer, green where right and red where wrong; ``result`` is inference_demo.py's."""
    from PIL import Image

    pyplot = _pyplot()
    samples = choose_samples(result["predictions"], count)
    rows = math.ceil(len(samples) / columns)
    # inches; each row has room for two lines above and below a picture
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
        axis.set_title("\n".join(textwrap.wrap(question, 32)), fontsize=9)
        verdict = sample["answer"] if sample["right"] else f"{sample['answer']}\n(expected: {sample['reference']})"
        lines = [line for part in verdict.splitlines() for line in textwrap.wrap(part, 32)]
        axis.set_xlabel("\n".join(lines), fontsize=10, color=_GREEN if sample["right"] else _RED, fontweight="bold")
    figure.suptitle(
        f"Held-out pictures: {result['right']} of {result['total']} answered rightly "
        f"({100 * result['accuracy']:.1f}%); wrong answers, in red, are shown last",
        y=1 - 0.15 / (height + head), va="top",
    )
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--log", help="training log to read")
    parser.add_argument("--loss-png", help="loss curve to write")
    parser.add_argument("--predictions", help="file that inference_demo.py wrote")
    parser.add_argument("--samples-png", help="sample sheet to write")
    args = parser.parse_args(argv)
    if bool(args.log) != bool(args.loss_png) or bool(args.predictions) != bool(args.samples_png):
        parser.error("--log goes with --loss-png, and --predictions with --samples-png")
    try:
        if args.log:
            plot_loss(parse_log(_read(args.log)), args.loss_png)
            print(args.loss_png)
        if args.predictions:
            plot_samples(json.loads(_read(args.predictions)), args.samples_png)
            print(args.samples_png)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


if __name__ == "__main__":
    main()
