"""Token ids against the published chat templates of Qwen3-VL.

What the templates render for ``chat_reference.CASES`` is recorded. To compare with the templates themselves, and for
arbitrary conversations, name a checkpoint's directory or a template file:

    CHAT_TEMPLATES="instruct=ckpt/hf_path/Qwen3-VL-30B-A3B-Instruct thinking=..." \
        python -m pytest tests/ut/models/test_published_chat_templates.py
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data.formats import format_of
from mindspeed_mm.data.parsing import parse_record
from mindspeed_mm.data.template_check import compare_with_checkpoint
from mindspeed_mm.interfaces.conversation import ChatTemplateOptions
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.chat_reference import ATTR, CASES, RENDERINGS, media_of, read_template, render, with_placeholders
from tests.helpers.tiny_data import build_tiny, make_config, write_dataset
from tests.helpers.tiny_tokenizer import write_tiny_tokenizer

RECORDED = json.loads(RENDERINGS.read_text())
TEMPLATES = dict(pair.split("=", 1) for pair in os.environ.get("CHAT_TEMPLATES", "").split())
OPTIONS: dict[str, dict[str, Any]] = {
    "instruct": {"name": "qwen3_vl_nothink"},
    "thinking": {"name": "qwen3_vl", "enable_thinking": True},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def our_ids(tokenizer: Any, row: dict, **options: Any) -> list[int]:
    messages = parse_record(row, format_of(ATTR), SPEC).messages
    template = SPEC.build_chat_template(tokenizer, ChatTemplateOptions(**options))
    encoded = template.encode(messages, media_of(row), max_length=9999)
    assert encoded is not None and encoded.dropped_messages == 0
    return encoded.input_ids.tolist()


def their_ids(tokenizer: Any, row: dict, rendered: str) -> list[int]:
    return tokenizer(with_placeholders(rendered, media_of(row)), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", sorted(OPTIONS))
@pytest.mark.parametrize("place", range(len(CASES)))
def test_ids_equal_the_recorded_renderings(tokenizer: Any, kind: str, place: int) -> None:
    row, rendered = CASES[place], RECORDED[kind]["rendered"][place]
    assert our_ids(tokenizer, row, **OPTIONS[kind]) == their_ids(tokenizer, row, rendered)


def test_the_comparison_sees_a_difference(tokenizer: Any) -> None:
    """The templates differ from each other in seven cases: as many fail when they are exchanged."""
    exchanged = [
        our_ids(tokenizer, row, **OPTIONS["instruct"]) != their_ids(tokenizer, row, rendered)
        for row, rendered in zip(CASES, RECORDED["thinking"]["rendered"], strict=True)
    ]
    assert (
        7
        <= sum(exchanged)
        == sum(
            one != other for one, other in zip(*(RECORDED[kind]["rendered"] for kind in sorted(OPTIONS)), strict=True)
        )
    )


def test_without_thoughts_the_thinking_template_shows_an_empty_one(tokenizer: Any) -> None:
    """``enable_thinking`` false gives the ids of the Thinking template for answers whose thoughts are taken out."""
    for row, rendered in zip(CASES, RECORDED["thinking"]["rendered"], strict=True):
        if "think" not in json.dumps(row):
            assert our_ids(tokenizer, row, name="qwen3_vl") == their_ids(tokenizer, row, rendered)


@pytest.mark.parametrize("kind", sorted(TEMPLATES))
def test_recorded_renderings_are_the_templates_own(kind: str) -> None:
    template = read_template(Path(TEMPLATES[kind]))
    assert [render(template, row) for row in CASES] == RECORDED[kind]["rendered"]
    digest = hashlib.sha256(template.encode()).hexdigest()
    if digest != RECORDED[kind]["sha256"]:
        pytest.skip(f"rendered alike by another template than the recorded one, {digest}")


# Enough of each published template to tell them apart.
INSTRUCT = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% for c in [m.content] if c is string %}{{ c }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
)
THINKING = INSTRUCT.replace(
    "{% else %}{{ p.text }}",
    "{% elif m.role == 'assistant' %}{% set answer = p.text.split('</think>')[-1].lstrip('\n') %}{% if loop.last and "
    "m == messages[-1] %}{{ '<think>\n' ~ ('let me see' if 'see' in p.text else '') ~ '\n</think>\n\n' }}{% endif %}"
    "{{ answer }}{% else %}{{ p.text }}",
)


@pytest.mark.parametrize(
    ("published", "name", "thinks", "remedy"),
    [
        (INSTRUCT, "qwen3_vl_nothink", False, None),
        (INSTRUCT, "qwen3_vl", True, r'template "qwen3_vl_nothink" does$'),
        (THINKING, "qwen3_vl", True, None),
        (THINKING, "qwen3_vl", False, None),
        (THINKING, "qwen3_vl_nothink", False, r'template "qwen3_vl" with enable_thinking does$'),
        ("{{ messages[0].content }}", "qwen3_vl_nothink", False, "no other template here does either$"),
        ("{{ raise_exception('no') }}", "qwen3_vl_nothink", False, None),
    ],
)
def test_another_template_than_the_checkpoints_is_noticed(
    tokenizer: Any, tmp_path: Path, published: str, name: str, thinks: bool, remedy: str | None
) -> None:
    options = ChatTemplateOptions(name=name, enable_thinking=thinks)
    assert compare_with_checkpoint(tokenizer, tmp_path, SPEC, options) == ""
    for file, content in (
        ("chat_template.jinja", published),
        ("chat_template.json", json.dumps({"chat_template": published})),
    ):
        (tmp_path / file).write_text(content)
        warning = compare_with_checkpoint(tokenizer, tmp_path, SPEC, options)
        assert re.search(remedy, warning) if remedy else warning == ""
        (tmp_path / file).unlink()


def test_the_log_says_so_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(tmp_path, 4)
    (tmp_path / "checkpoint" / "chat_template.jinja").write_text(THINKING)
    for basic in ({}, {}, {"streaming": True}):
        caplog.clear()
        with caplog.at_level(logging.INFO, "mindspeed_mm"):
            build_tiny(make_config(tmp_path, dataset=str(tmp_path / "data.json"), basic=basic))
        said = [record.getMessage() for record in caplog.records]
        assert any(line.endswith('template "qwen3_vl" with enable_thinking does') for line in said)
        assert basic or any("4 records, 4 kept whole" in line for line in said)


@pytest.mark.parametrize("tools", ["[1", "3", [4], {"name": "f"}])
def test_tools_that_are_none(tools: Any) -> None:
    with pytest.raises(ValueError, match=r"column 'tools' \(attr.tools\)"):
        parse_record({**CASES[0], "tools": tools}, format_of(ATTR), SPEC)
    assert parse_record({**CASES[0], "tools": ""}, format_of(ATTR), SPEC).messages[0].role == "user"


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """System message or not, tools or not, turns with media, calls in between, thoughts in odd places."""
    words = st.text(alphabet=st.sampled_from("ab 7\nü狗.{}'"), max_size=10)
    pieces = st.lists(
        st.one_of(words, st.sampled_from(["<think>", "</think>", "\n", "<tool_response>", "<image>"])), max_size=5
    ).map("".join)
    turns: list[dict[str, str]] = []
    for _ in range(draw(st.integers(1, 3))):
        question = draw(pieces) + draw(st.sampled_from(["", "<video>", "</tool_response>"]))
        turns.append({"role": "user", "content": question})
        for _ in range(draw(st.integers(0, 2))):
            calls = draw(
                st.lists(
                    st.fixed_dictionaries(
                        {
                            "name": words,
                            "arguments": st.one_of(
                                pieces, st.dictionaries(words, st.one_of(pieces, st.integers(), st.none()), max_size=2)
                            ),
                        }
                    ),
                    min_size=1,
                    max_size=2,
                )
            )
            turns.append({"role": "function_call", "content": json.dumps(calls)})
            turns += [{"role": "observation", "content": draw(words)} for _ in range(draw(st.integers(1, 2)))]
        turns.append({"role": "assistant", "content": draw(pieces)})
    media = [turn["content"].count for turn in turns if turn["role"] == "user"]
    row: dict[str, Any] = {"messages": turns}
    for tag, column in (("<image>", "images"), ("<video>", "videos")):
        row[column] = ["file"] * sum(count(tag) for count in media)
    if draw(st.booleans()):
        row["system"] = draw(words)
    if draw(st.booleans()):
        row["tools"] = [{"name": draw(words)} for _ in range(draw(st.integers(1, 2)))]
    return row


@pytest.mark.parametrize("kind", sorted(TEMPLATES))
@given(row=records())
@settings(max_examples=400)
def test_any_record_by_the_template_itself(tokenizer: Any, kind: str, row: dict) -> None:
    template = read_template(Path(TEMPLATES[kind]))
    assert our_ids(tokenizer, row, **OPTIONS[kind]) == their_ids(tokenizer, row, render(template, row))
