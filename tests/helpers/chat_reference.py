"""Conversations rendered by a checkpoint's own chat template, to compare token ids with.

    python -m tests.helpers.chat_reference NAME=CHECKPOINT_OR_JINJA_FILE ...

renders ``CASES`` anew with the templates given and writes ``tests/ut/data/chat_renderings.json``. The templates
themselves are not kept here; their digests are, so that it can be seen which ones were used.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from mindspeed_mm.config.data_config import Attributes
from mindspeed_mm.data.template_check import read_published_template
from mindspeed_mm.interfaces.conversation import Clip

RENDERINGS = Path(__file__).parents[1] / "ut" / "data" / "chat_renderings.json"
ATTR = Attributes(videos="videos", system="system", tools="tools", system_tag="system", observation_tag="observation",
                  function_tag="function_call")
CLIP = Clip((0.25, 1.5, 12.0), 2)
_MEDIA = re.compile("(<image>|<video>)")
_VISION = re.compile(r"<\|vision_start\|><\|(image|video)_pad\|><\|vision_end\|>")
_WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "Today's weather <& more> \u2013 \u5929\u6c14", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"]},
}}


def _call(name: str, arguments: Any) -> dict[str, str]:
    return {"role": "function_call", "content": json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)}


def _talk(*texts: str, **columns: Any) -> dict[str, Any]:
    """A record whose texts are questions and answers in turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)], **columns}


_TOOL_TURNS = [
    {"role": "user", "content": "<image>\nIs it raining there?"}, _call("weather", {"city": "K\u00f6ln", "days": 2}),
    {"role": "observation", "content": '{"rain": true}'}, {"role": "assistant", "content": "Yes, take an umbrella."},
]
_TWO_CALLS = [
    {"role": "user", "content": "Compare Paris and Rome."},
    {"role": "function_call", "content": json.dumps([{"name": "weather", "arguments": {"city": "Paris"}},
                                                     {"name": "weather", "arguments": '{"city": "Rome"}'}])},
    {"role": "observation", "content": "18\n\u00b0C"}, {"role": "observation", "content": "25"},
    {"role": "assistant", "content": "Rome is warmer.\n"}, {"role": "user", "content": "And Oslo?"},
    _call("weather", {"city": "Oslo", "note": "</think> <b>"}), {"role": "observation", "content": ""},
    {"role": "assistant", "content": "<think>\nno answer\n</think>\n\nI do not know."},
]
# Records as data files hold them; ``attr`` is ATTR.
CASES: list[dict[str, Any]] = [
    _talk("Hi", "Hello there."),
    _talk("<image>\nWhat is in this picture?", "A dog on a bench.", images=["a.jpg"]),
    _talk("What is this?\n<image>", "", images=["a.jpg"]),
    _talk("<image><image> A <image>, <image>\n\nsame?  ", " No,  not\n\nat all. \n", images=["a", "b", "c", "d"]),
    _talk("Watch <video> and <image>: which is older? <video>", "The first.", videos=["a.mp4", "b.mp4"], images=["a"]),
    _talk("<video>", "A cat.", videos=["a.mp4"], system="You are a helpful assistant."),
    _talk("\n\n\u00dcberraschung \u4f60\u597d \U0001f415?", "\n\n\u7b54\u6848 42\n\n\n", "Why?", "  Because.", "", "x",
          system=" Be brief.\n"),
    _talk("where? <|box_start|>(1,2)<|box_end|>", "<|object_ref_start|>here<|object_ref_end|>"),
    _talk("{{ 7 * 7 }} {% raw %} 'quoted' \"twice\" \\n <b>&amp;</b>", "49 {{ messages }}"),
    _talk("q", "An <image> in an answer is text, and so is <video>.", "r <image>", "s", images=["a"]),
    {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "q"},
                  {"role": "assistant", "content": "a"}]},
    {"messages": _TOOL_TURNS, "images": ["a.jpg"], "tools": [_WEATHER]},
    {"messages": _TOOL_TURNS, "images": ["a.jpg"], "tools": json.dumps([_WEATHER]), "system": "Be brief."},
    {"messages": [{"role": "system", "content": ""}, *_TWO_CALLS], "tools": [_WEATHER, _WEATHER["function"]]},
    {"messages": _TWO_CALLS},
    {"messages": _TWO_CALLS[:2]},
    _talk("q", "<think>\nhm\n</think>\n\nyes"),
    _talk("q", "<think>old</think>no", "r", "<think>\n\nnew </think>\n\n\nyes"),
    _talk("q", "no thought", "r", "none here either\n", system="s"),
    _talk("q", "<think>a</think>b</think>c", "<tool_response>r</tool_response>", "<think>c\n\n</think>d"),
    _talk("<tool_response>r</tool_response>", "<think>c</think>d"),
    _talk("<image><tool_response>r</tool_response>", "<think>c</think>d", images=["a"]),
]


def media_of(row: dict[str, Any]) -> list[int | Clip]:
    """Placeholders of a record's media in order of their tags: the n-th image has n tokens, every video is CLIP."""
    tags = [tag for turn in row["messages"] if turn["role"] == "user" for tag in _MEDIA.findall(turn["content"])]
    return [CLIP if tag == "<video>" else place + 1 for place, tag in enumerate(tags)]


def read_template(path: Path) -> str:
    """The chat template of a checkpoint's directory, or of a file of its own."""
    template = path.read_text() if path.is_file() else read_published_template(path)
    if template is None:
        raise SystemExit(f"error: {path} has no chat template")
    return template


def _as_transformers(turn: dict[str, str]) -> dict[str, Any]:
    """A message as transformers' chat templates take it."""
    role, text = turn["role"], turn["content"]
    if role == "user" and _MEDIA.search(text):
        return {"role": role, "content": [{"type": part[1:-1]} if _MEDIA.fullmatch(part) else
                                          {"type": "text", "text": part} for part in _MEDIA.split(text) if part]}
    if role == "function_call":
        calls = json.loads(text)
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}
                                                                   for call in calls]}
    return {"role": "tool" if role == "observation" else role, "content": text}


def render(template: str, row: dict[str, Any]) -> str:
    """A record as transformers' ``apply_chat_template`` renders it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [_as_transformers(turn) for turn in row["messages"]]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    tools = row.get("tools")
    rendered, _ = render_jinja_template(conversations=[messages], chat_template=template,
                                        tools=json.loads(tools) if isinstance(tools, str) else tools)
    return rendered[0]


def with_placeholders(text: str, media: list[int | Clip]) -> str:
    """A rendered text with each image's and slice's placeholders, as ``Qwen3VLProcessor`` puts them in."""
    remaining = iter(media)

    def widen(match: re.Match[str]) -> str:
        one = next(remaining)
        if isinstance(one, Clip):
            return "".join(f"<{second:.1f} seconds>{_vision('video', one.tokens)}" for second in one.seconds)
        return _vision("image", one)

    return _VISION.sub(widen, text)


def _vision(kind: str, count: int) -> str:
    return "<|vision_start|>" + f"<|{kind}_pad|>" * count + "<|vision_end|>"


def main(arguments: list[str]) -> None:
    """Write the renderings."""
    content = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        template = read_template(Path(path))
        content[name] = {"sha256": hashlib.sha256(template.encode()).hexdigest(),
                         "rendered": [render(template, row) for row in CASES]}
    RENDERINGS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
