"""Checkpoints that the stock loop wrote are read, exported and pruned, and what comes of them trains on in it.

The stock loop trains each model for three steps on data in which every sample is the same, and saves after two: its
third loss is then the stock model's own value of what it saved. All cases share one process that forks their ranks
(stock_worker.py).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same_tensors, hf_loss, plan_of, prune, sliced, tensors, write_repeated
from stock_loop import Run, StockLoop

from megatron.pruning.formats import open_checkpoint, save_checkpoint
from megatron.pruning.model.layout import Layout

pytestmark = pytest.mark.slow

STEPS, SAVED, SEQUENCE, VOCABULARY, DIVISOR = 3, 2, 64, 128, 32
EXACT = 1e-5
# bfloat16 keeps 8 bits: a logit of a few units is rounded by up to 2^-8 and, after some layers of rounding, off by a
# few times that; the signs differ, and over 64 tokens most of it cancels (8e-4 was measured). That could hide a small
# mistake, so that the stock loop computes in fp32 too, from every checkpoint that is saved in bfloat16.
ROUNDED = 5e-3

# Every kind: what the stock loop builds, and what remains of it. The layers, 4, become 2.
KINDS = {
    "mha": (
        "--hidden-size 48 --ffn-hidden-size 88 --num-attention-heads 8 --kv-channels 16 "
        "--untie-embeddings-and-output-weights",
        "--hidden-size-remain 32 --ffn-hidden-size-remain 40 --num-attention-heads-remain 4",
    ),
    "gqa": (
        "--hidden-size 40 --ffn-hidden-size 72 --num-attention-heads 8 --group-query-attention --num-query-groups 4 "
        "--kv-channels 6 --untie-embeddings-and-output-weights",
        "--hidden-size-remain 24 --ffn-hidden-size-remain 40 --num-attention-heads-remain 4",
    ),
    "tied": (
        "--hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 8",
        "--hidden-size-remain 24 --ffn-hidden-size-remain 24 --num-attention-heads-remain 4",
    ),
    "groups": (
        "--hidden-size 64 --ffn-hidden-size 112 --num-attention-heads 8 --group-query-attention --num-query-groups 4 "
        "--kv-channels 12 --untie-embeddings-and-output-weights --rotary-base 500000 --use-rope-scaling "
        "--rope-scaling-factor 32",
        "--hidden-size-remain 40 --ffn-hidden-size-remain 60 --num-attention-heads-remain 4 "
        "--num-query-groups-remain 2",
    ),
}
MODEL = (
    f"--num-layers 4 --position-embedding-type rope --max-position-embeddings {SEQUENCE} --swiglu "
    "--disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-4 --init-method-std 0.15 --attention-dropout 0 "
    f"--hidden-dropout 0 --vocab-size {VOCABULARY} --make-vocab-size-divisible-by {DIVISOR}"
)
TRAINING = (
    f"--data-path data --split 100,0,0 --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} "
    f"--seq-length {SEQUENCE} --micro-batch-size 1 --global-batch-size 2 --train-iters {STEPS} --lr 1e-2 "
    f"--lr-decay-style constant --eval-iters 0 --log-interval 1 --save-interval {SAVED}"
)


@dataclass(frozen=True)
class Case:
    """What the stock loop writes, and the format and layout in which its pruned model is written."""

    kind: str
    precision: str
    format: str
    layout: tuple[int, int]
    pruned_format: str
    pruned_layout: tuple[int, int]
    flags: str = ""
    prune_flags: str = ""

    @property
    def name(self) -> str:
        """Return the name of its folder and its test."""
        return f"{self.kind}-{self.precision}-{self.format}-tp{self.layout[0]}-pp{self.layout[1]}"


TE_NAMES = "--transformer-impl transformer_engine"
CASES = [
    Case("mha", "fp32", "torch", (1, 1), "torch", (2, 2)),
    Case("gqa", "fp32", "torch", (2, 1), "torch", (2, 1), prune_flags=TE_NAMES),
    Case("tied", "bf16", "torch", (4, 1), "torch_dist", (2, 1)),
    Case("tied", "fp32", "torch", (2, 2), "torch", (4, 1)),
    Case("gqa", "bf16", "torch_dist", (1, 1), "torch", (4, 1)),
    Case("mha", "fp32", "torch_dist", (4, 1), "torch_dist", (2, 2)),
    Case("gqa", "fp32", "torch_dist", (2, 2), "torch", (1, 1)),
    Case("groups", "fp32", "torch_dist", (2, 1), "torch_dist", (2, 1), flags="--sequence-parallel"),
]
BF16_CASES = [case for case in CASES if case.precision == "bf16"]


def split(layout: tuple[int, int]) -> str:
    """Return the flags of a tensor x pipeline layout."""
    return f"--tensor-model-parallel-size {layout[0]} --pipeline-model-parallel-size {layout[1]}"


@dataclass
class Result:
    """A checkpoint, and the run that wrote or read it."""

    path: Path
    run: Run


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> StockLoop:
    """Make the stock loop in a folder with data in which every sample is the same."""
    stock = StockLoop(tmp_path_factory.mktemp("stock"))
    write_repeated(stock.folder / "data", sample(), 20)
    return stock


def run_all(stock: StockLoop, cases: dict[str, tuple[str, tuple[int, int]]]) -> dict[str, Run]:
    """Run cases, name -> flags and layout, and return what each left."""
    content = []
    for name, (words, layout) in cases.items():
        # A cache of its own: two cases at a time must not write the same.
        flags = f"{words} {split(layout)} {TRAINING} --data-cache-path cache/{name}".split()
        content.append({"name": name, "words": flags, "ranks": math.prod(layout)})
    return stock.run_all(content)


def sample() -> np.ndarray:
    """Return the sample that is trained on; the token after it is its first."""
    return np.random.default_rng(0).integers(0, VOCABULARY, SEQUENCE)


@pytest.fixture(scope="module")
def trained(stock: StockLoop) -> dict[str, Result]:
    """Return the checkpoints that the stock loop wrote, by the name of their case."""
    words = {}
    for case in CASES:
        precision = "--bf16" if case.precision == "bf16" else ""
        saved = f"--save {case.name} --ckpt-format {case.format}"
        words[case.name] = (f"{MODEL} {KINDS[case.kind][0]} {precision} {saved} {case.flags}", case.layout)
    return {name: Result(stock.folder / name, run) for name, run in run_all(stock, words).items()}


@pytest.fixture(scope="module")
def in_fp32(stock: StockLoop, trained: dict[str, Result]) -> dict[str, Run]:
    """Return the runs in fp32 from the checkpoints that the stock loop wrote in bf16, by the name of their case."""
    words = {}
    for case in BF16_CASES:
        load = f"--load {case.name} --ckpt-step {SAVED} --finetune"
        words[f"{case.name}-in-fp32"] = (f"{MODEL} {KINDS[case.kind][0]} {load}", case.layout)
    return {name.removesuffix("-in-fp32"): run for name, run in run_all(stock, words).items()}


@pytest.fixture(scope="module")
def pruned(stock: StockLoop, trained: dict[str, Result]) -> dict[tuple[str, str], Result]:
    """Return the pruned checkpoints by case, and the runs that began from them by their precision."""
    assert not [name for name, result in trained.items() if result.run.code], "not every case has what is pruned"
    paths, words = {}, {}
    for case in CASES:
        name = f"{case.name}-pruned"
        flags = f"{KINDS[case.kind][1]} --drop-layers 0,2 --format {case.pruned_format} {split(case.pruned_layout)}"
        flags += f" --make-vocab-size-divisible-by {DIVISOR}"
        prune(trained[case.name].path, stock.folder / name, *flags.split(), *case.prune_flags.split())
        model = (stock.folder / name / "megatron_args.txt").read_text()
        for precision in {"fp32", case.precision}:
            computing = "--bf16" if precision == "bf16" else ""
            paths[case.name, precision] = stock.folder / name
            run = f"{model} {computing} {case.flags} --pretrained-checkpoint {name}"
            words[f"{name}-in-{precision}"] = (run, case.pruned_layout)
    runs = run_all(stock, words)
    return {key: Result(path, runs[f"{path.name}-in-{key[-1]}"]) for key, path in paths.items()}


def exported(checkpoint: Path, iteration: int | None = None) -> Path:
    """Return the checkpoint's export to Hugging Face, made once."""
    target = checkpoint.with_name(f"{checkpoint.name}-hf-{iteration}")
    if not target.exists():
        save_checkpoint(open_checkpoint(checkpoint, iteration), target, format="hf")
    return target


def exported_loss(checkpoint: Path, iteration: int | None = None) -> float:
    """Return the loss of LlamaForCausalLM, in fp32, on the checkpoint's export."""
    return hf_loss(exported(checkpoint, iteration), np.append(sample(), sample()[0]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stock_checkpoint_opens_as_what_the_stock_loop_built(case: Case, trained: dict[str, Result]) -> None:
    assert sorted(trained[case.name].run.ok().losses) == [1, 2, 3]
    checkpoint = open_checkpoint(trained[case.name].path, SAVED)
    assert (checkpoint.format, checkpoint.dtype) == (case.format, case.precision)
    # torch_dist is one for all layouts.
    assert checkpoint.layout == (Layout(*case.layout, DIVISOR) if case.format == "torch" else None)
    assert checkpoint.has_optimizer and checkpoint.vocab_is_known
    assert checkpoint.config.vocab_size == VOCABULARY and checkpoint.config.num_layers == 4
    assert checkpoint.config.tied == (case.kind == "tied")
    assert (checkpoint.config.num_query_groups == 4) == (case.kind in ("gqa", "groups"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_export_of_a_stock_checkpoint_has_the_loss_of_the_stock_model(case: Case, trained: dict[str, Result]) -> None:
    source = trained[case.name]
    bound = EXACT if case.precision == "fp32" else ROUNDED
    assert source.run.ok().losses[SAVED + 1] == pytest.approx(exported_loss(source.path, SAVED), abs=bound)


@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_export_of_a_bf16_stock_checkpoint_has_the_loss_that_the_stock_model_has_in_fp32(
    case: Case, trained: dict[str, Result], in_fp32: dict[str, Run]
) -> None:
    loss = exported_loss(trained[case.name].path, SAVED)
    assert in_fp32[case.name].ok().losses[1] == pytest.approx(loss, abs=EXACT)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pruned_stock_checkpoint_is_the_chosen_part_of_its_weights_bitwise(
    case: Case, trained: dict[str, Result], pruned: dict[tuple[str, str], Result]
) -> None:
    path = pruned[case.name, "fp32"].path
    config = open_checkpoint(path).config
    plan, parent = plan_of(path), tensors(exported(trained[case.name].path, STEPS))
    wanted, found = sliced(parent, plan, config.head_dim), tensors(exported(path))
    assert_same_tensors(found, wanted)
    # Every axis became smaller; q_proj is [heads * head_dim, hidden], down_proj [hidden, ffn].
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        smaller, larger = (state[f"model.layers.0.{name}.weight"].shape for state in (found, parent))
        assert smaller[0] < larger[0] and smaller[1] < larger[1]
    assert plan.layers.tolist() == [1, 3]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pruned_stock_checkpoint_trains_on_from_the_loss_of_its_export(
    case: Case, pruned: dict[tuple[str, str], Result]
) -> None:
    result = pruned[case.name, "fp32"]
    checkpoint, losses = open_checkpoint(result.path), result.run.ok().losses
    assert (checkpoint.format, checkpoint.dtype) == (case.pruned_format, case.precision)
    assert (checkpoint.transformer_impl != "local") == (case.prune_flags == TE_NAMES)
    # The loader of pretrain_gpt.py ends the run on a name or a shape that does not fit.
    assert f"successfully loaded checkpoint from {result.path.name} " in result.run.log
    assert losses[1] == pytest.approx(exported_loss(result.path), abs=EXACT)
    assert losses[3] < losses[1] - 0.1


@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_pruned_bf16_stock_checkpoint_trains_on_in_bf16(case: Case, pruned: dict[tuple[str, str], Result]) -> None:
    result = pruned[case.name, "bf16"]
    losses = result.run.ok().losses
    assert losses[1] == pytest.approx(exported_loss(result.path), abs=ROUNDED)
    assert losses[3] < losses[1] - 0.1
