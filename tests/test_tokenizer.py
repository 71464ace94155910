"""The tokenizer is that of the checkpoint unless another is named; what is wrong with it is one sentence, early."""

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import preprocess_data
import pytest
from commands import ROOT, check_model
from helpers import convert, set_config, write_repeated
from stock_loop import StockLoop

from megatron.pruning.training.tokenizer import build_tokenizer, find_tokenizer, name_tokenizer

TINY = ROOT / "assets/tiny-llama"
TIKTOKEN = '[\n {"rank": 0, "token_bytes": "AA==", "token_str": "x"}]'
TRAINING = "--seq-length 16 --micro-batch-size 1 --train-iters 2 --lr 1e-3 --lr-warmup-iters 0 --eval-iters 0 "
TRAINING += "--log-interval 1"


def flags(kind: str | None = None, model: object = None, **more: object) -> argparse.Namespace:
    """Return the flags of a tokenizer, with preprocess_data.py's defaults."""
    words = ["--input", "x", "--output-prefix", "x", *(["--tokenizer-type", kind] if kind else [])]
    words += ["--tokenizer-model", str(model)] if model else []
    args = preprocess_data.parser().parse_args(words)
    return argparse.Namespace(**{**vars(args), **more})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in Megatron's format."""
    return convert(TINY, tmp_path_factory.mktemp("tokenizer") / "tiny")


# Found ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files,kind,found",
    [
        ({"tokenizer.json": "{}", "tokenizer.model": "\x00"}, "HuggingFaceTokenizer", "."),  # what transformers takes
        ({"tokenizer.model": "\x0a\x0e\x0a\x05<unk>"}, "Llama2Tokenizer", "tokenizer.model"),
        ({"tokenizer.model": "AA== 0\nAQ== 1\n"}, "HuggingFaceTokenizer", "."),  # tiktoken's, as Llama 3 has it
        ({"vocab.json": "{}", "merges.txt": ""}, "HuggingFaceTokenizer", "."),
        ({"vocab.json": TIKTOKEN}, "TikTokenizer", "vocab.json"),
        ({"tokens.json": TIKTOKEN, "config.json": "{}"}, "TikTokenizer", "tokens.json"),
    ],
)
def test_tokenizer_is_found_by_the_files_of_either_format(
    files: dict[str, str], kind: str, found: str, tmp_path: Path
) -> None:
    for folder in (tmp_path / "hf", tmp_path / "megatron/huggingface"):
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_text(content)
    assert find_tokenizer(tmp_path / "hf", "--load") == (kind, tmp_path / "hf" / found)
    assert find_tokenizer(tmp_path / "megatron", "--load") == (kind, tmp_path / "megatron/huggingface" / found)
    named = tmp_path / "hf" / next(iter(files))
    assert find_tokenizer(named, "--tokenizer-model") == (kind, named if found != "." else tmp_path / "hf")


def test_a_named_tokenizer_comes_before_that_of_the_checkpoints_which_come_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "resumed").mkdir()
    places = {"--load": tmp_path / "resumed", "--pretrained-checkpoint": TINY}
    for given, kind, model in [
        (flags(), "HuggingFaceTokenizer", TINY),
        (flags(model=TINY / "tokenizer.model"), "Llama2Tokenizer", TINY / "tokenizer.model"),
        (flags("NullTokenizer"), "NullTokenizer", None),
    ]:
        name_tokenizer(given, places)
        assert (given.tokenizer_type, given.tokenizer_model) == (kind, None if model is None else str(model))


def test_no_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--load .* has no tokenizer, neither tokenizer.json, .*: name the one"):
        name_tokenizer(flags(), {"--load": tmp_path})
    with pytest.raises(ValueError, match="no tokenizer was named, nor a checkpoint"):
        name_tokenizer(flags(), {})
    with pytest.raises(ValueError, match=r"--tokenizer-model /nowhere: no such file or directory"):
        name_tokenizer(flags(model="/nowhere"), {"--load": TINY})


# Built ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_code_that_a_tokenizer_names_is_not_run_and_its_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    given, read = dict[str, str](), AutoTokenizer.from_pretrained

    def watched(pretrained_model_name_or_path: str, **how: object) -> object:
        given.update((file.name, file.read_text()) for file in Path(pretrained_model_name_or_path).glob("*.[!m]*"))
        return read(pretrained_model_name_or_path, **how)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", watched)
    source = Path(shutil.copytree(TINY, tmp_path / "hf"))
    set_config(auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")(source)
    said = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(said | {"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    (source / "evil.py").write_text("raise SystemExit('it ran')")
    args = flags(trust_remote_code=False)
    name_tokenizer(args, {"--load": source})
    tokens = preprocess_data.text_tokenizer(args).tokenize("def main(")
    assert tokens == preprocess_data.text_tokenizer(flags(model=TINY / "tokenizer.model")).tokenize("def main(")
    assert args.tokenizer_model == str(source)
    assert "evil" not in "".join(given.values()) and {"config.json", "tokenizer.json"} <= given.keys()
    with pytest.raises(ValueError, match="no code of a tokenizer is run here"):
        build_tokenizer(flags("HuggingFaceTokenizer", source, trust_remote_code=True))


@pytest.mark.slow
def test_tokens_of_a_checkpoint_are_those_of_its_tokenizer_named(shards: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return  x + {i}\n"}) for i in range(9)))
    ways = {
        "hf": f"--load {TINY}",
        "megatron": f"--load {shards}",
        "file": f"--tokenizer-model {TINY}/tokenizer.model",
        "typed": f"--tokenizer-type Llama2Tokenizer --tokenizer-model {TINY}/tokenizer.model",
    }
    for name, words in ways.items():
        out = ["--input", str(text), "--output-prefix", str(tmp_path / name), "--append-eod"]
        preprocess_data.main([*out, *words.split()])
    for suffix in ("bin", "idx"):
        assert len({(tmp_path / f"{name}_text_document.{suffix}").read_bytes() for name in ways}) == 1


# In a training -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_takes_the_checkpoints_tokenizer_and_goes_on_with_it(shards: Path, tmp_path: Path) -> None:
    write_repeated(tmp_path / "data", np.arange(3, 19), 40)
    data = {"LOAD_PATH": shards, "SAVE_PATH": tmp_path / "out", "DATA_PATH": tmp_path / "data", "SPLIT": "100,0,0"}
    _, words = check_model(tmp_path, **data, GLOBAL_BATCH_SIZE=1, TRAIN_ITERS=3, LR_WARMUP_ITERS=1)
    assert not any(word.startswith("--tokenizer") for word in words)
    loop, command = StockLoop(tmp_path), " ".join(words)
    found = loop.run("found", f"{command} {TRAINING}").ok()
    again = loop.run("again", f"{command} {TRAINING} --train-iters 3 --override-opt-param-scheduler").ok()
    named = f"{command} {TRAINING} --tokenizer-type Llama2Tokenizer --tokenizer-model {TINY}/tokenizer.model"
    named = named.replace(f"{tmp_path}/out", f"{tmp_path}/other")
    assert found.losses == loop.run("named", named).ok().losses and sorted(again.losses) == [3]
    assert f"tokenizer_model {'.' * 33} {shards}/huggingface" in found.log
    assert f"tokenizer_model {'.' * 33} {tmp_path}/out/huggingface" in again.log


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_is_told_before_all_arguments(shards: Path, tmp_path: Path) -> None:
    write_repeated(tmp_path / "data", np.arange(3, 19), 40)
    bare = Path(shutil.copytree(shards, tmp_path / "bare"))
    for file in (bare / "huggingface").glob("tokenizer*"):
        file.unlink()
    command = f"{(shards / 'megatron_args.txt').read_text()} --data-path data --split 100,0,0 {TRAINING} --finetune"
    cases = {
        f"--load {bare}": f"--load {bare} has no tokenizer, neither tokenizer.json, .* in {bare}/huggingface: name",
        f"--load {shards} --tokenizer-model nowhere": "--tokenizer-model nowhere: no such file or directory",
        f"--load {shards} --tokenizer-type Llama2Tokenizer --tokenizer-model no.model": "no.model: no such file",
        f"--load {shards} --vocab-size 1000": f"{shards}/huggingface has 1024 tokens and the model a .* of 1000",
    }
    runs = [{"name": f"{i}", "words": f"{command} {words}".split(), "ranks": 1} for i, words in enumerate(cases)]
    done = StockLoop(tmp_path).run_all(runs)
    for number, said in enumerate(cases.values()):
        assert done[f"{number}"].code == 1
        (line,) = done[f"{number}"].log.splitlines()
        assert re.search(said, line), line
