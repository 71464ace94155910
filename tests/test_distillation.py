"""Distillation: the divergence over a cut vocabulary, and training runs in every layout, against float64 references."""

import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import environment
from helpers import convert, load_whole, make_llama, write_repeated
from stock_loop import Run, StockLoop
from transformers import AutoModelForCausalLM

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.layout import Layout

pytestmark = pytest.mark.slow(1)

VOCABULARY, PADDED, SEQUENCE, EOD = 101, 128, 32, 100
TRAINING = (
    f"--train-data-path data --valid-data-path data --tokenizer-type NullTokenizer --seq-length {SEQUENCE} "
    "--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --eval-iters 0 "
    "--log-interval 1 --train-iters 4"
)

# The divergence ------------------------------------------------------------------------------------------------------

TOKENS, WORDS = (5, 3), 10  # 10 words, padded to 16: of four ranks one has only padding, and one has some


def logits(scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a student's and a teacher's logits, with padding that must not matter; the last token's are far apart."""
    draw = torch.Generator().manual_seed(int(scale))
    student, teacher = (torch.randn(*TOKENS, 16, generator=draw) * scale for _ in range(2))
    student[-1, -1, 3], teacher[-1, -1, 4] = 20 * scale, -20 * scale
    student[..., WORDS:], teacher[..., WORDS:] = 50 * scale, 70 * scale
    return student.to(dtype), teacher.to(dtype)


CASES = {  # temperature, scale of the logits, their dtype
    "plain": (1.0, 1.0, torch.float32),
    "warm": (2.5, 3.0, torch.float32),
    "cold": (0.5, 2.0, torch.float32),
    "large": (1.0, 400.0, torch.float32),
    "bf16": (2.0, 4.0, torch.bfloat16),
}
KEPT = (1, 4, WORDS)  # of the teacher's likeliest tokens
MASK = torch.tensor([[1.0, 0.0, 1.0]] * TOKENS[0])


def divergence_of_rank(rank: int, ranks: int, store: str, answers: Any) -> None:
    """Be one of the tensor-parallel ranks: put each case's divergence and this rank's gradient into `answers`.

    They are those of the whole vocabulary, and of the K likeliest tokens and the rest.
    """
    from megatron.pruning.training.divergence import TopKKL, VocabParallelKL, top_k

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found, everyone = {}, torch.distributed.group.WORLD
    for name, (temperature, scale, dtype) in CASES.items():
        student, teacher = (part.chunk(ranks, -1)[rank] for part in logits(scale, dtype))
        for k in (None, *KEPT):
            leaf = student.clone().requires_grad_()
            before = student.clone(), teacher.clone()
            if k is None:
                divergence = VocabParallelKL.apply(leaf, teacher, temperature, WORDS, everyone)
            else:
                kept = top_k(teacher, k, temperature, WORDS, everyone)
                divergence = TopKKL.apply(leaf, *kept, temperature, WORDS, everyone)
            (divergence * MASK).sum().backward()
            assert torch.equal(leaf, before[0]) and torch.equal(teacher, before[1]), "the logits were written over"
            assert divergence.dtype == torch.float32 and leaf.grad is not None and leaf.grad.dtype == dtype
            found[name, k] = divergence.detach().double().tolist(), leaf.grad.double().tolist()
    answers.put((rank, found))


@pytest.fixture(scope="module", params=[1, 2, 4])
def divergences(request: pytest.FixtureRequest) -> list[dict[str, tuple[Any, Any]]]:
    """Return what each of the ranks found."""
    import megatron.pruning.training.divergence  # noqa: F401 - once, before the forks

    fork, ranks = multiprocessing.get_context("fork"), request.param
    answers = fork.Queue()
    with tempfile.TemporaryDirectory() as folder:
        children = [
            fork.Process(target=divergence_of_rank, args=(rank, ranks, f"{folder}/store", answers), daemon=True)
            for rank in range(ranks)
        ]
        for child in children:
            child.start()
        found = dict(answers.get(timeout=60) for _ in children)
        for child in children:
            child.join()
    return [found[rank] for rank in range(ranks)]


@pytest.mark.parametrize("k", [None, *KEPT])
@pytest.mark.parametrize("case", CASES)
def test_divergence_and_gradient_are_those_of_float64(
    case: str, k: int | None, divergences: list[dict[tuple[str, int | None], tuple[Any, Any]]]
) -> None:
    temperature, scale, dtype = CASES[case]
    student, teacher = (part.double() for part in logits(scale, dtype))
    student.requires_grad_()
    p, q = ((part[..., :WORDS] / temperature).log_softmax(-1) for part in (teacher, student))
    if k is not None:  # the others as one
        best = p.topk(k, -1).indices
        others = torch.ones_like(p, dtype=torch.bool).scatter(-1, best, False)
        p, q = (
            torch.cat([part.gather(-1, best), part.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            for part in (p, q)
        )
    wanted = temperature**2 * torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
    (wanted * MASK).sum().backward()
    gradient = torch.cat([torch.tensor(found[case, k][1], dtype=torch.float64) for found in divergences], -1)
    rounding = 1e-6 if dtype == torch.float32 else 4e-3  # of the gradient, which has the logits' dtype
    torch.testing.assert_close(gradient, student.grad, rtol=rounding, atol=rounding)
    for found in divergences:
        value = torch.tensor(found[case, k][0], dtype=torch.float64)
        torch.testing.assert_close(value, wanted.detach(), rtol=2e-6, atol=5e-6)
    assert not gradient[:, 1].any() and not gradient[..., WORDS:].any(), "masked tokens and padding must have none"


# Training ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> StockLoop:
    """Make the stock loop in a folder with data in which every sample is the same, a student, and a teacher thrice."""
    loop = StockLoop(tmp_path_factory.mktemp("distillation"))
    folder = loop.folder
    write_repeated(folder / "data", sample(), 20)
    student = make_llama(folder / "student-hf", "mha", layers=2, vocab=VOCABULARY)
    convert(student, folder / "student", format="torch_dist", layout=Layout(1, 1, 32))
    teacher = make_llama(folder / "hf", "llama3", layers=4, vocab=VOCABULARY)
    convert(teacher, folder / "torch", layout=Layout(4, 2, 128))
    convert(teacher, folder / "torch_dist", format="torch_dist", layout=Layout(1, 1, 1))
    tied = make_llama(folder / "tied", "tied", layers=3, vocab=VOCABULARY, dtype=torch.bfloat16)
    assert open_checkpoint(tied).config.tied
    make_llama(folder / "other", "mha", layers=2, vocab=VOCABULARY + 1)
    return loop


def sample() -> np.ndarray:
    """Return the sample that is trained on, with two ends of a document inside; the token after it is its first."""
    tokens = np.random.default_rng(0).integers(0, EOD, SEQUENCE)
    tokens[[9, 20]] = EOD
    return tokens


def case(name: str, flags: str, tensor: int = 1, pipeline: int = 1, copies: int = 1) -> dict[str, Any]:
    """Return one run of the stock loop that starts from the student, unless its flags say otherwise."""
    layout = f"--tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline}"
    words = f"{layout} {TRAINING} --data-cache-path cache/{name} {flags}"
    return {"name": name, "words": words, "ranks": tensor * pipeline * copies}


def run(loop: StockLoop, cases: list[dict[str, Any]]) -> dict[str, Run]:
    """Run the cases two at a time."""
    model = (loop.folder / "student" / "megatron_args.txt").read_text()
    for each in cases:
        each["words"] = f"{model} --pretrained-checkpoint student {each['words']}".split()
    return loop.run_all(cases)


ONE = "--exit-interval 1"
# Name -> teacher, alpha, temperature, whether ends of documents are masked.
REFERENCES = {
    "tp1": ("hf", 1.0, 1.0, True),
    "tp2": ("torch_dist", 0.25, 2.0, False),
    "tp2-pp2": ("torch", 1.0, 1.0, False),
    "dp2": ("tied", 1.0, 3.0, False),
    "sp2": ("torch", 0.5, 0.5, True),
    "pp2": ("torch_dist", 0.5, 1.0, False),
    "pp2-uneven": ("tied", 1.0, 2.0, False),  # of three layers
    "bf16": ("hf", 1.0, 1.0, False),
}
LAYOUTS: dict[str, dict[str, int]] = {
    "tp1": {},
    "tp2": {"tensor": 2},
    "tp2-pp2": {"tensor": 2, "pipeline": 2},
    "dp2": {"copies": 2},
    "sp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "pp2-uneven": {"pipeline": 2},
    "bf16": {},
}


@pytest.fixture(scope="module")
def first(loop: StockLoop) -> dict[str, Run]:
    """Run one step in every layout, and what the other tests compare; they share the two cores best in one go."""
    cases = []
    for name, (teacher, alpha, temperature, masked) in REFERENCES.items():
        flags = f"{ONE} --teacher-load {teacher} --kd-temperature {temperature} --eval-interval 1 --eval-iters 1"
        flags += f" --kd-alpha {alpha}" * (alpha != 1) + " --eod-mask-loss" * masked
        flags += {"sp2": " --sequence-parallel", "bf16": " --bf16"}.get(name, "")
        cases.append(case(name, flags, **LAYOUTS[name]))
    saved = "--save-interval 2 --ckpt-format torch --save"
    cases += [
        case("self", f"{ONE} --teacher-load student-hf --kd-temperature 2"),
        case("self-bf16", f"{ONE} --teacher-load student-hf --bf16"),
        case("taught", f"--teacher-load hf --kd-alpha 0.5 {saved} taught"),
        case("alpha0", f"--teacher-load hf --kd-alpha 0 {saved} alpha0"),
        case("alone", f"{saved} alone"),
    ]
    return run(loop, cases)


def reference(folder: Path, name: str) -> dict[str, float]:
    """Return the losses and the gradient's norm by transformers' models in float64, on padding as Megatron has it."""
    teacher_name, alpha, temperature, masked = REFERENCES[name]
    teacher_path = folder / ("tied" if teacher_name == "tied" else "hf")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()
        for path in (teacher_path, folder / "student-hf")
    )
    tokens = torch.from_numpy(sample())[None]
    labels = torch.roll(tokens, -1)[0]
    mask = (tokens[0] != EOD if masked else torch.ones(SEQUENCE)).double()
    with torch.no_grad():
        p = teacher(tokens).logits[0] / temperature
    head = student.lm_head.weight.detach()
    head = torch.cat([head, head[-1:].expand(PADDED - VOCABULARY, -1)]).requires_grad_()
    logits = student.model(tokens).last_hidden_state[0] @ head.T
    q = logits[:, :VOCABULARY] / temperature
    kd = temperature**2 * (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    lm = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    kd, lm = ((loss * mask).sum() / mask.sum() for loss in (kd, lm))
    (alpha * kd + (1 - alpha) * lm).backward()
    gradients = [head.grad, *(parameter.grad for parameter in student.model.parameters())]
    norm = float(torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm())
    return {"kd loss": float(kd), "lm loss": float(lm), "grad norm": norm}


@pytest.mark.parametrize("name", REFERENCES)
def test_first_step_has_the_losses_and_the_gradient_of_a_float64_reference(
    name: str, loop: StockLoop, first: dict[str, Run]
) -> None:
    found = first[name].ok()
    bound = 0.03 if name == "bf16" else 2e-5
    wanted = reference(loop.folder, name)
    assert wanted["kd loss"] > 0.05
    for what, value in wanted.items():
        printed = 6e-4 if what == "grad norm" else 0.0  # with three decimals
        assert found.values(what)[1] == pytest.approx(value, rel=bound, abs=printed), what


def test_validation_has_both_losses(first: dict[str, Run]) -> None:
    for name in LAYOUTS:
        (line,) = [line for line in first[name].log.splitlines() if "validation loss at iteration 1 " in line][:1]
        assert "lm loss value" in line and "kd loss value" in line
    assert "kd loss" not in first["alone"].log


def test_model_that_is_its_own_teacher_has_no_loss(first: dict[str, Run]) -> None:
    for name in ("self", "self-bf16"):
        found = first[name].ok()
        assert abs(found.values("kd loss")[1]) < 1e-6
        assert found.values("grad norm")[1] < 1e-4


def test_teacher_is_cut_over_the_pipeline(first: dict[str, Run]) -> None:
    """What is said is the largest part: of four layers two, and the embedding or the output layer."""
    most = {
        name: int(re.search(r"at most ([\d,]+) parameters on a rank", first[name].log)[1].replace(",", ""))
        for name in ("tp1", "pp2", "tp2-pp2")
    }
    assert most["pp2"] < 0.51 * most["tp1"] and most["tp2-pp2"] < 0.53 * most["pp2"], most


def test_virtual_pipeline_learns_the_same(loop: StockLoop) -> None:
    convert(
        make_llama(loop.folder / "four-hf", "mha", layers=4, vocab=VOCABULARY),
        loop.folder / "four",
        format="torch_dist",
    )
    model = "--num-layers 4 --pretrained-checkpoint four --teacher-load tied --eval-interval 4 --eval-iters 1"
    runs = run(
        loop,
        [
            case("flat", f"{model} --global-batch-size 4"),
            case("virtual", f"{model} --global-batch-size 4 --num-layers-per-virtual-pipeline-stage 1", pipeline=2),
        ],
    )
    for what in ("kd loss", "lm loss"):
        assert runs["virtual"].ok().values(what) == pytest.approx(runs["flat"].ok().values(what), rel=1e-6)
    said = [[float(loss) for loss in re.findall(r"loss value: (\S+)", each.log)] for each in runs.values()]
    assert said[0] == pytest.approx(said[1], rel=1e-6) and len(said[0]) >= 2


@pytest.mark.parametrize("layers,stages", [(4, 4), (30, 4), (5, 2), (9, 8), (30, 8), (13, 5), (32, 7), (8, 3)])
def test_any_number_of_layers_is_cut(layers: int, stages: int) -> None:
    from megatron.pruning.training.online_teacher import _split

    found = _split(layers, stages)
    ends = [found[f"decoder_{which}_pipeline_num_layers"] for which in ("first", "last") if len(found) == 2]
    ends = ends or list(found.values())
    rest, inner = layers - sum(ends), stages - len(ends)
    assert rest % max(inner, 1) == 0 and min([*ends, rest // max(inner, 1)]) >= 1
    assert max([*ends, rest // max(inner, 1)]) <= -(-layers // stages) + 1


def state(folder: Path, name: str, step: int) -> dict[str, Any]:
    """Return what a `torch` checkpoint of one rank holds."""
    return load_whole(folder / name / f"iter_{step:07d}" / "mp_rank_00" / "model_optim_rng.pt")


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether weights and optimizer are bitwise the same, and of the same names."""
    assert one["model"].keys() == other["model"].keys()
    pairs = [(weight, other["model"][name]) for name, weight in one["model"].items() if weight is not None]
    moments = one["optimizer"]["state"], other["optimizer"]["state"]
    assert moments[0].keys() == moments[1].keys()
    pairs += [(moments[0][index][name], moments[1][index][name]) for index in moments[0] for name in moments[0][index]]
    return all(torch.equal(*pair) for pair in pairs)


def test_alpha_0_trains_and_saves_bit_for_bit_as_without_a_teacher(loop: StockLoop, first: dict[str, Run]) -> None:
    assert first["alpha0"].ok().losses == first["alone"].ok().losses
    alone = state(loop.folder, "alone", 4)
    assert same_state(alone, state(loop.folder, "alpha0", 4))
    assert not same_state(alone, state(loop.folder, "taught", 4)), "the teacher taught nothing"


def test_resumed_distillation_equals_uninterrupted_bitwise(loop: StockLoop, first: dict[str, Run]) -> None:
    first["taught"].ok()
    flags = "--teacher-load hf --kd-alpha 0.5 --ckpt-format torch --load taught --ckpt-step 2 --save again"
    again = run(loop, [case("again", flags)])["again"].ok()
    assert min(again.values("kd loss")) == 3, "it did not resume"
    assert same_state(state(loop.folder, "taught", 4), state(loop.folder, "again", 4))


def test_loss_falls_towards_the_teacher(loop: StockLoop, first: dict[str, Run]) -> None:
    losses = first["taught"].values("kd loss")
    assert sorted(losses) == [1, 2, 3, 4]
    assert losses[4] < losses[1] - 0.05


def test_mistakes_are_refused_in_one_sentence(loop: StockLoop) -> None:
    (loop.folder / "empty").mkdir()
    sentences = {
        "--teacher-load other": (
            f"--teacher-load other has a vocabulary of {VOCABULARY + 1} and the model in training one of {VOCABULARY}: "
            "distillation needs a teacher with the same tokenizer"
        ),
        "--teacher-load nowhere": "--teacher-load nowhere: no such directory",
        "--teacher-load data.idx": "--teacher-load data.idx is a file: name the checkpoint's directory",
        "--teacher-load empty": "--teacher-load empty is not a checkpoint: it has neither",
        "--teacher-load hf --kd-alpha 1.5": "--kd-alpha 1.5 must lie between 0 (lm loss alone) and 1 (kd loss alone)",
        "--teacher-load hf --kd-temperature 0": "--kd-temperature 0.0 must be a number above 0",
        "--logits-load-dir cached": "--logits-load-dir: Megatron's cached logits are not learned from here",
        "--kd-alpha 0.5": "--kd-alpha needs a teacher: give --teacher-load or --kd-load",
    }
    names = {f"mistake{number}": flags for number, flags in enumerate(sentences)}
    cases = [case(name, flags) for name, flags in names.items()]
    runs = run(loop, cases)
    found = {names[name]: each for name, each in runs.items() if name in names}
    for flags, sentence in sentences.items():
        assert found[flags].code == 1, (flags, found[flags].log[-2000:])
        assert sentence in found[flags].error, flags
        assert "Traceback" not in found[flags].log, flags


def test_fp16_keeps_small_differences_until_the_loss_is_scaled() -> None:
    """They are below its smallest number; the gradient is that of the same logits in fp32."""
    from megatron.pruning.training.divergence import VocabParallelKL

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 2, 5000, generator=draw).half()
    student = (teacher.float() + 1e-3 * torch.randn(4, 2, 5000, generator=draw)).half()
    found = []
    try:
        for dtype in (torch.float16, torch.float32):
            logits = student.to(dtype, copy=True).requires_grad_()
            loss = VocabParallelKL.apply(logits, teacher.to(dtype), 1.0, 5000, torch.distributed.group.WORLD)
            (loss.sum() * 65536).backward()
            found.append(logits.grad.float())
    finally:
        torch.distributed.destroy_process_group()
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-3


MEMORY = """
import torch
from megatron.pruning.training import divergence

def peak(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
divergence._FP32_VALUES = 2**19
for kind in ("all", "top"):
    student, teacher = (torch.empty(256, 2, 32000, dtype=torch.bfloat16).normal_() for _ in range(2))
    student.requires_grad_()
    everyone, before = torch.distributed.group.WORLD, peak("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    if kind == "all":
        loss = divergence.VocabParallelKL.apply(student, teacher, 1.0, 32000, everyone)
    else:
        kept = divergence.top_k(teacher, 64, 1.0, 32000, everyone)
        loss = divergence.TopKKL.apply(student, *kept, 1.0, 32000, everyone)
    loss.sum().backward()
    print((peak("VmHWM") - before) / (2 * student.nbytes))
"""


def test_divergence_takes_about_as_much_memory_as_the_logits_of_both_models() -> None:
    """Beyond these, that is; one half of it is the gradient."""
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment(), text=True, capture_output=True, check=True)
    found = [float(line) for line in done.stdout.split()]
    assert len(found) == 2 and 0.4 < min(found) and max(found) < 1.2, found
