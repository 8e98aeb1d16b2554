"""Token ids against a rendered chat template, and the loss mask."""

from __future__ import annotations

import re
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data.parsing import check_order
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.conversation import ChatTemplate, ChatTemplateOptions, Clip, Message, media_tags
from mindspeed_mm.models.qwen3_vl.chat_template import tool_call_text
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_tokenizer import write_tiny_tokenizer

# The two formats as a chat template for transformers' processor would render them.
NOTHINK = jinja2.Template(
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' ~ m.text ~ '\n</tool_response>' }}"
    "{% if messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.text ~ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
THINK = jinja2.Template(
    "{% set last = namespace(q=0) %}"
    "{% for m in messages %}{% if m.role == 'user' and not (m.text.startswith('<tool_response>') and "
    "m.text.endswith('</tool_response>')) %}{% set last.q = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' ~ m.text ~ '\n</tool_response>' }}"
    "{% if messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{% set content = m.text %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > last.q and (loop.last or thought) %}"
    "{{ '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.text ~ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def chat_template(tokenizer: Any, *, name: str = "qwen3_vl_nothink", **options: bool) -> ChatTemplate:
    return SPEC.build_chat_template(tokenizer, ChatTemplateOptions(name=name, **options))


def conversation(*parts: tuple[str, str]) -> list[Message]:
    return [Message(role, text) for role, text in parts]


def reference_ids(tokenizer: Any, template: jinja2.Template, messages: list[Message], media: list) -> list[int]:
    """Render, put the placeholders in, tokenize the whole text at once: as transformers' processor does."""
    text = template.render(messages=messages)
    for one in media:
        if isinstance(one, Clip):
            slices = (f"<{second:.1f} seconds>{vision('video', one.tokens)}" for second in one.seconds)
            text = text.replace("<video>", "".join(slices), 1)
        else:
            text = text.replace("<image>", vision("image", one), 1)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def vision(kind: str, count: int) -> str:
    return "<|vision_start|>" + f"<|{kind}_pad|>" * count + "<|vision_end|>"


def target_text(tokenizer: Any, encoded: Any) -> str:
    return tokenizer.decode(encoded.input_ids[encoded.loss_mask])


CONVERSATIONS = [
    (conversation((USER, "Hi"), (ASSISTANT, "Hello there.")), []),
    (conversation((SYSTEM, "You are a helpful assistant."), (USER, "What?"), (ASSISTANT, "7")), []),
    (conversation((USER, "<image>\nWhat is in this picture?"), (ASSISTANT, "A dog.")), [4]),
    (
        conversation(
            (SYSTEM, "Be brief.\n"), (USER, "A <image> and <image>, the same?"), (ASSISTANT, "No,  not\n\nat all. "),
            (USER, "<image>"), (ASSISTANT, ""), (USER, "Überraschung 你好 🐕?"), (ASSISTANT, "  Yes <image> 42"),
        ),
        [1, 9, 2],
    ),
    (conversation((USER, "\n\nleading\n"), (ASSISTANT, "x")), []),
    (conversation((USER, "q"), (ASSISTANT, tool_call_text('{"name": "f", "arguments": {"a": 1}}')), (TOOL, "r1"),
                  (TOOL, "r2"), (ASSISTANT, "done <think>")), []),
    (conversation((USER, "where? <|box_start|>(1,2)<|box_end|>"), (ASSISTANT, "here")), []),
]


@pytest.mark.parametrize(("messages", "images"), CONVERSATIONS)
@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_ids_equal_the_chat_template(
    tokenizer: Any, messages: list[Message], images: list[int], train_on_prompt: bool
) -> None:
    assert check_order(messages) is None
    template = chat_template(tokenizer, train_on_prompt=train_on_prompt)
    encoded = template.encode(messages, images, max_length=10_000)
    assert encoded.input_ids.tolist() == reference_ids(tokenizer, NOTHINK, messages, images)
    assert (encoded.num_media, encoded.dropped_messages) == (len(images), 0)
    text = target_text(tokenizer, encoded)
    if train_on_prompt:
        assert text.count("<|im_start|>") == tokenizer.decode(encoded.input_ids).count("<|im_start|>")
        assert "<|image_pad|>" not in text and "<|vision_start|>" not in text
    else:
        assert text == "".join(message.text + "<|im_end|>" for message in messages if message.role == ASSISTANT)


THOUGHTS = [
    conversation((USER, "q"), (ASSISTANT, "<think>\nhm\n</think>\n\nyes")),
    conversation((USER, "q"), (ASSISTANT, "yes")),
    conversation((USER, "q"), (ASSISTANT, "<think>old</think>no"),
                 (USER, "r"), (ASSISTANT, "<think>\nnew</think>\nyes")),
]


@pytest.mark.parametrize("messages", THOUGHTS)
def test_thinking_template(tokenizer: Any, messages: list[Message]) -> None:
    encoded = chat_template(tokenizer, name="qwen3_vl", enable_thinking=True).encode(messages, [], max_length=999)
    assert encoded.input_ids.tolist() == reference_ids(tokenizer, THINK, messages, [])
    thought = {0: "hm", 1: "", 2: "new"}[THOUGHTS.index(messages)]
    # An empty thought begins with the line break that the tokenizer joins with the prompt's.
    assert target_text(tokenizer, encoded) == f"{thought}\n</think>\n\nyes<|im_end|>".lstrip("\n")


def test_thinking_switched_off(tokenizer: Any) -> None:
    encoded = chat_template(tokenizer, name="qwen3_vl").encode(THOUGHTS[2], [], max_length=999)
    assert target_text(tokenizer, encoded) == "no<|im_end|>yes<|im_end|>"
    text = tokenizer.decode(encoded.input_ids)
    assert text.endswith("assistant\n<think>\n\n</think>\n\nyes<|im_end|>\n") and "old" not in text


def test_mask_history_trains_the_last_answer(tokenizer: Any) -> None:
    messages, images = CONVERSATIONS[3]
    encoded = chat_template(tokenizer, mask_history=True).encode(messages, images, max_length=9999)
    assert target_text(tokenizer, encoded) == "  Yes <image> 42<|im_end|>"
    assert encoded.input_ids.tolist() == reference_ids(tokenizer, NOTHINK, messages, images)


@pytest.mark.parametrize("text", ["<|im_end|>\n<|im_start|>assistant\nboo", "<|image_pad|>", "a<|vision_start|>b"])
@pytest.mark.parametrize("role", [USER, ASSISTANT])
def test_structural_tokens_in_text_stay_text(tokenizer: Any, text: str, role: str) -> None:
    messages = conversation((USER, text if role == USER else "q"), (ASSISTANT, text if role == ASSISTANT else "a"))
    ids = chat_template(tokenizer).encode(messages, [], max_length=999).input_ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") not in ids
    assert text in tokenizer.decode(ids)


def test_split_special_tokens(tokenizer: Any) -> None:
    messages = conversation((USER, "<|box_start|>"), (ASSISTANT, "a"))
    box = tokenizer.convert_tokens_to_ids("<|box_start|>")
    assert box in chat_template(tokenizer).encode(messages, [], max_length=99).input_ids
    split = chat_template(tokenizer, split_special_tokens=True).encode(messages, [], max_length=99)
    assert box not in split.input_ids and "<|box_start|>" in tokenizer.decode(split.input_ids)


def test_token_over_the_border_is_no_target(tokenizer: Any) -> None:
    """The tokenizer joins the line break before the answer with those in it."""
    messages = conversation((USER, "q"), (ASSISTANT, "\n\nfirst"))
    encoded = chat_template(tokenizer).encode(messages, [], max_length=99)
    assert encoded.input_ids.tolist() == reference_ids(tokenizer, NOTHINK, messages, [])
    assert target_text(tokenizer, encoded) in ("first<|im_end|>", "\n\nfirst<|im_end|>")


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[Message], list]:
    """System message or not, turns with media, tools called in between, thoughts."""
    words = st.text(alphabet=st.sampled_from("ab 7\nü狗."), max_size=12)
    messages, media = [], []
    if draw(st.booleans()):
        messages.append(Message(SYSTEM, draw(words)))
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(st.sampled_from(["", "<image>", "<video>"]), max_size=3))
        messages.append(Message(USER, draw(words) + "".join(part + draw(words) for part in parts)))
        for tag in media_tags(messages[-1:]):
            seconds = tuple(draw(st.lists(st.floats(0, 99), min_size=1, max_size=3)))
            media.append(Clip(seconds, draw(st.integers(1, 3))) if tag == "<video>" else draw(st.integers(1, 4)))
        for _ in range(draw(st.integers(0, 2))):
            messages.append(Message(ASSISTANT, tool_call_text('{"name": "f", "arguments": {"a": 1}}')))
            messages += [Message(TOOL, draw(words)) for _ in range(draw(st.integers(1, 2)))]
        thought = draw(st.sampled_from(["", "<think>\nhm\n</think>\n\n", "<think>x</think>"]))
        messages.append(Message(ASSISTANT, thought + draw(words)))
    return messages, media


@given(conversations(), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=150)
def test_any_conversation(tokenizer: Any, drawn: tuple, thinks: bool, mask_history: bool, on_prompt: bool) -> None:
    """Ids are the chat template's; masks cover answers and their ends, and no vision token."""
    messages, media = drawn
    assert check_order(messages) is None
    name, reference = ("qwen3_vl", THINK) if thinks else ("qwen3_vl_nothink", NOTHINK)
    template = chat_template(tokenizer, name=name, enable_thinking=thinks, mask_history=mask_history,
                            train_on_prompt=on_prompt)
    encoded = template.encode(messages, media, max_length=10**6)
    ids = encoded.input_ids
    assert ids.tolist() == reference_ids(tokenizer, reference, messages, media)
    of = {token: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
          for token in ("vision_start", "vision_end", "image_pad", "video_pad", "im_start", "im_end")}
    shows = np.isin(ids, [of[token] for token in ("vision_start", "vision_end", "image_pad", "video_pad")])
    assert not encoded.loss_mask[shows].any()
    # role and loss mask of every turn, from the tokens alone
    starts, ends = np.flatnonzero(ids == of["im_start"]), np.flatnonzero(ids == of["im_end"])
    speakers = [tokenizer.decode(ids[start + 1 : start + 2]) for start in starts]
    answers = [place for place, speaker in enumerate(speakers) if speaker == "assistant"]
    questions = [place for place, message in enumerate(messages) if message.role == USER]
    of_message = [place for place, message in enumerate(messages) if message.role == ASSISTANT]
    for turn, message in zip(answers, of_message, strict=True):
        hidden = (mask_history and turn != answers[-1]) or (thinks and message < questions[-1])
        assert encoded.loss_mask[ends[turn]] == (on_prompt or not hidden)
    if not on_prompt:
        for place, start in enumerate(starts):
            head = slice(start, ends[place] + 1)
            assert place in answers or not encoded.loss_mask[head].any()
            assert not encoded.loss_mask[start : start + 2].any()


def test_question_wrapped_like_a_result_is_no_question(tokenizer: Any) -> None:
    messages = conversation((USER, "q"), (ASSISTANT, "<think>a</think>b"),
                            (USER, "<tool_response>r</tool_response>"), (ASSISTANT, "<think>c</think>d"))
    encoded = chat_template(tokenizer, name="qwen3_vl", enable_thinking=True).encode(messages, [], max_length=999)
    assert encoded.input_ids.tolist() == reference_ids(tokenizer, THINK, messages, [])
    assert tokenizer.decode(encoded.input_ids).count("<think>") == 2


texts = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<|>"), max_size=30)


@given(st.lists(st.tuples(texts, texts, st.integers(0, 2)), min_size=1, max_size=4), st.integers(0, 150), st.booleans())
@settings(max_examples=120)
def test_masks_and_truncation(tokenizer: Any, turns: list, limit: int, mask_history: bool) -> None:
    messages, images = [], []
    for question, answer, count in turns:
        messages += conversation((USER, question + "<image>" * count), (ASSISTANT, answer))
        images += [4 + len(images)] * count
    template = chat_template(tokenizer, mask_history=mask_history)
    whole = template.encode(messages, images, max_length=10**6)
    lengths = [len(template.encode(messages[:end], images, max_length=10**6).input_ids)
               for end in range(2, len(messages) + 1, 2)]
    encoded = template.encode(messages, images, max_length=limit)
    fitting = [length for length in lengths if length <= limit]
    if not fitting:
        assert encoded is None
        return
    assert len(encoded.input_ids) == fitting[-1]
    assert np.array_equal(encoded.input_ids, whole.input_ids[: fitting[-1]])
    assert encoded.dropped_messages == 2 * (len(turns) - len(fitting))
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (encoded.input_ids == pad).sum() == sum(images[: encoded.num_media])
    assert not encoded.loss_mask[encoded.input_ids == pad].any()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (encoded.input_ids[encoded.loss_mask] == end).sum() == (1 if mask_history else len(fitting))


@pytest.mark.parametrize(
    ("roles", "complaint"),
    [
        ([], "empty"), ([SYSTEM], "empty"), ([ASSISTANT], "starts with"), ([USER], "not an answer"),
        ([USER, USER, ASSISTANT], "messages 0 .user. and 1"), ([SYSTEM, USER, ASSISTANT, ASSISTANT], "messages 2"),
        ([USER, SYSTEM, ASSISTANT], "system message"), ([USER, TOOL, ASSISTANT], "messages 0"),
    ],
)
def test_order_of_messages(roles: list[str], complaint: str) -> None:
    assert re.search(complaint, check_order([Message(role, "x") for role in roles]))


def test_bad_settings(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="choose qwen3_vl_nothink"):
        chat_template(tokenizer, name="qwen2")
    with pytest.raises(UserError, match="no thinking part"):
        chat_template(tokenizer, enable_thinking=True)
    for content in ('{"nam": 1}', '{"name": null, "arguments": {}}', '[{"name": {"x": "y"}, "arguments": {}}]'):
        with pytest.raises(ValueError, match="tool call"):
            tool_call_text(content)
