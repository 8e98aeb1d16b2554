"""A model family that takes text only: data sets, packing and batches without any vision part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindspeed_mm.data import build_datasets, build_train_loader, validate_data
from mindspeed_mm.data.prepare import Source, cache_key
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.conversation import ChatTemplateOptions, Clip, Encoded, Message
from mindspeed_mm.models.spec import ModelSpec
from tests.helpers.tiny_data import make_config, make_records, write_dataset


class LineTemplate:
    """``role: text`` and a line break for each message; the loss counts the answers that are not empty."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer

    def encode(self, messages: Sequence[Message], media: Sequence[int | Clip], *, max_length: int) -> Encoded | None:
        assert not media
        ids, loss_mask = [], []
        for message in messages:
            tokens = self._backend.encode(f"{message.role}: {message.text}\n", add_special_tokens=False).ids
            ids += tokens
            loss_mask += [message.role == "assistant" and bool(message.text)] * len(tokens)
        if len(ids) > max_length:
            return None
        return Encoded(np.array(ids), np.array(loss_mask), 0, 0)


class LineSpec(ModelSpec):
    """The data half of a family, with the defaults of :class:`ModelSpec` for everything about vision."""

    model_types = ("line",)
    collators = ("line",)
    chat_templates = ("line",)
    data_modules = (__name__,)

    def build_chat_template(self, tokenizer: Any, options: ChatTemplateOptions) -> LineTemplate:
        self.check_chat_template(options.name, enable_thinking=options.enable_thinking)
        return LineTemplate(tokenizer)


LineSpec.__abstractmethods__ = frozenset()  # type: ignore[misc]  # the model half is not needed here
SPEC = LineSpec()
MODEL_CONFIG = object()
LOADER = {"collate_param": {"model_name": "line"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text_only")
    write_dataset(directory, 12)
    records = [record for record in make_records(directory / "images", 30) if not record["images"]]
    records[0]["messages"][0]["content"] += " <image> <video>"  # plain text for such a model
    (directory / "data.json").write_text(json.dumps(records))
    return directory


def steps(root: Path, count: int, **basic: Any) -> list[Any]:
    config = make_config(root, dataset=str(root / "data.json"), basic=basic, loader=LOADER)
    assert validate_data(config, SPEC) == [10]
    media = SPEC.read_media_settings(config, MODEL_CONFIG)
    dataset, _ = build_datasets(config, spec=SPEC, media=media, seq_length=100, seed=1)
    loader = build_train_loader(
        dataset, config, spec=SPEC, model_config=MODEL_CONFIG, seq_length=100, micro_batch_size=2, global_batch_size=4,
        dp_rank=0, dp_size=1, seed=1,
    )
    return [next(loader) for _ in range(count)]


def test_every_way_gives_the_same_batches(root: Path) -> None:
    prepared, *others = (
        [batch for step in steps(root, 4, **basic) for batch in step.batches]
        for basic in ({}, {"preprocess_on_fly": True}, {"streaming": True})
    )
    for batches in others:
        for ours, theirs in zip(batches, prepared, strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.labels, theirs.labels)
    for batch in prepared:
        assert batch.vision is None and batch.num_target_tokens
        lengths = np.diff(batch.cu_seqlens_host)
        plain = torch.cat([torch.arange(length) for length in lengths.tolist()])
        assert torch.equal(batch.position_ids, plain.expand(3, -1))


def test_packing(root: Path) -> None:
    batches = [batch for step in steps(root, 2, packing=True) for batch in step.batches]
    assert all(batch.vision is None for batch in batches)
    assert max(len(batch.sample_ids) for batch in batches) > 2 and max(batch.num_tokens for batch in batches) <= 200


def test_each_reason_has_its_counter(root: Path, tmp_path: Path) -> None:
    rows = json.loads((root / "data.json").read_text())[:4]
    rows[1]["messages"] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]
    rows[2]["messages"][0]["content"] = "word " * 200
    rows[3] = {"messages": []}
    (tmp_path / "data.json").write_text(json.dumps(rows))

    def loader_of(**basic: Any) -> Any:
        config = make_config(root, dataset=str(tmp_path / "data.json"), basic={"cache_dir": str(tmp_path), **basic},
                             loader={**LOADER, "on_bad_sample": "skip", "drop_last": False})
        dataset, _ = build_datasets(config, spec=SPEC, media=None, seq_length=100, seed=1)
        return build_train_loader(
            dataset, config, spec=SPEC, model_config=MODEL_CONFIG, seq_length=100, micro_batch_size=2,
            global_batch_size=4, dp_rank=0, dp_size=1, seed=1,
        )

    report = next(loader_of(streaming=True)).skipped
    assert (len(report.unusable), report.too_long, report.no_target) == (1, 1, 1)
    assert "record 3: the conversation is empty" in report.unusable[0]
    assert len(loader_of().dataset) == 1
    (summary,) = tmp_path.glob("tokenized-*/summary.txt")
    assert summary.read_text() == (
        f"4 records, 1 kept whole, 1 skipped: the first turn is too long ({tmp_path}/data.json, record 2), "
        f"1 skipped: no target token ({tmp_path}/data.json, record 1), 1 skipped: unusable\n"
        "format, recognised by the first records: messages (column messages, keys role and content)\n"
        f"1 answer of 1 record without text, which teach at most the end of a turn; "
        f"the first: {tmp_path}/data.json, record 1\n"
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda row: row.update(images=["images/0001.png"]), "record 0: it has images, which this model does not take"),
        (lambda row: row.update(tools='[{"name": "f"}]'), "record 0: this model has no format for descriptions of"),
    ],
)
def test_what_the_family_cannot_do_is_refused(root: Path, tmp_path: Path, change: Any, complaint: str) -> None:
    rows = json.loads((root / "data.json").read_text())
    change(rows[0])
    (tmp_path / "data.json").write_text(json.dumps(rows))
    config = make_config(root, dataset=str(tmp_path / "data.json"), loader=LOADER,
                         attr={"tools": "tools"})
    with pytest.raises(UserError, match=complaint):
        validate_data(config, SPEC)


@pytest.mark.parametrize(
    ("basic", "collator", "complaint"),
    [
        ({"template": "qwen3_vl_nothink"}, "line", "template 'qwen3_vl_nothink' is unknown .*; choose line$"),
        ({}, "qwen3vl", "model_name 'qwen3vl' is unknown for this model; choose line$"),
        ({"enable_thinking": True}, "line", "enable_thinking is true.*set it to false"),
    ],
)
def test_names_of_another_family_are_refused(root: Path, basic: Any, collator: str, complaint: str) -> None:
    loader = {"collate_param": {"model_name": collator}}
    with pytest.raises(UserError, match=complaint):
        validate_data(make_config(root, dataset=str(root / "data.json"), basic=basic, loader=loader), SPEC)


def test_the_familys_code_is_part_of_the_cache_key(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(root, dataset=str(root / "data.json"))
    source = Source(config, (str(root / "data.json"),), None, SPEC, None, 100)
    key = cache_key(source)
    assert cache_key(source) == key
    monkeypatch.setattr(LineSpec, "data_modules", (*LineSpec.data_modules, "tests.helpers.tiny_config"))
    assert cache_key(source) != key
