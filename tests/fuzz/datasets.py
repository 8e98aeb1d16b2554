"""Whole data sets with broken images and videos, and the data viewer over broken data files and images.

Each input goes through everything that a run does before the model: preparation in one of the reading modes, the
training loader, and what ``on_bad_sample`` decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mindspeed_mm.data import ChatDataset, build_datasets
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.tools.show_data.__main__ import main as show_data
from tests.fuzz.data import SETTINGS, good_images, good_videos
from tests.fuzz.mutations import mutate_bytes, mutate_value
from tests.fuzz.outcomes import Outcomes
from tests.helpers.tiny_data import make_config, tiny_loader, write_checkpoint
from tests.helpers.tiny_recipe import write_data_file, write_recipe

INPUTS_PER_DATASET = 20
"""A data set takes about as long as so many images or records, and ``count`` is divided by it."""
_MODES: tuple[dict[str, bool], ...] = ({}, {"preprocess_on_fly": True}, {"streaming": True})
_POLICIES = ("stop", "skip")
_RECORD = re.compile(r"(\w+\.\w+), record (\d+)")

Name = tuple[str, int]
"""A record: its data file, and its index there."""


@dataclasses.dataclass
class _Files:
    """Two data files and their images and videos, all of them good until some are damaged.

    Attributes:
        root: of everything.
        media: content of each file of an image or video.
        owners: name of each such file -> the record that has it.
    """

    root: Path
    media: dict[str, bytes]
    owners: dict[str, Name]

    @classmethod
    def write(cls, root: Path) -> _Files:
        """A record for each image and each video, one of frames, and two of text."""
        write_checkpoint(root / "checkpoint")
        images = good_images()
        videos = good_videos(root)
        answer = {"role": "assistant", "content": "A dog."}
        rows: list[dict[str, Any]] = [
            {"messages": [{"role": "user", "content": "<image>\nWhat?"}, answer], "images": [name]} for name in images
        ]
        rows += [{"messages": [{"role": "user", "content": "Where <video>?"}, answer], "videos": [name]}
                 for name in videos]
        frames = [f"frame{number}" for number in range(5)]
        rows.append({"messages": [{"role": "user", "content": "<video>"}, answer], "videos": [frames]})
        rows += [{"messages": [{"role": "user", "content": f"No. {number}?"}, answer]} for number in range(2)]
        media = {**images, **videos, **dict.fromkeys(frames, images["PNG"])}
        owners: dict[str, Name] = {}
        for file, part in (("a.json", rows[::2]), ("b.jsonl", rows[1::2])):
            (root / file).write_text(json.dumps(part) if file == "a.json" else "\n".join(map(json.dumps, part)))
            for index, row in enumerate(part):
                for one in (*row.get("images", ()), *row.get("videos", ())):
                    owners.update(dict.fromkeys(one if isinstance(one, list) else [one], (file, index)))
        files = cls(root, media, owners)
        files.restore(media)
        return files

    def restore(self, names: Any) -> None:
        """Write these files as they were."""
        for name in names:
            (self.root / name).write_bytes(self.media[name])

    def damage(self, names: list[str], rng: random.Random) -> None:
        """Change these files, or remove them."""
        for name in names:
            if rng.random() < 0.1:
                (self.root / name).unlink()
            else:
                (self.root / name).write_bytes(mutate_bytes(self.media[name], rng))

    def build(self, mode: dict[str, bool], policy: str) -> tuple[Any, ChatDataset]:
        """The data file's settings and the data set."""
        config = make_config(
            self.root, dataset=f"{self.root}/a.json,{self.root}/b.jsonl", basic=mode, attr={"videos": "videos"},
            loader={"on_bad_sample": policy, "shuffle": False, "drop_last": False},
        )
        return config, build_datasets(config, spec=SPEC, media=SETTINGS, seq_length=512, seed=0)[0]


def _epoch(config: Any, dataset: ChatDataset) -> tuple[dict[Name, Any], list[str]]:
    """Tokens and labels of each record that takes part in an epoch of training, and the messages about the others.

    Raises:
        UserError: where training would, which stops at the first bad sample unless it may skip it.
    """
    loader = tiny_loader(config, dataset=dataset, seq_length=512, seed=0, micro_batch_size=4,
                         global_batch_size=-(-len(dataset) // 4) * 4, dp_rank=0, dp_size=1)
    step = next(loader)
    if step.failure:
        raise UserError(step.failure)
    found = {}
    for batch in step.batches:
        labels = dict.fromkeys(range(len(batch.sample_ids)), ())
        for place, label in zip(batch.label_sample.tolist(), batch.labels.tolist(), strict=True):
            labels[place] = (*labels[place], label)
        tokens = batch.input_ids.tolist()
        borders = batch.cu_seqlens_host
        for place, index in enumerate(batch.sample_ids):
            if labels[place]:  # else it is skipped
                found[_names(dataset.describe(index))[0]] = (tokens[borders[place] : borders[place + 1]], labels[place])
    return found, list(step.skipped.unusable)


def _names(message: str) -> list[Name]:
    return [(file, int(index)) for file, index in _RECORD.findall(message)]


def fuzz_datasets(directory: Path, count: int, seed: int) -> Outcomes:
    """Damage some images and videos of a data set, before or after it is prepared, and read all of it.

    Whatever is damaged, each other record must keep its tokens and labels, and messages must name damaged ones.
    """
    files = _Files.write(directory)
    untouched, _ = _epoch(*files.build({}, "stop"))
    outcomes = Outcomes()
    for index in range(-(-count // INPUTS_PER_DATASET)):
        rng = random.Random(seed * 1_000_003 + index)
        mode, policy = _MODES[index % 3], _POLICIES[index // 3 % 2]
        damaged = rng.sample(sorted(files.owners), rng.choice((1, 1, 2, 4)))
        victims = {files.owners[name] for name in damaged}
        name = f"seed {seed}, input {index}, {next(iter(mode), 'default')}, {policy}, {', '.join(damaged)}"

        def read(mode: Any = mode, policy: str = policy, damaged: Any = damaged, rng: Any = rng, victims: Any = victims,
                 ) -> tuple[dict[Name, Any], list[str]]:
            try:
                if rng.random() < 0.5:
                    prepared = files.build(mode, policy)
                    files.damage(damaged, rng)
                else:
                    files.damage(damaged, rng)
                    prepared = files.build(mode, policy)
                return _epoch(*prepared)
            except UserError as error:
                assert policy == "stop" and set(_names(str(error))) & victims, str(error)
                raise

        shutil.rmtree(directory / "cache", ignore_errors=True)
        result = outcomes.run(name, read)
        files.restore(damaged)
        if result is None:
            continue
        found, messages = result
        if any(found.get(record) != untouched[record] for record in untouched.keys() - victims):
            outcomes.add_fault(name, "changed target", "a record has other tokens because of another's image or video")
        if any(not set(_names(message)) <= victims or not _names(message) for message in messages):
            outcomes.add_fault(name, "wrong name", f"{messages}")
    return outcomes


def fuzz_viewer(directory: Path, count: int, seed: int) -> Outcomes:
    """Damage the data file or images of a recipe, and look at some of its samples."""
    root = write_recipe(directory, records=8)
    records = json.loads((root / "data.json").read_text())
    images = {image: Path(image).read_bytes() for record in records for image in record["images"]}
    outcomes = Outcomes()
    for index in range(-(-count // INPUTS_PER_DATASET)):
        rng = random.Random(seed * 1_000_003 + index)
        rows, content = records, b""
        image = rng.choice(sorted(images))
        if index % 2:
            Path(image).write_bytes(mutate_bytes(images[image], rng))
        else:
            victim = rng.randrange(len(records))
            rows = [mutate_value(row, rng) if place == victim else row for place, row in enumerate(records)]
        content = json.dumps(rows).encode()
        (root / "data.json").write_bytes(mutate_bytes(content, rng) if index % 8 == 0 else content)
        shutil.rmtree(root / "cache", ignore_errors=True)
        data = write_data_file(root, "data_tiny.json", basic=_MODES[index % 3], on_bad_sample=rng.choice(_POLICIES))
        options = ["--mm-data", data, "--mm-model", str(root / "model_tiny.json"), "--seq-length", "256",
                   "--samples", rng.choice(("0,1,2,3", f"{root}/data.json:{rng.randrange(8)}", "7,6", "5,4"))]
        options += ["--out", str(root / "out")] if index % 5 == 0 else []
        options += ["--colour", "always"] if rng.random() < 0.5 else []
        outcomes.run(f"seed {seed}, input {index}", lambda options=options: _show(options))
        Path(image).write_bytes(images[image])
    return outcomes


def _show(options: list[str]) -> None:
    """Run the viewer.

    Raises:
        UserError: what it prints where it fails.
    """
    with _captured() as (out, error):
        status = show_data(options)
    lines = [line for line in error.getvalue().splitlines() if line.startswith("error: ")]
    assert (status, len(lines)) in ((0, 0), (2, 1)), (status, error.getvalue())
    if status:
        raise UserError(lines[0])
    assert "samples" in out.getvalue()
    assert not re.search("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]", out.getvalue())


@contextlib.contextmanager
def _captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield out, error


KINDS: dict[str, Callable[[Path, int, int], Outcomes]] = {"datasets": fuzz_datasets, "viewer": fuzz_viewer}
