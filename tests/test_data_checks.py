"""Text that cannot be trained on is refused before a model is built, in a sentence that names the file and the flag."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_documents
from stock_loop import StockLoop

pytestmark = pytest.mark.slow

MODEL = (
    "--num-layers 1 --hidden-size 16 --ffn-hidden-size 16 --num-attention-heads 2 --position-embedding-type rope "
    "--max-position-embeddings 16 --swiglu --disable-bias-linear --normalization RMSNorm --vocab-size 63 "
    "--untie-embeddings-and-output-weights --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 64 "
    "--seq-length 16 --micro-batch-size 1 --global-batch-size 1 --train-iters 2 --lr 1e-3 --log-interval 1 "
    "--lr-warmup-iters 0 --eval-interval 2 --eval-iters 1"
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with 60 documents of ids up to 60, as `text`."""
    draw = np.random.default_rng(0)
    write_documents(tmp_path / "text", *(draw.integers(0, 61, 50) for _ in range(60)))
    return tmp_path


def shorter(name: str) -> Callable[[Path], None]:
    """Return a change that cuts a file."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-10])

    return apply


def of_another_run(folder: Path) -> None:
    write_documents(folder / "other", np.arange(50))
    (folder / "other.idx").rename(folder / "text.idx")


def index_changed(*changes: tuple[int, int]) -> Callable[[Path], None]:
    """Return a change that adds to numbers of the .idx of 60 sequences: the lengths begin at byte 34, 4 bytes each."""

    def apply(folder: Path) -> None:
        raw = bytearray((folder / "text.idx").read_bytes())
        for at, by in changes:
            raw[at] = (raw[at] + by) % 256
        (folder / "text.idx").write_bytes(raw)

    return apply


POINTERS, DOCUMENTS = 34 + 60 * 4, 34 + 60 * 12


def with_a_strange_id(folder: Path) -> None:
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 61, 50) for _ in range(60)]
    documents[33][7] = 64
    write_documents(folder / "text", *documents)


def unchanged(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    "data,change,complaint",
    [
        ("--data-path text", unchanged, r"--split 969, 30, 1 leaves no document of text, which has 60, for test"),
        ("--data-path text --split 99,1,0", with_a_strange_id, r"--data-path text holds token 64, .* vocabulary of 64"),
        ("--data-path text --split 99,1,0", shorter("text.bin"), r"text.bin has 5990 bytes, which are not the 3000 to"),
        ("--data-path text --split 99,1,0", shorter("text.idx"), r"text.idx or .bin is damaged or empty"),
        (
            "--data-path text --split 99,1,0",
            index_changed((34, 5), (38, -5)),
            r"a sequence of the .idx from 0 on does not",
        ),
        (
            "--data-path text --split 99,1,0",
            index_changed((POINTERS + 8, 2)),
            r"a sequence of the .idx from 0 on does not",
        ),
        (
            "--data-path text --split 99,1,0",
            index_changed((DOCUMENTS, 1)),
            r"documents of the .idx are not those of its",
        ),
        (
            "--data-path text --split 99,1,0",
            index_changed((DOCUMENTS + 8, 9)),
            r"documents of the .idx are not in order",
        ),
        ("--data-path text --split 99,1,0", index_changed((18, 1)), r"which are not the 61 sequences that it names"),
        ("--data-path text --split 99,1,0", index_changed((17, 90)), r"the .idx does not begin as one"),
        ("--data-path text --split 99,1,0", of_another_run, r"text.bin has 6000 bytes, which are not the 50 tokens"),
        (
            "--data-path text.bin",
            unchanged,
            r"--data-path text.bin: there is no text.bin.bin; name the prefix",
        ),
        ("--data-path 1 text 0 text", unchanged, r"--data-path: the weight of text is 0: leave out a text that has"),
        ("--data-path absent", unchanged, r"--data-path absent: there is no absent.bin"),
        ("--train-data-path text --valid-data-path gone", unchanged, r"--valid-data-path gone: there is no gone.bin"),
    ],
)
def test_text_that_cannot_be_meant_is_refused(
    text: Path, monkeypatch: pytest.MonkeyPatch, data: str, change: Callable[[Path], Any], complaint: str
) -> None:
    from megatron.pruning.training.data_checks import check_data

    change(text)
    monkeypatch.chdir(text)
    parser = argparse.ArgumentParser()
    for flag in ("data-path", "train-data-path", "valid-data-path", "test-data-path"):
        parser.add_argument(f"--{flag}", nargs="*")
    parser.add_argument("--split", default="969, 30, 1")
    args = parser.parse_args(data.split())
    known = {"mock_data": False, "data_args_path": None, "per_split_data_args_path": None, "vocab_size": 63}
    known["full_validation"] = False
    known |= {"tokenizer_type": "NullTokenizer", "tensor_model_parallel_size": 1, "make_vocab_size_divisible_by": 64}
    with pytest.raises(ValueError, match=complaint):
        check_data(argparse.Namespace(**vars(args), **known))


def test_the_training_says_it_before_it_builds_a_model_or_goes_without_validation(text: Path) -> None:
    loop = StockLoop(text)
    refused = loop.run("endless", f"{MODEL} --data-path text --split 949,50,1")
    assert refused.code == 1 and "leaves no document of text, which has 60, for test" in refused.error
    assert "number of parameters" not in refused.log
    alone = loop.run("alone", f"{MODEL} --train-data-path text --save saved --save-interval 2").ok()
    assert "note: without --valid-data-path there is no validation" in alone.log and max(alone.losses) == 2
