"""The loss on the hidden states, against transformers in float64, and for a student that is the teacher, rotated."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import convert, make_llama, plan_of, prune, write_repeated
from stock_loop import Run, StockLoop
from transformers import AutoConfig, AutoModelForCausalLM

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.training.hidden_loss import HiddenLoss

pytestmark = pytest.mark.slow

VOCABULARY, SEQUENCE, SHARE = 101, 32, 0.7
TRAINING = (
    f"--train-data-path data --tokenizer-type NullTokenizer --seq-length {SEQUENCE} --micro-batch-size 1 "
    "--global-batch-size 2 --lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --eval-iters 0 --log-interval 1 "
    f"--train-iters 2 --teacher-load teacher --kd-hidden {SHARE}"
)
LAYOUTS = {"tp1": "", "sp2": "--sequence-parallel", "pp2": ""}
SAMPLE = np.random.default_rng(0).integers(0, VOCABULARY - 1, SEQUENCE)


def rotated(teacher: Path, path: Path) -> Path:
    """Save the teacher with its hidden states rotated: another model that computes the same."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(model.config.hidden_size, model.config.hidden_size).double())[0]
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                for reader in readers:
                    reader.weight.copy_(reader.weight * norm.weight @ turn)
                norm.weight.fill_(1)
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(turn.T @ writer.weight)
        model.lm_head.weight.copy_(model.lm_head.weight * model.model.norm.weight @ turn)
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ turn)
    model.float().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> StockLoop:
    """Make the stock loop in a folder with a teacher, what was pruned from it, and what it is when rotated."""
    loop = StockLoop(tmp_path_factory.mktemp("hidden"))
    folder = loop.folder
    write_repeated(folder / "data", SAMPLE, 20)
    teacher = make_llama(folder / "teacher", "gqa", layers=4, vocab=VOCABULARY)
    size = AutoConfig.from_pretrained(teacher).hidden_size
    prune(teacher, folder / "pruned-hf", "--hidden-size-remain", f"{size - 8}", "--format", "hf")
    for name, source in (
        ("pruned", folder / "pruned-hf"), ("rotated", rotated(teacher, folder / "rotated-hf")),
        ("other", make_llama(folder / "other-hf", "gqa", layers=4, vocab=VOCABULARY, seed=1)),
    ):  # fmt: skip
        convert(source, folder / name, format="torch_dist", layout=Layout(1, 1, 32))
    return loop


def case(loop: StockLoop, name: str, model: str, flags: str = "", tensor: int = 1, pipeline: int = 1) -> dict[str, Any]:
    """Return one run of the stock loop from a student."""
    words = (loop.folder / model / "megatron_args.txt").read_text()
    words += f" --pretrained-checkpoint {model} {TRAINING} --data-cache-path cache/{name} {flags}"
    words += f" --tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline}"
    return {"name": name, "words": words.split(), "ranks": tensor * pipeline}


@pytest.fixture(scope="module")
def runs(loop: StockLoop) -> dict[str, Run]:
    """Train the students in some layouts."""
    sizes = {"sp2": {"tensor": 2}, "pp2": {"pipeline": 2}}
    cases = [case(loop, name, "pruned", flags, **sizes.get(name, {})) for name, flags in LAYOUTS.items()]
    return loop.run_all([*cases, case(loop, "turned", "rotated"), case(loop, "strange", "other")])


@pytest.mark.parametrize("name", LAYOUTS)
def test_first_step_has_the_losses_and_the_gradient_of_a_float64_reference(
    name: str, loop: StockLoop, runs: dict[str, Run]
) -> None:
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(loop.folder / path, dtype=torch.float64, attn_implementation="eager")
        for path in ("teacher", "pruned-hf")
    )
    tokens = torch.from_numpy(SAMPLE)[None]
    with torch.no_grad():
        wanted = teacher.model(tokens).last_hidden_state[0]
        p = teacher.lm_head(wanted).log_softmax(-1)
    kept = torch.from_numpy(plan_of(loop.folder / "pruned-hf").hidden)
    states = student.model(tokens).last_hidden_state[0]
    hidden = (1 - torch.nn.functional.cosine_similarity(states, wanted[:, kept], dim=-1)).mean()
    q = student.lm_head(states).log_softmax(-1)
    kd = (p.exp() * (p - q)).sum(-1).mean()
    (kd + SHARE * hidden).backward()
    norm = torch.stack([each.grad.norm() for each in student.parameters() if each.grad is not None]).norm()
    found = runs[name].ok()
    assert 0.01 < hidden < 2
    for what, value in (("hidden loss", hidden), ("kd loss", kd)):
        assert found.values(what)[1] == pytest.approx(float(value), rel=2e-5), what
    assert found.values("grad norm")[1] == pytest.approx(float(norm), rel=2e-5, abs=6e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", None])
def test_a_student_of_another_dtype_is_no_rotation(loop: StockLoop, tmp_path: Path, dtype: str | None) -> None:
    flags = ["--hidden-size-remain", "32", "--format", "hf", *(["--dtype", dtype] if dtype else [])]
    student = prune(loop.folder / "teacher", tmp_path / "student", *flags)
    teacher, cut = open_checkpoint(loop.folder / "teacher"), open_checkpoint(student)
    basis = HiddenLoss(teacher, cut, VOCABULARY, torch.device("cpu")).basis
    assert basis.matrix is None and (basis.channels.numpy() == plan_of(student).hidden).all()


def test_rotated_teacher_has_no_hidden_loss(runs: dict[str, Run]) -> None:
    found = runs["turned"].ok()
    # The stock log leaves out what is not above zero.
    assert found.values("hidden loss").get(1, 0.0) < 1e-6 and found.values("kd loss").get(1, 0.0) < 1e-6
    assert found.values("grad norm")[1] < 1e-3 and found.values("hidden loss")[2] > 1e-3


def test_mistakes_are_refused_in_one_sentence(loop: StockLoop, runs: dict[str, Run]) -> None:
    assert "the hidden states of other are no part of those of teacher, by their embeddings" in runs["strange"].error
    wrong = case(loop, "negative", "pruned", "--kd-hidden -1")
    alone = case(loop, "alone", "pruned")
    alone["words"] = " ".join(alone["words"]).replace("--teacher-load teacher", "").split()
    found = loop.run_all([wrong, alone])
    assert "--kd-hidden -1.0 must be 0 or above" in found["negative"].error
    assert "--kd-hidden needs a teacher that reads along: give --teacher-load" in found["alone"].error
