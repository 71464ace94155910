"""Conversations to tokens: the ids of the tokenizer's own template, and a mask of the assistant's turns beside them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import preprocess_data as tool
import pytest
from chats import CHATS, MARKED, TEMPLATE, UNSTABLE, instruct, said, write_records
from test_preprocess_data import documents
from transformers import AutoTokenizer

from megatron.pruning.training.chat import encode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return instruct(tmp_path_factory.mktemp("chat") / "instruct")


def preprocess(tmp_path: Path, model: Path, records: list[dict[str, Any]], *more: str) -> None:
    lines = write_records(tmp_path / "chat.jsonl", records)
    words = ["--input", str(lines), "--output-prefix", str(tmp_path / "p"), "--load", str(model)]
    tool.main([*words, "--chat", "messages", *more])


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["by prefixes", "marked"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ids_are_the_templates_and_the_assistants_turns_count(
    template: str, workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = instruct(tmp_path / "model", template)
    preprocess(tmp_path, model, CHATS, "--mask-prompt", "--workers", workers)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens, masks = documents(tmp_path / "p", "messages"), documents(tmp_path / "p", "messages_document_mask", "")
    assert [mask.dtype for mask in masks] == [np.dtype(np.uint8)] * len(CHATS)
    for record, ids, mask in zip(CHATS, tokens, masks, strict=True):
        assert ids.tolist() == tokenizer.apply_chat_template(record["messages"], return_dict=True)["input_ids"]
        learned = "".join(m["content"] + "</s>\n" for m in record["messages"] if m["role"] == "assistant")
        assert tokenizer.decode(ids[mask == 1]) == learned
    counted = sum(int(mask.sum()) for mask in masks)
    told = f"4 documents, {sum(map(len, tokens)):,} tokens, of which {counted:,} count in the loss: "
    assert capsys.readouterr().out.splitlines()[-1].startswith(told)


def test_without_a_masked_prompt_all_tokens_count(tmp_path: Path, model: Path) -> None:
    preprocess(tmp_path, model, CHATS)
    assert all(mask.all() for mask in documents(tmp_path / "p", "messages_document_mask", ""))


def test_what_is_too_long_or_silent_is_left_out_and_told_in_numbers(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = {"messages": [{"role": "user", "content": "nobody answers"}]}
    whole = [len(encode(AutoTokenizer.from_pretrained(model), chat["messages"], True).tokens) for chat in CHATS]
    longest = sorted(whole)[-2]
    preprocess(tmp_path, model, [*CHATS, silent], "--mask-prompt", "--max-length", str(longest))
    found = documents(tmp_path / "p", "messages")
    assert [len(ids) for ids in found] == [min(length, longest) for length in whole]
    told = f"1 conversations left out, without a turn of the assistant, 1 conversations cut to --max-length {longest}, "
    assert f"{told}{max(whole) - longest:,} tokens" in capsys.readouterr().out


def test_a_limit_that_leaves_no_answer_is_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(tmp_path, model, [*CHATS, said("why? " * 400, "yes")], "--mask-prompt", "--max-length", "900")
    assert len(documents(tmp_path / "p", "messages")) == len(CHATS)
    told = "1 conversations left out, of which --max-length 900 leaves no turn of the assistant: "
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": "hello"}, '"messages" holds str, not a list of messages'),
        ({"messages": []}, '"messages" holds an empty list, not a list of messages'),
        ({"messages": [{"from": "x"}]}, '"messages" message 1 is no object with a "role" and a "content"'),
        ({"text": "x"}, 'there is no "messages", only text'),
        (said("\ud800", "x"), '"messages" holds half a surrogate pair, which is no text'),
        ({"messages": [{"role": "user", "content": None}]}, "the chat template refuses the messages: "),
    ],
)
def test_bad_conversation_is_named_and_skipped_on_demand(
    record: dict[str, Any], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = instruct(tmp_path / "model", "{{ messages[0]['content'] + '' }}" + TEMPLATE)
    with pytest.raises(ValueError) as refusal:
        preprocess(tmp_path, model, [*CHATS, record])
    assert str(refusal.value).startswith(f"{tmp_path}/chat.jsonl line 5: {complaint}")
    assert not list(tmp_path.glob("*p_messages*"))
    preprocess(tmp_path, model, [*CHATS, record], "--skip-bad-lines")
    assert ", 1 bad lines skipped" in capsys.readouterr().out


def test_a_template_that_does_not_let_the_assistant_be_found_says_so(tmp_path: Path) -> None:
    model = instruct(tmp_path / "model", UNSTABLE)
    with pytest.raises(ValueError, match=r"line 1: .*the first 1 of 2 messages otherwise|put {% generation %} around"):
        preprocess(tmp_path, model, [CHATS[2]], "--mask-prompt")
    preprocess(tmp_path, model, [CHATS[2]])


def test_mistakes_end_in_one_sentence(tmp_path: Path, model: Path) -> None:
    bare = instruct(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    words = ["--input", "x", "--output-prefix", str(tmp_path / "p")]
    for more, sentence in [
        (["--mask-prompt"], "--mask-prompt is for conversations: add --chat messages"),
        (["--max-length", "9"], "--max-length is for conversations: add --chat messages"),
        (["--chat", "messages", "--append-eod"], "--append-eod cannot be combined with --chat: a chat template writes"),
        (["--chat", "messages", "--json-key", "text"], "--json-keys cannot be combined with --chat: --chat names the"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            tool.main([*words, *more])
    lines = write_records(tmp_path / "chat.jsonl", CHATS)
    words = ["--input", str(lines), "--output-prefix", str(tmp_path / "p"), "--chat", "messages"]
    with pytest.raises(ValueError, match="--chat needs a tokenizer with a chat template: name its checkpoint with --l"):
        tool.main(words)
    for flag, place in {"--load": bare, "--tokenizer-model": bare / "tokenizer.json"}.items():
        with pytest.raises(ValueError, match=f"--chat: the tokenizer of {place} has no chat template: name an Instruc"):
            tool.main([*words, flag, str(place)])
    tool.main([*words, "--tokenizer-model", str(model)])
    assert len(documents(tmp_path / "p", "messages")) == len(CHATS)


def test_text_that_replaces_conversations_takes_their_mask_away(tmp_path: Path, model: Path) -> None:
    preprocess(tmp_path, model, CHATS)
    assert len(list(tmp_path.glob("p_messages_document_mask.*"))) == 2
    lines = write_records(tmp_path / "text.jsonl", [{"messages": "plain text"}])
    words = ["--input", str(lines), "--output-prefix", str(tmp_path / "p"), "--load", str(model)]
    tool.main([*words, "--json-keys", "messages"])
    assert not list(tmp_path.glob("p_messages_document_mask.*"))
    assert len(documents(tmp_path / "p", "messages")) == 1


def test_conversations_may_lie_deeper(tmp_path: Path, model: Path) -> None:
    lines = tmp_path / "deep.jsonl"
    lines.write_text("".join(json.dumps({"a": {"b": chat["messages"]}}) + "\n" for chat in CHATS))
    words = ["--input", str(lines), "--output-prefix", str(tmp_path / "p"), "--load", str(model), "--chat", "a.b"]
    tool.main(words)
    assert len(documents(tmp_path / "p", "a.b")) == len(CHATS)
