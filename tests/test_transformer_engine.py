"""A machine with GPUs and TransformerEngine, both stood in for: its layers and the local ones go on from each other."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment, python_path
from helpers import make_llama
from stock_loop import Run, StockLoop
from test_training import DATA, MODEL, TRAINING, folder  # noqa: F401 - a fixture

from megatron.pruning.formats import open_checkpoint, save_checkpoint
from megatron.pruning.model.layout import Layout

pytestmark = pytest.mark.slow(12)

SHORT = "--train-iters 8 --save-interval 2"
FP8 = "--fp8-format hybrid --fp8-param-gather --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel"


@pytest.fixture(scope="module")
def local(folder: Path) -> StockLoop:  # noqa: F811
    """Make the stock loop without TransformerEngine."""
    return StockLoop(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> StockLoop:  # noqa: F811
    """Make the stock loop with it, on a machine with GPUs."""
    return StockLoop(folder, te=True)


@pytest.fixture(scope="module")
def whole(local: StockLoop) -> dict[str, Run]:
    """A run of local layers in either format, saved every other step."""
    words = f"{MODEL} {TRAINING} {SHORT} {DATA}"
    return {
        format: local.run(f"whole_{format}", f"{words} --ckpt-format {format} --save whole_{format}").ok()
        for format in ("torch", "torch_dist")
    }


@pytest.mark.parametrize("format", ["torch", "torch_dist"])
def test_layers_of_either_kind_resume_the_others_training(
    format: str, whole: dict[str, Run], local: StockLoop, engine: StockLoop
) -> None:
    """Weights, moments and the count of steps: the losses are those of the run that nobody interrupted."""
    words = f"{MODEL} {TRAINING} {SHORT} {DATA} --ckpt-format {format}"
    theirs = engine.run(
        f"te_{format}", f"{words} --load whole_{format} --ckpt-step 2 --save te_{format}", gpu=True
    ).ok()
    assert "transformer_impl" in theirs.log and "transformer_engine" in theirs.log
    ours = local.run(f"back_{format}", f"{words} --load te_{format} --ckpt-step 4").ok()
    for run, steps in ((theirs, range(5, 9)), (ours, range(7, 9))):
        found = {step: run.losses[step] for step in steps}
        assert found == pytest.approx({step: whole[format].losses[step] for step in steps}, abs=1e-4)


def test_a_machine_that_has_it_and_no_gpu_trains_without(
    whole: dict[str, Run],
    folder: Path,  # noqa: F811
) -> None:
    """As a login node: Megatron takes its Adam, whose kernels are CUDA's, wherever it can be imported."""
    words = f"{MODEL} {TRAINING} {SHORT} {DATA} --exit-interval 2".split()
    program, path = str(ROOT / "pretrain_gpt.py"), python_path(ROOT / "tests/te_stand_in")
    done = subprocess.run(
        [sys.executable, program, *words], cwd=folder, env=environment(PYTHONPATH=f"{ROOT}:{path}"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    losses = Run(done.returncode, done.stdout).ok().losses
    assert losses == {step: whole["torch"].losses[step] for step in (1, 2)}


def test_converted_torch_dist_loads_into_its_layers(
    gqa: Path,
    folder: Path,  # noqa: F811
    local: StockLoop,
    engine: StockLoop,
) -> None:
    for format in ("torch", "torch_dist"):
        save_checkpoint(open_checkpoint(gqa), folder / f"converted-{format}", format=format, layout=Layout(1, 1, 1))
    words = (folder / "converted-torch/megatron_args.txt").read_text()
    words += f" --tokenizer-type NullTokenizer {TRAINING} {DATA} --exit-interval 1 --pretrained-checkpoint"
    ours = local.run("from_torch", f"{words} converted-torch").ok()
    theirs = engine.run("from_dist", f"{words} converted-torch_dist", gpu=True).ok()
    assert theirs.losses == pytest.approx(ours.losses, abs=1e-5) and len(ours.losses) == 1


def test_a_cluster_trains_and_resumes_as_one_rank_does(whole: dict[str, Run], engine: StockLoop) -> None:
    words = f"{MODEL} {TRAINING} {SHORT} {DATA} --bf16"
    first = "--load whole_torch_dist --ckpt-step 2 --finetune"
    one = engine.run("one", f"{words} {first}", gpu=True).ok()
    flags = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --save cluster"
    four = engine.run("four", f"{words} {LAYOUT} {flags} {first}", ranks=4, gpu=True).ok()
    again = engine.run("again", f"{words} {LAYOUT} {flags} --load cluster --ckpt-step 4", ranks=4, gpu=True).ok()
    assert four.losses == pytest.approx(one.losses, abs=0.02) and len(one.losses) == 8
    assert {step: again.losses[step] for step in (7, 8)} == {step: four.losses[step] for step in (7, 8)}


def test_a_teacher_is_learned_from_in_its_layers(
    gqa: Path,
    folder: Path,  # noqa: F811
    local: StockLoop,
    engine: StockLoop,
) -> None:
    """One that reads along, cut over the pipeline, and one that was recorded by tensor-parallel ranks."""
    teacher = make_llama(folder / "teacher", "mha", layers=3)
    save_checkpoint(open_checkpoint(gqa), folder / "student", format="torch_dist", layout=Layout(1, 1, 32))
    save_checkpoint(open_checkpoint(teacher), folder / "teacher-dist", format="torch_dist", layout=Layout(1, 1, 32))
    models = {name: (folder / name / "megatron_args.txt").read_text() for name in ("student", "teacher-dist")}
    data = f"--tokenizer-type NullTokenizer {TRAINING} {DATA} --train-iters 2"
    student = f"{models['student']} {data} --pretrained-checkpoint student"
    ours = local.run("along", f"{student} --teacher-load teacher").ok()
    pipeline = "--pipeline-model-parallel-size 2"
    theirs = engine.run("te_along", f"{student} --teacher-load teacher {pipeline}", ranks=2, gpu=True).ok()
    # What only the student computes in; the stand-in has no other numbers for it.
    fp8 = engine.run("te_fp8", f"{student} --teacher-load teacher --bf16 {FP8}", gpu=True).ok()
    assert fp8.values("kd loss") == pytest.approx(ours.values("kd loss"), abs=0.05)
    # Those of the student are all that is asked for, and more than the stand-in has.
    graphs = engine.run("te_graphs", f"{student} --teacher-load teacher --cuda-graph-impl local", gpu=True)
    assert "RNG tracker does not support cudagraphs" in graphs.error
    keep = f"--pretrained-checkpoint teacher-dist --kd-save answers --kd-top-k 101 --kd-dtype fp32 {LAYOUT}"
    engine.run("te_record", f"{models['teacher-dist']} {data} {keep}", ranks=2, gpu=True).ok()
    recorded = engine.run("te_recorded", f"{student} --kd-load answers {pipeline}", ranks=2, gpu=True).ok()
    for run in (theirs, recorded):
        for what in ("kd loss", "lm loss"):
            assert run.values(what) == pytest.approx(ours.values(what), abs=2e-5) and len(run.values(what)) == 2
