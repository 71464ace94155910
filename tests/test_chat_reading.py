"""Conversations are evaluated by what counts in them, and scored and reconstructed with, from either kind of file."""

import functools
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import preprocess_data
import pytest
import torch
from chats import CHATS, instruct, said, write_records
from commands import ROOT
from helpers import convert, hf_logits, make_llama
from stock_loop import StockLoop

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.training.calibration import calibration
from megatron.pruning.training.chat import encode
from megatron.pruning.training.tokens import windows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a template, and conversations in every kind of file."""
    path = tmp_path_factory.mktemp("reading")
    instruct(path / "model")
    lines = write_records(path / "chat.jsonl", CHATS)
    (path / "chat.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    words = ["--input", str(lines), "--output-prefix", str(path / "p"), "--load", str(path / "model")]
    preprocess_data.main([*words, "--chat", "messages", "--mask-prompt"])
    return path


def evaluated(folder: Path, data: str, *more: str) -> dict[str, Any]:
    words = ["--data", str(folder / data), "--chat", "--device", "cpu", "--dtype", "fp32", *more]
    evaluate.main([*words, "--load", str(folder / "model"), "--json", str(folder / "out.json")])
    (result,) = json.loads((folder / "out.json").read_text())
    return result


@functools.cache
def loss_alone(folder: Path, longest: int) -> float:
    """Return the loss of the assistant's tokens, each conversation read by transformers alone."""
    from transformers import AutoTokenizer

    total, count, tokenizer = 0.0, 0, AutoTokenizer.from_pretrained(folder / "model")
    for chat in CHATS:
        tokens, counts = encode(tokenizer, chat["messages"], True)
        ids = torch.from_numpy(tokens)[None, : longest + 1]
        losses = torch.nn.functional.cross_entropy(
            hf_logits(folder / "model", ids[:, :-1])[0], ids[0, 1:], reduction="none"
        )
        wanted = torch.from_numpy(counts)[1 : longest + 1] > 0
        total, count = total + float(losses[wanted].double().sum()), count + int(wanted.sum())
    return total / count


def test_a_layer_at_a_time_what_counts_is_the_same(folder: Path) -> None:
    words = ["--chat", "--layer-by-layer", "--dtype=fp32", f"--data={folder / 'chat.jsonl.gz'}", "--batch-size=3"]
    words += [f"--load={folder / 'model'}", f"--json={folder / 'layered.json'}"]
    StockLoop(folder).run_all([{"name": "l", "program": "evaluate", "words": words, "ranks": 2}])["l"].ok()
    (result,) = json.loads((folder / "layered.json").read_text())
    assert result["loss"] == pytest.approx(loss_alone(folder, 512), abs=1e-5)


@pytest.mark.parametrize("data", ["p_messages_document", "chat.jsonl.gz"])
def test_the_loss_of_a_chat_is_that_of_the_assistants_tokens(
    data: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(folder, data, "--batch-size", "3")["loss"] == pytest.approx(loss_alone(folder, 512), abs=1e-5)
    assert f"tokens that count, of 4 conversations, of {folder / data}" in capsys.readouterr().out
    assert evaluated(folder, data, "--sequence-length", "60")["loss"] == pytest.approx(loss_alone(folder, 60), abs=1e-5)
    assert "of 4 conversations, 3 of them cut to 60 tokens, of" in capsys.readouterr().out


def test_scores_and_reconstructions_read_the_same_files(folder: Path) -> None:
    model = open_checkpoint(convert(folder / "model", folder / "shards"))
    found = [windows(folder / name, 16, 9, model) for name in ("p_messages_document", "chat.jsonl", "chat.jsonl.gz")]
    assert len(found[0]) == 9 and all(np.array_equal(found[0], other) for other in found[1:])
    blend = calibration(["0.5", str(folder / "p_messages_document"), "0.5", str(folder / "chat.jsonl")], 16, 8, model)
    assert len(blend.tokens) == 2 * 5


@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.model"], ["tokenizer.json", "tokenizer.model"]])
def test_a_text_has_the_tokens_that_it_has_in_token_files(tmp_path: Path, files: list[str]) -> None:
    model = make_llama(tmp_path / "model", "gqa", vocab=1024)
    for name in files:
        shutil.copy(ROOT / "assets/tiny-llama" / name, model)
    if "tokenizer.json" in files:  # as Llama's own, it begins each text with a token
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }  # fmt: skip
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        (model / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    lines = write_records(tmp_path / "text.jsonl", [{"text": f"def f_{i}(x):\n    return x"} for i in range(9)])
    preprocess_data.main(
        ["--input", str(lines), "--output-prefix", str(tmp_path / "p"), "--load", str(model), "--append-eod"]
    )
    found = [windows(path, 16, 5, open_checkpoint(model)) for path in (tmp_path / "p_text_document", lines)]
    assert np.array_equal(*found) and (found[0][0, 0] == 1) == ("tokenizer.json" in files)


def test_mistakes_end_in_one_sentence(folder: Path) -> None:
    bare = instruct(folder / "bare")
    (bare / "chat_template.jinja").unlink()
    write_records(folder / "text.jsonl", [{"text": "x"}, {"messages": [1]}])
    write_records(folder / "silent.jsonl", [{"messages": said("nobody answers")["messages"]}])
    (folder / "plain.bin").touch()
    for words, sentence in [
        (["--tasks", "x"], "--chat is about --data: name the prefix of conversations"),
        (
            ["--data", str(folder / "plain")],
            "plain has no mask of what counts, .*plain_mask.bin and .idx: make both with",
        ),
        (["--data", str(folder / "text.jsonl")], 'text.jsonl line 2: "messages" message 1 is no object with a "role"'),
        (["--data", str(folder / "silent.jsonl")], "holds no conversation with a token that counts in its first 512"),
        (["--data", str(folder / "chat.jsonl"), "--load", str(bare)], "line 1: .* has no chat template: name an Instr"),
    ]:
        load = [] if "--load" in words else ["--load", str(folder / "model")]
        with pytest.raises(ValueError, match=sentence):
            evaluate.main(["--chat", *load, *words])
