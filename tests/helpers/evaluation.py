"""What tests of evaluation need: a tiny model that answers, and questions about its images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.tiny_recipe import write_recipe

# Qwen's format, without its tools and system defaults
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_evaluation(root: Path, *, records: int = 8) -> Path:
    """:func:`~tests.helpers.tiny_recipe.write_recipe` with a chat template for generation; returns ``root``."""
    write_recipe(root, records=records)
    (root / "checkpoint" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return root


def write_records(path: Path, *records: dict[str, Any]) -> str:
    """A JSON data file; returns its path."""
    path.write_text(json.dumps(records))
    return str(path)


def qa(question: str, answer: Any, **columns: Any) -> dict[str, Any]:
    """A record that is a question and its answer."""
    return {"question": question, "answer": answer, **columns}
