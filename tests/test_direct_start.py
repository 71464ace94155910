"""A training starts from a Hugging Face directory as from what a conversion makes of it, bit for bit, and resumes."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import check_model
from helpers import convert, make_llama, write_documents
from stock_loop import StockLoop

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.storage.views import read_all

pytestmark = pytest.mark.slow(12)

SEQUENCE, VOCABULARY = 16, 101  # the latter is padded, to another size by each number of tensor ranks
SETTINGS = {
    "SPLIT": "100,0,0", "TOKENIZER_TYPE": "NullTokenizer", "TOKENIZER_MODEL": "none", "SEQ_LENGTH": SEQUENCE,
    "MICRO_BATCH_SIZE": 1, "GLOBAL_BATCH_SIZE": 2, "LR": 1e-2, "LR_WARMUP_ITERS": 1, "EVAL_ITERS": 0, "TRAIN_ITERS": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and what of it is special."""

    shape: str
    tensor: int = 1
    pipeline: int = 1
    flags: str = ""
    te: bool = False
    format: str = "torch"  # of the conversion
    model: dict[str, Any] = field(default_factory=dict)
    resumes: bool = False  # is it interrupted, too?


CASES = {
    "gqa": Case("gqa", resumes=True),
    "qwen2 tp2, with rows of padding": Case("qwen2", tensor=2, flags="--sequence-parallel"),
    "tied pp2, each end with a copy of the embedding": Case("tied", pipeline=2, resumes=True),
    "tied, virtual pp2 x tp2": Case("tied", 2, 2, "--num-layers-per-virtual-pipeline-stage 1", format="torch_dist"),
    "bf16, whose optimizer has copies": Case("mha", flags="--bf16", model={"dtype": torch.bfloat16}, resumes=True),
    "names of TransformerEngine, and its kind of optimizer": Case(
        "qwen3", te=True, flags="--ckpt-format torch_dist", resumes=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_after_a_conversion_and_a_resumed_run_has_them_too(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = make_llama(tmp_path / "hf", case.shape, vocab=VOCABULARY, **case.model)
    converted = convert(source, tmp_path / "converted", case.format, case.tensor, case.pipeline)
    write_documents(tmp_path / "data", np.random.default_rng(0).integers(0, VOCABULARY, 999))
    loop, ranks, words = StockLoop(tmp_path, te=case.te), case.tensor * case.pipeline, dict[str, str]()
    for start in (source, converted):
        where = {"LOAD_PATH": start, "SAVE_PATH": tmp_path / f"from-{start.name}", "DATA_PATH": tmp_path / "data"}
        layout = {"TP": case.tensor, "PP": case.pipeline}
        words[start.name] = " ".join(check_model(tmp_path, **SETTINGS, **where, **layout)[1]) + f" {case.flags}"
    wanted = loop.run("wanted", words["converted"], ranks, gpu=case.te).ok()
    first = loop.run("first", words["hf"] + " --exit-interval 2" * case.resumes, ranks, gpu=case.te).ok()
    losses = first.losses
    if case.resumes:
        assert sorted(losses) == [1, 2]
        losses = losses | loop.run("resumed", words["hf"], ranks, gpu=case.te).ok().losses
    assert re.search(r"distributed_timeout_minutes \.+ 60\n", first.log), "reading weights takes time"
    assert re.search(r"distributed_timeout_seconds_after_init \.+ 600\n", first.log), "and a step does not"
    assert len(wanted.losses) == 3 and losses == wanted.losses
    for file in ("huggingface/config.json", "latest_checkpointed_iteration.txt"):
        assert (tmp_path / "from-hf" / file).read_bytes() == (tmp_path / "from-converted" / file).read_bytes()
    one, other = (open_checkpoint(tmp_path / f"from-{start}") for start in words)
    for (weight, layer, view), (_, _, expected) in zip(one.weights(), other.weights(), strict=True):
        assert np.array_equal(read_all(view), read_all(expected)), (weight.name, layer)


def test_what_cannot_be_started_from_is_refused_in_a_sentence(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "gqa", vocab=VOCABULARY)
    write_documents(tmp_path / "data", np.arange(99) % VOCABULARY)
    where = {"LOAD_PATH": source, "SAVE_PATH": tmp_path / "out", "DATA_PATH": tmp_path / "data"}
    words = " ".join(check_model(tmp_path, **SETTINGS, **where)[1])
    (tmp_path / "empty").mkdir()
    cases = {
        "--use-checkpoint-args": f"{source}, of the format hf, has no arguments for --use-checkpoint-args: give the",
        "--num-layers 3": f"{source} has 4 layers and this model 3",
        "--ffn-hidden-size 64": f"checkpoint in {source} does not fit this model: decoder.layers.0.mlp.linear_fc1",
        f"--pretrained-checkpoint {tmp_path}/empty": f"--pretrained-checkpoint {tmp_path}/empty is not a checkpoint",
        f"--pretrained-checkpoint {tmp_path}/none": f"--pretrained-checkpoint {tmp_path}/none: no such directory",
    }
    cases["--tensor-model-parallel-size 3"] = "3 does not divide the model's query groups 4"
    runs = [{"name": f"{i}", "words": f"{words} {more}".split(), "ranks": 1} for i, more in enumerate(cases)]
    done = StockLoop(tmp_path).run_all(runs)
    for number, said in enumerate(cases.values()):
        assert done[f"{number}"].code == 1 and said in done[f"{number}"].error
    assert not list((tmp_path / "out").glob("*/mp_rank*"))
