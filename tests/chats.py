"""Conversations for tests, and a tiny model with a chat template to read them."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from commands import ROOT

# What models of this kind write: a header for each message, and an end of the turn that is the eos token.
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The same, which marks the assistant's words itself.
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{{ eos_token }}\n{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# One whose words for a message depend on what follows it.
UNSTABLE = "{% for m in messages %}{{ '!' if loop.last else '?' }}{{ m['content'] }}{% endfor %}"


def instruct(path: Path, template: str = TEMPLATE) -> Path:
    """Copy the embedded model, and give it a chat template."""
    shutil.copytree(ROOT / "assets/tiny-llama", path)
    (path / "chat_template.jinja").write_text(template)
    return path


def said(*turns: str, system: str | None = None) -> dict[str, Any]:
    """Return a record of a conversation in which the user and the assistant take turns."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages}


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CHATS = [
    said("sum two", "return a + b"),
    said("héllo ☃", "import os\n\n", "and more", "x = 1", system="You write Python."),
    said("one", "1", "two", "22", "three", "333  "),
    said("print it", "print('it')\n" * 9),
]
