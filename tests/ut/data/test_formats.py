"""Every format of records gives the tokens and targets of this recipe's own, in every reading mode."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from mindspeed_mm.config.data_config import Attributes
from mindspeed_mm.data import build_datasets
from mindspeed_mm.data.dataset import SkippedSample
from mindspeed_mm.data.formats import format_of, recognise
from mindspeed_mm.data.parsing import Record, parse_record
from mindspeed_mm.data.records import RecordReader
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.conversation import Message
from mindspeed_mm.interfaces.media import VideoSettings
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.chat_reference import ATTR, CASES
from tests.helpers.tiny_data import (
    build_tiny,
    checkpoint_config,
    make_config,
    make_records,
    tiny_loader,
    write_checkpoint,
)

Row = dict[str, Any]
MODES: dict[str, dict[str, bool]] = {"built": {}, "on the fly": {"preprocess_on_fly": True},
                                     "streaming": {"streaming": True}, "packed": {"packing": True}}


def _texts(row: Row) -> list[str]:
    return [turn["content"] for turn in row["messages"]]


def _sharegpt(row: Row) -> Row:
    turns = [{"from": "gpt" if place % 2 else "human", "value": text} for place, text in enumerate(_texts(row))]
    return {"conversations": turns, **({"images": row["images"]} if row["images"] else {})}


def _llava(row: Row) -> Row:
    converted = _sharegpt(row)
    images = converted.pop("images", None)
    return {"id": "x", **converted, **({"image": images[0]} if images else {})}


def _openai(row: Row) -> Row:
    messages = copy.deepcopy(row["messages"])
    question = messages[0]
    parts: list[Row] = [{"type": "image_url", "image_url": {"url": f"file://{path}"}} for path in row["images"]]
    question["content"] = [*parts, {"type": "text", "text": question["content"].replace("<image>", "")}]
    return {"messages": messages}


def _swift(row: Row) -> Row:
    return {**row, "messages": [*row["messages"][:-1], {**row["messages"][-1], "loss": True}]}


def _pairs(row: Row) -> tuple[list[list[str]], str, str]:
    texts = _texts(row)
    return [texts[place : place + 2] for place in range(0, len(texts) - 2, 2)], texts[-2], texts[-1]


def _alpaca(row: Row) -> Row:
    history, prompt, response = _pairs(row)
    first, _, rest = prompt.partition("\n")
    return {"instruction": first, "input": rest, "output": response, "history": history, "images": row["images"]}


def _qa(row: Row) -> Row:
    history, prompt, response = _pairs(row)
    pair = {"query": prompt, "response": response, "history": history}
    return {**pair, "image": row["images"][0]} if row["images"] else pair


FORMATS: dict[str, Callable[[Row], Row]] = {
    "messages": lambda row: row, "openai": _openai, "swift": _swift, "sharegpt": _sharegpt, "llava": _llava,
    "alpaca": _alpaca, "qa": _qa,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("formats")
    write_checkpoint(directory / "checkpoint")
    return directory


@pytest.fixture(scope="module")
def records(root: Path) -> list[Row]:
    return make_records(root / "images", 9)


def config_of(root: Path, name: str, rows: list[Row], *, named: bool = False, **basic: Any) -> Any:
    """The data file of some records; ``attr`` names nothing unless ``named``."""
    path = root / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = make_config(root, dataset=str(path), basic=basic, loader={"shuffle": False})
    if named:
        return config
    return config.model_copy(update={"dataset_param": config.dataset_param.model_copy(update={"attr": Attributes()})})


def samples_of(config: Any) -> list[tuple[list[int], list[bool], int]]:
    dataset, _ = build_tiny(config)
    samples = (dataset[index] for index in range(len(dataset)))
    return [(sample.input_ids.tolist(), sample.loss_mask.tolist(), len(sample.media)) for sample in samples]


@pytest.fixture(scope="module")
def expected(root: Path, records: list[Row]) -> list[Any]:
    return samples_of(config_of(root, "own", records, named=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_same_tokens_and_targets(root: Path, records: list[Row], expected: list[Any], name: str, mode: str) -> None:
    config = config_of(root, name, [FORMATS[name](row) for row in records], **MODES[mode])
    if mode != "packed":
        assert samples_of(config) == expected
        return
    options = {"micro_batch_size": 1, "global_batch_size": 1, "dp_rank": 0, "dp_size": 1, "num_workers": 0}
    loader = tiny_loader(config, seq_length=512, seed=0, **options)
    found: dict[int, tuple[list[int], int]] = {}
    for _ in range(loader.samples_per_epoch):  # packs
        (batch,) = next(loader).batches
        ends = batch.cu_seqlens.tolist()
        for place, sample in enumerate(batch.sample_ids):
            ids = batch.input_ids[ends[place] : ends[place + 1]].tolist()
            found[sample] = ids, int(batch.target_tokens_per_sample[place])
    loader.close()
    assert found == {place: (ids, sum(mask)) for place, (ids, mask, _) in enumerate(expected)}


@pytest.mark.parametrize("name", FORMATS)
def test_recognised_by_the_first_records(records: list[Row], name: str) -> None:
    rows: list[Any] = ["damaged", *(FORMATS[name](row) for row in records)]
    form = recognise(Attributes(), rows)
    assert form.name == name and form.recognised
    assert recognise(Attributes(formatting=name), rows).name == name
    ours = Attributes(messages="messages", images="images", system_tag=None)  # as the recipe's data file names them
    assert (recognise(ours, rows).name, recognise(ours, rows).recognised) == (name, True)
    other = Attributes(messages="messages", videos="films")  # names of its own: no others, if it fits
    assert recognise(other, rows).recognised is ("messages" not in FORMATS[name](records[0]))


def parsed(row: Row, *, thoughts: bool = True, **attr: Any) -> Record:
    return parse_record(row, recognise(Attributes(**attr), [row]), SPEC, thoughts=thoughts)


def test_calls_of_tools_as_in_the_api() -> None:
    for case in CASES:
        if any(turn["role"] == "function_call" for turn in case["messages"]):
            row = {**case, "messages": [_as_in_the_api(turn) for turn in case["messages"]]}
            assert parsed(row, thoughts=False) == parse_record(case, format_of(ATTR), SPEC)
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    answer = {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    text = 'I look.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert parsed({"messages": [{"role": "user", "content": "q"}, answer]}).messages[1].text == text


def _as_in_the_api(turn: Row) -> Row:
    if turn["role"] != "function_call":
        return {**turn, "role": "tool", "tool_call_id": "1"} if turn["role"] == "observation" else turn
    calls = json.loads(turn["content"])
    return {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])
    ]}


def test_thoughts_in_a_key_of_their_own(root: Path) -> None:
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}
    thought = {**answer, "reasoning_content": "hm"}
    assert parsed({"messages": [question, thought]}).messages[1].text == "<think>\nhm\n</think>\n\nyes"
    config = config_of(root, "thoughts", [{"messages": [question, thought]}])
    reader = RecordReader(config, SPEC, config.dataset_param.basic_parameters.dataset_files, limit=None)
    assert [record.messages[1].text for record in reader.read()] == ["yes"]  # by the template of Instruct models
    assert "messages.reasoning_content (1)" in reader.notes["unread"]
    with pytest.raises(ValueError, match="has reasoning_content, and <think> or </think> in its texts; keep one"):
        parsed({"messages": [question, {**thought, "content": "<think>a</think>b"}]})


@pytest.mark.parametrize("key", ["loss", "weight", "train"])
def test_answers_without_loss(root: Path, key: str) -> None:
    turns = [{"role": role, "content": text} for role, text in
             (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    turns[1][key], turns[3][key] = 1, 0  # type: ignore[assignment]
    plain = [{name: turn[name] for name in ("role", "content")} for turn in turns]
    (ids, mask, _), = samples_of(config_of(root, "switch", [{"messages": turns}]))
    (all_ids, both, _), = samples_of(config_of(root, "plain", [{"messages": plain}]))
    (_, first, _), = samples_of(config_of(root, "first", [{"messages": plain[:2]}]))
    assert ids == all_ids and mask == first + [False] * (len(both) - len(first)) and mask != both
    (_, last, _), = samples_of(config_of(root, "last", [{"messages": plain}], mask_history=True))
    (_, kept, _), = samples_of(config_of(root, "kept", [{"messages": turns}], mask_history=True))
    assert kept == mask != last  # what a record says of itself comes before the option
    none = [{**turn, key: False} for turn in plain]
    with pytest.raises(UserError, match="no record can be trained on .*no target token"):
        samples_of(config_of(root, "none", [{"messages": none}]))
    with pytest.raises(SkippedSample):
        samples_of(config_of(root, "none", [{"messages": none}], streaming=True))


QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, ANSWER]},
         "a part of message 0 has the type audio; it must be text, image"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}, ANSWER]},
         "is a list of parts and has <image> in a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "1 <image> tags .* no column"),
        ({"messages": [QUESTION, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]},
         "has an image; only questions may have one"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": 1}]}, ANSWER]},
         "a part of message 0 is not a list of images: one is a number"),
        ({"messages": [{**QUESTION, "tool_calls": [{"name": "f", "arguments": {}}]}, ANSWER]}, "only answers may"),
        ({"messages": [QUESTION, {**ANSWER, "loss": True, "train": False}]}, "loss and train of message 1 contradict"),
        ({"messages": [QUESTION, {**ANSWER, "reasoning_content": 1}]}, "reasoning_content of message 1 is a number"),
        ({"question": "q", "answer": "a", "image": "a.png", "images": ["b.png"]}, "columns 'images' and 'image', of"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "'history' .* is not a list of pairs"),
        ({"instruction": "i", "output": "\ud800"}, "message 1 holds half of a character"),
    ],
)
def test_mistakes(row: Row, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parsed(row)


def test_names_of_pairs_and_roles() -> None:
    row = {"q": "Hi", "a": "Ho", "system": "s"}
    attr: Row = {"formatting": "qa", "prompt": "q", "response": "a"}
    assert parsed(row, **attr).messages == [Message("system", "s"), Message("user", "Hi"), Message("assistant", "Ho")]
    with pytest.raises(ValueError, match=r"its column 'question' \(attr.prompt\) is missing; it has: q, a, system"):
        parsed(row, formatting="qa")
    row = {"conversations": [{"from": "ask", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert parsed(row, formatting="sharegpt", user_tag="ask").messages[0] == Message("user", "q")
    with pytest.raises(ValueError, match="has the role 'ask'; attr names the roles human, user, gpt"):
        parsed(row)
    order = ({"question": "q", "answer": "a", "images": ["a", "b"]}, "<image><image>q")
    assert parsed(order[0]).messages[0].text == order[1]



def test_the_log_names_the_format(root: Path, records: list[Row]) -> None:
    config = config_of(root, "named", [_llava(row) for row in records])
    reader = RecordReader(config, SPEC, config.dataset_param.basic_parameters.dataset_files, limit=None)
    assert len(list(reader.read())) == 9 and "id (9)" in reader.notes["unread"]
    assert reader.notes["format"] == (
        "format, recognised by the first records: llava (column conversations, keys from and value)"
    )


def test_the_guides_examples_are_read() -> None:
    text = (Path(__file__).parents[3] / "docs/formats.md").read_text()
    examples = re.findall(r"^`(\w+)`:\n```json\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in examples] == list(FORMATS)
    for name, example in examples:
        row = json.loads(example)
        form = recognise(Attributes(), [row])
        record = parse_record(row, form, SPEC)
        assert form.name == name and record.messages[-1].text in ("A dog.", "Ein Hund.")
        assert len(record.images) == (name != "alpaca")


IMAGES: dict[str, Callable[[bytes], Any]] = {
    "struct": lambda data: {"bytes": data, "path": None}, "bytes": lambda data: data,
    "base64": lambda data: base64.b64encode(data).decode(), "part": lambda data: data,
}


@pytest.mark.parametrize("mode", ["built", "on the fly", "streaming"])
@pytest.mark.parametrize("form", IMAGES)
def test_images_within_records(root: Path, records: list[Row], expected: list[Any], form: str, mode: str) -> None:
    """As Parquet files of the Hugging Face hub hold them, or as parts of a message with base64."""
    rows = []
    for row in records:
        held = [IMAGES[form](Path(path).read_bytes()) for path in row["images"]]
        rows.append({**row, "images": held})
        if form == "part":
            uris = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in held]
            parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
            text = {"type": "text", "text": row["messages"][0]["content"].replace("<image>", "")}
            first = {"role": "user", "content": [*parts, text]}
            rows[-1] = {"messages": [first, *row["messages"][1:]]}
    if form in ("part", "base64"):
        config = config_of(root, f"held {form}", rows, **MODES[mode])
    else:
        path = root / f"held {form}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        config = make_config(root, dataset=str(path), basic=MODES[mode])
    assert samples_of(config) == expected
    assert len(list((root / "cache/images").rglob("*.png"))) in (0, 6)  # each image once


@pytest.mark.parametrize(
    ("row", "attr", "expected"),
    [  # fields that differ from their defaults count, whatever is recognised
        ({"question": "q", "answer": "a", "long": "LONG"}, {"response": "long"}, ("q", "LONG", 0)),
        ({"question": "q", "answer": "a", "pics": ["a.png"]}, {"images": "pics"}, ("<image>q", "a", 1)),
        ({"conversations": [{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}]},
         {"user_tag": "gpt", "assistant_tag": "human"}, ("q", "a", 0)),
        ({"question": "q", "answer": "a", "images": ["a.png"]}, {"images": None}, ("q", "a", 0)),
        ({"instruction": "q", "context": "c", "response": "a"}, {}, ("q\nc", "a", 0)),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "image": ""}, {},
         ("q", "a", 0)),
    ],
)
def test_names_of_attr_count(row: Row, attr: Row, expected: tuple[str, str, int]) -> None:
    record = parsed(row, **attr)
    assert (*(message.text for message in record.messages), len(record.images)) == expected


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "q", "answer": "a", "query": "r", "response": "b"}, "has a column '(query|response)' besides"),
        ({"messages": [QUESTION, ANSWER], "conversations": [{"from": "human", "value": "q"}]}, "'conversations' bes"),
        ({"messages": [QUESTION, {**ANSWER, "loss_scale": 0.0}]}, "key 'loss_scale' of message 1 is 0.0, which would"),
        ({"messages": [QUESTION, ANSWER], "rejected_response": "b"}, "'rejected_response', of preference data"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "not valid JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a", "max_pixels": 9}]}, ANSWER]},
         "part of message 0 has max_pixels, which is not read"),
    ],
)
def test_what_another_trainer_would_read_otherwise_is_refused(row: Row, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parsed(row)


def test_objects_of_tables_have_the_keys_of_others() -> None:
    form = dataclasses.replace(recognise(Attributes(), [{"messages": [QUESTION, ANSWER]}]), columnar=True)
    for arguments in ({"x": {"a": 1, "b": None}}, {"x": [("a", 1)]}):
        call = {"tool_calls": [{"name": "f", "arguments": arguments}]}
        with pytest.raises(ValueError, match="store them as JSON text"):
            parse_record({"messages": [QUESTION, {**ANSWER, **call}]}, form, SPEC)


def test_a_file_of_two_formats_is_refused_by_its_records() -> None:
    rows = [{"messages": [QUESTION, ANSWER]}, {"conversations": [{"role": "user", "content": "q"}, ANSWER]}]
    assert recognise(Attributes(), rows).name == "messages"
    with pytest.raises(ValueError, match="'messages' .* is missing; it has: conversations"):
        parse_record(rows[1], recognise(Attributes(), rows), SPEC)


def test_train_on_prompt_leaves_out_answers_without_loss(root: Path) -> None:
    turns = [QUESTION, {**ANSWER, "loss": False}, QUESTION, ANSWER]
    (_, mask, _), = samples_of(config_of(root, "prompt", [{"messages": turns}], train_on_prompt=True))
    plain = [{key: turn[key] for key in ("role", "content")} for turn in turns]
    (_, every, _), = samples_of(config_of(root, "prompt", [{"messages": plain}], train_on_prompt=True))
    assert all(every) and 0 < mask.count(False) < len(mask) / 2


@pytest.mark.parametrize("mode", ["built", "on the fly", "streaming"])
def test_whether_there_are_videos(root: Path, records: list[Row], mode: str) -> None:
    """Only then do checkpoints record the limits of videos."""
    frames = [path for row in records for path in row["images"]][:2]
    video = {"messages": [{"role": "user", "content": "<video>"}, ANSWER], "videos": [frames]}
    for name, rows, found in (("still", records, False), ("moving", [*records, video], True)):
        config = config_of(root, name, rows, **MODES[mode])
        media = SPEC.read_media_settings(config, checkpoint_config(root / "checkpoint"))
        media = dataclasses.replace(media, videos=VideoSettings(0, 16384, 4096, 1 << 24, 2.0, 4, 64))
        dataset, _ = build_datasets(config, spec=SPEC, media=media, seq_length=512, seed=0)
        assert dataset.has_videos is found
