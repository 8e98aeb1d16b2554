"""Mixtures of data sets: shares, order, resume, formats, and the loss of each."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.schema import validate_config
from mindspeed_mm.data import mixture
from mindspeed_mm.data.loader import TrainLoader
from mindspeed_mm.data.mixture import Part, data_fingerprint, epochs_of, samples_per_epoch
from mindspeed_mm.data.sampler import SampleStream
from mindspeed_mm.data.validate import validate_data
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_data import build_tiny, make_config, make_records, tiny_loader, write_checkpoint

MODES = {"default": {}, "on the fly": {"preprocess_on_fly": True}, "streaming": {"streaming": True}}
NAMES = ("messages", "sharegpt", "pairs")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets of 12, 6 and 20 records, in three formats and file types."""
    directory = tmp_path_factory.mktemp("mixture")
    write_checkpoint(directory / "checkpoint")
    records = make_records(directory / "images", 12)
    (directory / "messages.json").write_text(json.dumps(records))
    roles = {"user": "human", "assistant": "gpt"}
    turns = [[{"from": roles[m["role"]], "value": m["content"]} for m in record["messages"]] for record in records]
    sharegpt = [{"conversations": of_one, "images": record["images"]} for of_one, record
                in zip(turns, records, strict=True)]
    (directory / "sharegpt.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sharegpt[:6]))
    pairs = [{"question": f"What follows {n}?", "answer": f"{n + 1} does. " * (1 + n % 3)} for n in range(20)]
    (directory / "pairs.json").write_text(json.dumps(pairs))
    return directory


def entries(root: Path, **settings: dict) -> dict[str, dict]:
    """The mapping of ``dataset``; settings of each data set by its name."""
    suffixes = {"messages": "json", "sharegpt": "jsonl", "pairs": "json"}
    return {name: {"path": str(root / f"{name}.{suffixes[name]}"), **settings.get(name, {})} for name in NAMES}


def mixed(root: Path, dataset: dict, **basic: object) -> DataConfig:
    return make_config(root, dataset=dataset, basic=basic)


def weights(**values: float) -> dict[str, dict]:
    return {name: {"weight": value} for name, value in values.items()}


@pytest.mark.parametrize(("parts", "all_exhausted", "counts"), [
    ([Part("a", 100, 1.0), Part("b", 300, 1.0)], False, [100, 100]),
    ([Part("a", 100, 1.0), Part("b", 300, 1.0)], True, [300, 300]),
    ([Part("a", 100, 9.0), Part("b", 10_000, 1.0)], False, [100, 11]),
    ([Part("a", 100, 0.3), Part("b", 100, 0.7)], False, [43, 100]),
    ([Part("a", 100), Part("b", 300)], False, [100, 300]),
    ([Part("a", 100, repeat=2.5), Part("b", 300, repeat=0.1)], False, [250, 30]),
])
def test_samples_per_epoch(parts: list[Part], all_exhausted: bool, counts: list[int]) -> None:
    assert samples_per_epoch(parts, all_exhausted=all_exhausted) == counts


def test_shares_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"dataset b: repeat 0.1 leaves an epoch none of its 4 samples; raise it"):
        samples_per_epoch([Part("a", 100), Part("b", 4, repeat=0.1)])
    with pytest.raises(UserError, match=r"since a is used 2,500,000.0 times; set stopping_strategy to first_exhausted"):
        samples_per_epoch([Part("a", 100, 1.0), Part("b", 10_000_000, 0.04)], all_exhausted=True)
    with pytest.raises(UserError, match=r"since a is used 9,000.0 times; lower repeat 9000 of a, or its max_samples"):
        samples_per_epoch([Part("a", 30_000, repeat=9000.0)])


def uses_of(parts: list[Part], epochs: list[np.ndarray]) -> list[np.ndarray]:
    """How often each sample of each data set is used."""
    counts = np.bincount(np.concatenate(epochs), minlength=sum(part.size for part in parts))
    return np.split(counts, np.cumsum([part.size for part in parts])[:-1])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("parts", "cycle"), [
    ([Part("a", 40, 1.0), Part("b", 1000, 3.0)], 25),
    ([Part("a", 40, 40.0), Part("b", 25, 20.0)], 5),
    ([Part("a", 40, 6.0), Part("b", 30, 3.0), Part("c", 20, 1.0)], 60),
    ([Part("a", 40, repeat=1.5), Part("b", 25, repeat=0.9)], 50),
    ([Part("a", 40, repeat=1.1)], 10),
    ([Part("a", 30), Part("b", 20)], 1),
], ids=itertools.count())
def test_samples_are_used_equally_often(parts: list[Part], cycle: int, shuffle: bool) -> None:
    counts = samples_per_epoch(parts)
    epochs = epochs_of(parts, counts, seed=7, shuffle=shuffle)
    assert len(epochs) == cycle and {len(epoch) for epoch in epochs} == {sum(counts)}
    for part, count, uses in zip(parts, counts, uses_of(parts, epochs), strict=True):
        assert set(uses.tolist()) == {count * cycle // part.size}
    for epoch in epochs:
        for part, count, uses in zip(parts, counts, uses_of(parts, [epoch]), strict=True):
            assert uses.sum() == count and (count > part.size or uses.max() == 1)


def test_a_cycle_that_would_be_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter one comes closest to equal use: 45 epochs of 22 samples use 990 of 1000."""
    monkeypatch.setattr(mixture, "_LONGEST_CYCLE", 4000)
    parts = [Part("a", 20, 9.0), Part("b", 1000, 10.0)]
    epochs = epochs_of(parts, samples_per_epoch(parts), seed=7, shuffle=True)
    assert len(epochs) == 91  # 2002 samples of b
    uses = uses_of(parts, epochs)[1]
    assert np.bincount(uses).tolist() == [0, 0, 998, 2]


def test_data_sets_with_weights_are_interleaved_without_shuffle() -> None:
    parts = [Part("a", 40, 1.0), Part("b", 1000, 3.0)]
    epochs = epochs_of(parts, [40, 120], seed=7, shuffle=False)
    assert all(np.count_nonzero(epochs[0][start : start + 16] < 40) == 4 for start in range(0, 160, 16))
    assert np.concatenate([epoch[epoch >= 40] for epoch in epochs])[:1000].tolist() == list(range(40, 1040))


def test_choice_depends_on_seed_and_name_alone() -> None:
    def choice(parts: list[Part], seed: int) -> list[int]:
        first = epochs_of(parts, samples_per_epoch(parts), seed=seed, shuffle=True)[0]
        start = sum(part.size for part in itertools.takewhile(lambda part: part.name != "b", parts))
        return [int(index) - start for index in first if start <= index < start + 50]

    b = Part("b", 50, repeat=0.5)
    alone = choice([b], 3)
    # These numbers must never change: a resumed run continues an order that was begun earlier.
    assert alone[:8] == [49, 28, 22, 40, 15, 24, 35, 19]
    assert choice([Part("a", 9), b, Part("c", 70)], 3) == alone
    assert choice([b], 4) != alone and choice([Part("d", 50, repeat=0.5)], 3) != alone


def test_stream_over_epochs_of_a_cycle() -> None:
    stream = SampleStream((5, 7), 2, 0, shuffle=True, drop_last=True)
    assert stream.samples_per_epoch == 5
    places = [stream[place] for place in range(20)]
    first, second, third = places[:4], places[4:10], places[10:14]
    assert set(first) < set(range(5)) and set(third) < set(range(5)) and len(set(first)) == len(set(third)) == 4
    assert set(second) < set(range(5, 12)) and len(set(second)) == 6
    assert [SampleStream((5, 7), 2, 0, False, True)[place] for place in range(11)] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 0]
    with pytest.raises(UserError, match="the data set has 1 packs, fewer than the 2 of a step"):
        SampleStream((5, 1), 2, 0, True, True, "packs")


def steps(loader_of: object, dp_size: int, count: int) -> list[list[tuple[str, list[int], int]]]:
    """Where the samples of each step come from, their target tokens and channel, put together from all ranks."""
    ranks: list[TrainLoader] = [loader_of(rank, dp_size) for rank in range(dp_size)]
    found = []
    for _ in range(count):
        samples = []
        for loader in ranks:
            for batch in next(loader).batches:
                ends = np.cumsum([0, *batch.target_tokens_per_sample])
                for number, index in enumerate(batch.sample_ids):
                    targets = batch.labels[ends[number] : ends[number + 1]].tolist()
                    samples.append((loader.dataset.describe(index), targets, int(batch.sample_channel[number])))
        found.append(sorted(samples))
    for loader in ranks:
        loader.close()
    return found


@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in order"])
def test_order_is_the_same_for_any_number_of_ranks_and_after_a_resume(root: Path, packing: bool, shuffle: bool) -> None:
    config = make_config(root, dataset=entries(root, **weights(messages=2, sharegpt=2, pairs=1)),
                         basic={"packing": packing}, loader={"shuffle": shuffle})

    def loader_of(consumed: int) -> object:
        return lambda rank, dp_size: tiny_loader(
            config, seq_length=96, seed=5, micro_batch_size=1, global_batch_size=4, dp_rank=rank, dp_size=dp_size,
            consumed_samples=consumed,
        )

    reference = steps(loader_of(0), 1, 9)
    assert steps(loader_of(0), 2, 9) == reference and steps(loader_of(0), 4, 9) == reference
    assert steps(loader_of(20), 2, 4) == reference[5:]
    names = Counter(Path(place.split(",")[0].split(":")[0]).stem for step in reference for place, _, _ in step)
    assert set(names) == set(NAMES)


@pytest.mark.parametrize("mode", MODES)
def test_modes_train_on_the_same_samples(root: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dataset = entries(root, messages={"repeat": 0.5}, sharegpt={"repeat": 2, "format": "sharegpt"})

    def loader_of(mode: str) -> object:
        config = mixed(root, dataset, **MODES[mode])
        return lambda rank, dp_size: tiny_loader(
            config, seq_length=512, seed=5, micro_batch_size=2, global_batch_size=4, dp_rank=rank, dp_size=dp_size,
        )

    found = steps(loader_of(mode), 1, 18)
    assert found == steps(loader_of("default"), 1, 18)
    assert "data set sharegpt: 6 samples, 12 per epoch (31.6% of it), each 2 times" in caplog.messages
    # Two epochs of 6 + 12 + 20 samples, of which 36 are used.
    uses = Counter(place for step in found for place, _, _ in step)
    kinds = {name: [count for place, count in uses.items() if name in Path(place.split(",")[0]).name] for name in NAMES}
    assert set(kinds["messages"]) == {1} and set(kinds["sharegpt"]) <= {3, 4} and set(kinds["pairs"]) <= {1, 2}
    assert sum(map(sum, kinds.values())) == 72
    assert {channel for step in found for place, _, channel in step if "pairs" in place} == {2}


def test_packs_of_a_mixture_hold_every_sample_of_each_epoch(root: Path) -> None:
    config = mixed(root, entries(root, pairs={"repeat": 0.5}), packing=True)
    loader = tiny_loader(config, seq_length=96, seed=5, micro_batch_size=1, global_batch_size=1, dp_rank=0, dp_size=1)
    assert loader.dataset.epoch_sizes == (28, 28)
    found: Counter[str] = Counter()
    while found.total() < 56:
        found.update(map(loader.dataset.describe, next(loader).batches[0].sample_ids))
        if found.total() == 28:  # packs hold samples of one epoch
            assert set(found.values()) == {1}
    assert sorted(found.values()) == [1] * 20 + [2] * 18


def test_held_out_samples_are_not_trained_on(root: Path) -> None:
    config = mixed(root, entries(root, messages={"repeat": 3}), val_rate=0.25, val_max_samples=4)
    train, held_out = build_tiny(config, seed=3)
    trained = {train.describe(index) for index in range(len(train))}
    evaluated = [held_out.describe(index) for index in range(len(held_out))]
    assert train.epoch_sizes == (27 + 4 + 15,) and len(held_out) == 3 + 2 + 4
    assert not trained & set(evaluated) and len(trained) == 9 + 4 + 15
    assert train.channels == held_out.channels == NAMES
    channels = [held_out[index].channel for index in range(9)]
    assert sorted(channels) == [0] * 3 + [1] * 2 + [2] * 4 and set(channels[:4]) == {0, 1, 2}


def test_a_data_set_of_which_nothing_is_held_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_tiny(mixed(root, entries(root), val_rate=0.06), seed=3)  # 12, 6 and 20 records
    assert [line for line in caplog.messages if "holds out" in line] == [
        "val_rate 0.06 holds out no sample of data set sharegpt"
    ]


def test_each_data_set_is_read_in_its_own_way(root: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (root / "images" / "0001.png").rename(tmp_path / "pictures" / "one.png")
    try:
        rows = [{"ask": "What?", "reply": "That.", "pics": ["one.png"]}]
        (tmp_path / "own.json").write_text(json.dumps(rows))
        own = {"path": str(tmp_path / "own.json"), "dataset_dir": str(tmp_path / "pictures"),
               "attr": {"formatting": "qa", "prompt": "ask", "response": "reply", "images": "pics"}}
        config = mixed(root, {"own": own, "pairs": str(root / "pairs.json")})
        assert validate_data(config, SPEC) == [1, 20]
        train, _ = build_tiny(config)
        assert sum(bool(train[index].media) for index in range(len(train))) == 1
    finally:
        (tmp_path / "pictures" / "one.png").rename(root / "images" / "0001.png")


def test_samples_are_found_by_file_and_record(root: Path) -> None:
    train, _ = build_tiny(mixed(root, entries(root)))
    index = train.find(str(root / "pairs.json"), 7)
    assert train.describe(index) == f"{root / 'pairs.json'}, record 7" and train[index].channel == 2
    assert train.describe(train.find(str(root / "sharegpt.jsonl"), 2)) == f"{root / 'sharegpt.jsonl'}, record 2"
    with pytest.raises(UserError, match="there is no such record"):
        train.find(str(root / "pairs.json"), 20)


def test_a_file_of_two_data_sets_cannot_be_held_out(root: Path) -> None:
    path = str(root / "pairs.json")
    for dataset in ({"a": path, "b": [path]}, f"{path},{path}"):
        with pytest.raises(UserError, match=r"more than once, so that val_rate 0.2 would hold out records that are tr"):
            build_tiny(mixed(root, dataset, val_rate=0.2))
        assert build_tiny(mixed(root, dataset))[1] is None


def test_validation_data_sets_have_names(root: Path) -> None:
    config = mixed(root, str(root / "pairs.json"), val_dataset=entries(root), val_max_samples=5)
    train, held_out = build_tiny(config)
    assert train.channels == () and train[0].channel is None
    assert held_out.channels == NAMES and [held_out[index].channel for index in range(15)] == [0, 1, 2] * 5


def test_fingerprint_tells_other_shares(root: Path) -> None:
    plain = ",".join(entry["path"] for entry in entries(root).values())
    found = [data_fingerprint(mixed(root, dataset)) for dataset in (
        plain, entries(root), entries(root, pairs={"repeat": 2}),
        entries(root, **weights(messages=1, sharegpt=1, pairs=1)),
    )]
    assert len(set(found)) == 4 and {text.partition("-")[0] for text in found} == {found[0]}


@pytest.mark.parametrize(("dataset", "basic", "message"), [
    ({"a": {"path": "a", "weight": 1}, "b": "b"}, {}, "dataset: b has no weight; give every data set one, or none"),
    ({"a": {"path": "a", "weight": 1, "repeat": 2}}, {}, "dataset.a: weight and repeat exclude each other; keep one"),
    ({"a": {"path": "a", "weight": 0}}, {}, "dataset.a.weight is 0; it must be at least 1e-06"),
    ({"a": {"path": "a", "wieght": 1}}, {}, "dataset.a.wieght is unknown; did you mean"),
    ({"a": {"path": "a", "attr": {"image": "x"}}}, {}, "dataset.a.attr.image is unknown; did you mean"),
    ({"a": {"path": "a", "attr": {}, "format": "qa"}}, {}, "dataset.a: formatting belongs into attr"),
    ({"a": {"weight": 1}}, {}, "dataset.a.path is missing"),
    ({"a": {"path": " , "}}, {}, "dataset.a: path names no file"),
    ({"a/b": "x"}, {}, "'a/b' is no name of a data set"),
    ({}, {}, "dataset names no file"),
    (3, {}, "dataset is 3; it must be a data file, several separated by commas, or a mapping"),
    ("a", {"stopping_strategy": "all_exhausted"}, "stopping_strategy is for data sets with weights, and none has one"),
    ("a", {"val_dataset": {"x": {"path": "y", "weight": 1}}}, "val_dataset: x is evaluated once, as it is"),
], ids=itertools.count())
def test_mistakes(tmp_path: Path, dataset: object, basic: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        make_config(tmp_path, dataset=dataset, basic=basic)
    assert message in str(error.value)


def test_lists_of_files(root: Path) -> None:
    files = [str(root / "pairs.json"), str(root / "messages.json")]
    assert mixed(root, files).dataset_param.basic_parameters.dataset_files == files
    config = mixed(root, {"both": {"path": files, "max_samples": 3}})
    assert [part.limit for part in config.train_datasets] == [3] and len(build_tiny(config)[0]) == 6


def test_description_says_what_an_epoch_uses() -> None:
    parts = [Part("a", 40, 1.0), Part("b", 1000, 3.0)]
    assert mixture.describe(parts, [40, 120], epochs=6) == [
        "data set a: 40 samples, 40 per epoch (25.0% of it), each 1 times",
        "data set b: 1000 samples, 120 per epoch (75.0% of it), each 0.12 times",
        "mixture: other samples in each of 6 epochs of 160, then again from the first",
    ]


@pytest.mark.parametrize("page", ["mixing.md", "mixing_zh.md"])
def test_examples_of_the_page(page: str) -> None:
    text = Path(__file__).parents[3].joinpath("docs", page).read_text(encoding="utf-8")
    blocks = {kind: re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S) for kind in ("json", "yaml")}
    (of_json,), (of_yaml,) = blocks["json"], blocks["yaml"]
    config = validate_config(json.loads(of_json), DataConfig, source="data.json")
    assert [one.weight for one in config.train_datasets] == [6, 3, 1] and len(config.val_datasets) == 2
    content = yaml.safe_load(of_yaml)["data"]
    content["dataset_param"]["preprocess_parameters"] = {"model_name_or_path": "x"}
    assert [one.repeat for one in validate_config(content, DataConfig, source="x").train_datasets] == [2, 0.5, 1]
    parts = [Part("charts", 10_000, 9.0), Part("texts", 90_000, 1.0)]
    assert samples_per_epoch(parts) == [10_000, 1_111]
    assert samples_per_epoch(parts, all_exhausted=True) == [810_000, 90_000]
