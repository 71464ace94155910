"""Text to tokens: nothing is lost, the workers do not matter, and a bad line is named and leaves nothing behind."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import preprocess_data as tool
import pytest
from stock_loop import StockLoop

from megatron.pruning.storage import small_files

pytestmark = pytest.mark.slow

TEXTS = ["def f(x):\n    return  x\n", "héllo ☃\ttab", "    ", "a" * 500, "one\n\n\n  two  ", "plain words " * 200] * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a SentencePiece model that keeps spaces and spells unknown characters in bytes."""
    import sentencepiece

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines() if line.strip()),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return path


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def command(inputs: list[Path], prefix: Path, model: Path, *more: str) -> list[str]:
    tokenizer = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(model)]
    return ["--input", *map(str, inputs), "--output-prefix", str(prefix), *tokenizer, *more]


def documents(prefix: Path, key: str = "text", kind: str = "_document") -> list[np.ndarray]:
    """Return the documents of the written files, read by Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(f"{prefix}_{key}{kind}")
    assert list(data.document_indices) == list(range(len(data) + 1))
    return [np.array(data[index]) for index in range(len(data))]  # copies: the reader unmaps its file when it goes


def test_tokens_spell_the_text_and_end_with_eod(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(str(model))
    first = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": text, "id": 1}) for text in TEXTS[:50]])
    second = write_lines(
        tmp_path / "b.jsonl", [json.dumps({"text": text}) for text in TEXTS[50:]] + ["", '{"text": ""}']
    )
    tool.main(command([first, second], tmp_path / "out" / "all", model, "--append-eod"))
    found = documents(tmp_path / "out" / "all")
    assert [pieces.decode(document[:-1].tolist()) for document in found] == TEXTS
    assert {int(document[-1]) for document in found} == {pieces.eos_id()}
    assert f"{len(TEXTS):,} documents, {sum(map(len, found)):,} tokens" in capsys.readouterr().out


def test_same_bytes_for_any_number_of_workers(tmp_path: Path, model: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": text, "note": text[::-1]}) for text in TEXTS])
    for workers in ("1", "2", "3"):
        keys = ["--json-keys", "text", "note", "--workers", workers]
        tool.main(command([lines], tmp_path / workers / "p", model, *keys))
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == [f"p_{key}_document.{suffix}" for key in ("note", "text") for suffix in ("bin", "idx")]
    for name in names:
        assert len({(tmp_path / workers / name).read_bytes() for workers in "123"}) == 1, name


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "open', "not valid JSON: Unterminated string"),
        ('{"txt": "a"}', 'there is no "text", only txt'),
        ('{"text": 3}', '"text" holds int, not a string'),
        ('["a"]', "a JSON object is needed, not list"),
        ('{"text": "\\ud800"}', '"text" holds half a surrogate pair, which is no text'),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_line_is_named_and_nothing_is_left(
    line: str, complaint: str, workers: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps({"text": text}) for text in TEXTS]
    lines = write_lines(tmp_path / "bad.jsonl", [*good, line, *good])
    words = command([lines], tmp_path / "out" / "p", model, "--workers", workers)
    with pytest.raises(ValueError) as refusal:
        tool.main(words)
    assert str(refusal.value).startswith(f"{lines} line {len(good) + 1}: {complaint}")
    assert list((tmp_path / "out").iterdir()) == []

    tool.main([*words, "--skip-bad-lines"])
    assert len(documents(tmp_path / "out" / "p")) == 2 * len(good)
    said = capsys.readouterr()
    assert "1 bad lines skipped" in said.out
    assert f"line {len(good) + 1}" in said.err


def test_failed_run_keeps_the_files_of_an_earlier_one(tmp_path: Path, model: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", ['{"text": "kept"}'])
    tool.main(command([lines], tmp_path / "p", model))
    before = {path: path.read_bytes() for path in tmp_path.glob("p_*")}
    write_lines(lines, ['{"text": "new"}', "{"])
    with pytest.raises(ValueError, match="line 2"):
        tool.main(command([lines], tmp_path / "p", model))
    assert len(before) == 2
    assert {path: path.read_bytes() for path in tmp_path.glob("*p_*")} == before


def test_empty_or_missing_input_and_unknown_tokenizer_are_refused(tmp_path: Path, model: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    blank = write_lines(tmp_path / "blank.jsonl", ["", '{"text": ""}'])
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        tool.main(command([empty], tmp_path / "p", model))
    with pytest.raises(ValueError, match="holds no document that has tokens"):
        tool.main(command([blank], tmp_path / "p", model))
    with pytest.raises(ValueError, match=r"none\.jsonl is not a file"):
        tool.main(command([tmp_path / "none.jsonl"], tmp_path / "p", model))
    with pytest.raises(ValueError, match=r"--tokenizer-model .*nowhere\.model: no such file"):
        tool.main(command([blank], tmp_path / "p", tmp_path / "nowhere.model"))
    with pytest.raises(ValueError, match=r"cannot build the tokenizer of .*blank\.jsonl: "):
        tool.main(command([blank], tmp_path / "p", blank))
    assert not list(tmp_path.glob("*p_text*"))


def test_command_says_one_sentence_and_exits_with_1(tmp_path: Path, model: Path) -> None:
    lines = write_lines(tmp_path / "bad.jsonl", ["nonsense"])
    words = " ".join(command([lines], tmp_path / "p", model))
    done = StockLoop(tmp_path).run("bad", words, program="preprocess_data")
    assert done.code == 1
    (said,) = done.log.splitlines()
    assert said.startswith(f"error: {lines} line 1: not valid JSON")


def test_a_killed_worker_ends_the_run_in_a_sentence(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", ['{"text": "a"}'] * 40)
    monkeypatch.setattr(tool, "_encode", lambda line: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ValueError, match="a worker died"):
        tool.main(command([lines], tmp_path / "out" / "p", model, "--workers", "2"))
    assert not list((tmp_path / "out").iterdir())


def test_two_runs_with_one_prefix_never_mix_their_files(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_lines(tmp_path / "a.jsonl", ['{"text": "one"}'])
    second = write_lines(tmp_path / "b.jsonl", ['{"text": "two two two"}'])
    write, names = tool.write, list[str]()

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(tool, "write", write)
        done = write(*arguments)
        tool.main(command([second], tmp_path / "p", model))  # begins and ends while the first is about to end
        names.extend(path.name for path in tmp_path.glob(".p_*"))
        return done

    monkeypatch.setattr(tool, "write", meanwhile)
    tool.main(command([first], tmp_path / "p", model))
    assert len(names) == 2 and all(".partial-" in name for name in names)
    wanted = command([first], tmp_path / "alone", model)
    tool.main(wanted)
    for suffix in (".bin", ".idx"):
        found, alone = (tmp_path / f"{name}_text_document{suffix}" for name in ("p", "alone"))
        assert found.read_bytes() == alone.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_run_left_in_the_way_is_told_before_anything_is_read(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", iter(range(0, 1000, 20)).__next__)
    monkeypatch.setattr(tool, "write", None)
    (tmp_path / ".p_text_document.placing").touch()
    with pytest.raises(ValueError, match=r"if none does, remove .*placing"):
        tool.main(command([write_lines(tmp_path / "a.jsonl", ['{"text": "one"}'])], tmp_path / "p", model))


def test_a_key_without_text_keeps_those_of_others(tmp_path: Path, model: Path) -> None:
    lines = ['{"title": "", "text": "one"}', '{"title": "two", "text": ""}', '{"title": "three", "text": "four"}']
    file = write_lines(tmp_path / "a.jsonl", lines)
    tool.main(command([file], tmp_path / "p", model, "--json-keys", "title", "text"))
    assert [len(documents(tmp_path / "p", key)) for key in ("title", "text")] == [2, 2]
    only = write_lines(tmp_path / "b.jsonl", lines[:1])
    with pytest.raises(ValueError, match=r"holds nothing that has tokens for .*q_title_document"):
        tool.main(command([only], tmp_path / "q", model, "--json-keys", "title", "text"))
    assert not list(tmp_path.glob("q*"))


def test_a_run_waits_for_another_that_puts_its_files_in_place_and_then_says_so(tmp_path: Path) -> None:
    with small_files.alone_at(tmp_path / "p"), pytest.raises(ValueError, match=r"another run puts its.*placing"):
        with small_files.alone_at(tmp_path / "p", seconds=0.2):
            raise AssertionError("two at once")
    with small_files.alone_at(tmp_path / "p"):
        assert (tmp_path / ".p.placing").exists()
    assert not list(tmp_path.iterdir())


def test_compressed_files_by_a_pattern_and_a_key_that_is_a_path_give_the_same_bytes(
    tmp_path: Path, model: Path
) -> None:
    import gzip

    for part in range(2):
        texts = TEXTS[part::2]
        write_lines(tmp_path / f"plain-{part}.jsonl", [json.dumps({"text": text}) for text in texts])
        lines = "".join(json.dumps({"meta": {"body": text}}) + "\n" for text in texts)
        (tmp_path / f"part-{part}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    plain = [tmp_path / "plain-0.jsonl", tmp_path / "plain-1.jsonl"]
    tool.main(command(plain, tmp_path / "plain", model))
    words = ["--json-key", "meta.body", "--workers", "2"]
    tool.main(command([tmp_path / "part-*.jsonl.gz"], tmp_path / "packed", model, *words))
    for suffix in ("bin", "idx"):
        found = (tmp_path / f"packed_meta.body_document.{suffix}").read_bytes()
        assert found == (tmp_path / f"plain_text_document.{suffix}").read_bytes()
