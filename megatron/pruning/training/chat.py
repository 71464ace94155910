"""Conversations as a model reads them: through the chat template of its tokenizer, with the assistant's tokens marked.

A template is data of a checkpoint; transformers renders it in its sandbox, and no code of a tokenizer is run.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.pruning.storage.records import value_at
from megatron.pruning.storage.small_files import is_text

ASSISTANT = "assistant"  # the role whose words are learned
_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]


class Conversation(NamedTuple):
    """The tokens of a conversation, and 1 for each that counts in the loss, else 0: both `[tokens]`."""

    tokens: NDArray[np.int64]
    counts: NDArray[np.uint8]


def require_template(tokenizer: Any, flag: str, where: Path | str) -> None:
    """Raise ValueError unless transformers' tokenizer, of the files in `where`, has a chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{flag}: the tokenizer of {where} has no chat template: name an Instruct model, or put its "
            "chat_template.jinja there"
        )


def messages_at(record: dict[str, Any], key: str) -> list[Message]:
    """Return the messages under a key of a record, or a path of keys.

    Raises ValueError unless each is an object with a role and a content.
    """
    messages = value_at(record, key)
    if not isinstance(messages, list) or not messages:
        kind = "an empty list" if messages == [] else type(messages).__name__
        raise ValueError(f'"{key}" holds {kind}, not a list of messages')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f'"{key}" message {number} is no object with a "role" and a "content"')
    if not is_text(json.dumps(messages, ensure_ascii=False)):
        raise ValueError(f'"{key}" holds half a surrogate pair, which is no text')
    return messages


def encode(tokenizer: Any, messages: Sequence[Message], mask_prompt: bool) -> Conversation:
    """Return a conversation's tokens, those of `apply_chat_template`; with `mask_prompt` only the assistant's count.

    These are what the template has between {% generation %} and {% endgeneration %}, or else what it adds for each of
    the assistant's messages, after the prompt for it and with the end that it writes after them.

    Raises ValueError when the template refuses the messages, or does not let the assistant's words be found.
    """
    whole = _rendered(tokenizer, messages)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=mask_prompt, verbose=False)
    tokens = np.asarray(found["input_ids"], dtype=np.int64)
    if not mask_prompt:
        return Conversation(tokens, np.ones(len(tokens), dtype=np.uint8))
    if _MARKS_ASSISTANT.search(_template_of(tokenizer)):
        marked = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Conversation(tokens, np.asarray(marked["assistant_masks"], dtype=np.uint8))
    starts, ends = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    counts = np.zeros(len(tokens), dtype=np.uint8)
    for start, end in _assistant_spans(tokenizer, messages, whole):
        counts[(ends > start) & (starts < end)] = 1
    return Conversation(tokens, counts)


def _assistant_spans(tokenizer: Any, messages: Sequence[Message], whole: str) -> Iterator[tuple[int, int]]:
    """Yield where in the `whole` text each of the assistant's messages begins and ends, by what the template adds."""
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        asked = _rendered(tokenizer, messages[:number], add_generation_prompt=True) if number else ""
        told = _rendered(tokenizer, messages[: number + 1])
        if not (told.startswith(asked) and whole.startswith(told)):
            raise ValueError(
                f"the chat template writes the first {number + 1} of {len(messages)} messages otherwise where others "
                "follow, so that the assistant's words cannot be told from the prompt: put {% generation %} around "
                "them in the template, or leave out --mask-prompt"
            )
        yield len(asked), len(told)


def _rendered(tokenizer: Any, messages: Sequence[Message], **how: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **how)
    except Exception as error:  # a template may fail in any way, and raise errors of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"the chat template refuses the messages: {reason}") from error
    return text


def _template_of(tokenizer: Any) -> str:
    """Return the template that transformers takes where none is named."""
    template: str = tokenizer.get_chat_template()
    return template
