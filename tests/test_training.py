"""The stock training loop on a CPU: layouts agree, a killed run resumes bit for bit, bad checkpoints are refused.

A launch costs seconds of imports, so one process imports pretrain_gpt once and forks a child for every rank of the runs
below, in order (stock_loop.py); test_docs.py launches as a user does it, by torchrun.
"""

import argparse
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from helpers import convert, load_whole, write_documents
from stock_loop import Run, StockLoop, environment

from megatron.pruning.model.layout import Layout
from megatron.pruning.training import cpu_device

STEPS, SAVED, KILLED = 24, 10, 16  # the whole run, the checkpoint to resume from, the step after which -9 comes
pytestmark = pytest.mark.slow

MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --position-embedding-type rope --max-position-embeddings 32 --swiglu --disable-bias-linear "
    "--normalization RMSNorm --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--tokenizer-type NullTokenizer --vocab-size 63 --make-vocab-size-divisible-by 32"
)
TRAINING = (
    f"--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters {STEPS} --lr 1e-2 "
    f"--lr-decay-style cosine --clip-grad 1.0 --log-interval 1 --eval-iters 0 --save-interval {SAVED}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens to train on: 40 documents of random length, ids 0..61."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    path = tmp_path_factory.mktemp("training")
    draw = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(str(path / "data.bin"), dtype=np.uint16)
    for length in draw.integers(20, 200, size=40):
        document = np.cumsum(draw.integers(0, 3, size=length)) % 62
        builder.add_document(document, [length])
    builder.finalize(str(path / "data.idx"))
    return path


DATA = "--train-data-path data --data-cache-path cache"


VALIDATION_LOSS = r"validation-0 loss at iteration .*lm loss value: (\S+)"


@pytest.fixture(scope="module")
def forker(folder: Path) -> StockLoop:
    """Make the stock loop in the folder."""
    return StockLoop(folder)


@pytest.fixture(scope="module")
def trained(forker: StockLoop) -> dict[str, Run]:
    """Whole runs in both formats, and one killed with -9 and started again by the same command."""
    again = f"{MODEL} {TRAINING} {DATA} --ckpt-format torch --load again --save again"
    runs = {
        "whole": forker.run("whole", f"{MODEL} {TRAINING} {DATA} --ckpt-format torch --load whole --save whole"),
        "killed": forker.run("killed", again, kill_after=KILLED),
        "again": forker.run("again", again),
        "dist": forker.run("dist", f"{MODEL} {TRAINING} {DATA} --save dist"),
        "dist_again": forker.run(
            "dist_again", f"{MODEL} {TRAINING} {DATA} --load dist --ckpt-step {SAVED} --save more"
        ),
    }
    for name in ("whole", "again", "dist", "dist_again"):
        assert runs[name].code == 0, runs[name].log[-3000:]
    return runs


def state(folder: Path, name: str, step: int = STEPS) -> dict:
    """Return what a `torch` checkpoint of one rank holds; this test wrote it."""
    return load_whole(folder / name / f"iter_{step:07d}" / "mp_rank_00" / "model_optim_rng.pt")


def test_run_killed_midway_and_started_again_equals_uninterrupted_run_bitwise(
    folder: Path, trained: dict[str, Run]
) -> None:
    assert trained["killed"].code == -signal.SIGKILL
    assert re.search(r"distributed_timeout_minutes \.+ 10\n", trained["whole"].log), "nothing is read that takes time"
    assert max(trained["killed"].losses) in range(KILLED, STEPS)
    resumed = trained["again"].losses
    assert min(resumed) == SAVED + 1, "the second start did not resume"
    assert {step: loss for step, loss in resumed.items() if step > SAVED + 2} == {
        step: loss for step, loss in trained["whole"].losses.items() if step > SAVED + 2
    }
    whole, again = state(folder, "whole"), state(folder, "again")
    for name, weight in whole["model"].items():
        assert weight is None or torch.equal(weight, again["model"][name]), name
    for index, moments in whole["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, again["optimizer"]["state"][index][name]), (index, name)
    assert whole["args"].consumed_train_samples == again["args"].consumed_train_samples == 4 * STEPS


def test_formats_train_and_resume_alike(trained: dict[str, Run]) -> None:
    assert trained["dist"].losses == trained["whole"].losses
    late = {step: loss for step, loss in trained["whole"].losses.items() if step > SAVED + 2}
    assert {step: loss for step, loss in trained["dist_again"].losses.items() if step > SAVED + 2} == late


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_layouts_continue_the_same_training(
    layout: str, folder: Path, forker: StockLoop, trained: dict[str, Run]
) -> None:
    words = f"{MODEL} {TRAINING} {DATA} --load dist --ckpt-step {SAVED}"
    if layout == "tensor":
        stages = "--tensor-model-parallel-size 2 --sequence-parallel --save tensor"
        run = forker.run(layout, f"{words} {stages}", ranks=2).ok()
        assert (folder / "tensor" / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
    else:
        stages = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
        run = forker.run(layout, f"{words} {stages}", ranks=2)
    assert run.code == 0, run.log[-3000:]
    compared = range(SAVED + 3, STEPS + 1)
    assert [run.losses[step] for step in compared] == pytest.approx(
        [trained["dist"].losses[step] for step in compared], abs=1e-4
    )


def test_a_virtual_pipeline_is_not_started_from_random_weights(
    folder: Path, forker: StockLoop, trained: dict[str, Run]
) -> None:
    """The stock loader passes over stages that the files of a plain pipeline do not have."""
    convert(folder / "dist", folder / "plain_pp2", layout=Layout(1, 2))
    words = f"{MODEL} {TRAINING} {DATA} --pretrained-checkpoint plain_pp2 --pipeline-model-parallel-size 2"
    run = forker.run("virtual", f"{words} --num-layers-per-virtual-pipeline-stage 1", ranks=2)
    assert run.code == 1 and "has 0 of the 2 virtual pipeline stages of a rank: convert it with" in run.error


@pytest.mark.parametrize("layout", ["alone", "tp2"])
def test_starts_on_a_gpu_without_transformer_engine_and_apex(layout: str, forker: StockLoop) -> None:
    """Stock's defaults there ask for kernels of both; the losses are those of bf16 on the CPU."""
    words = f"{MODEL} {TRAINING} {DATA} --bf16 --use-cpu-initialization --exit-interval 3"
    ranks = 1
    if layout == "tp2":
        words, ranks = f"{words} --tensor-model-parallel-size 2 --sequence-parallel", 2
    on_gpu = forker.run(f"gpu_{layout}", words, ranks, gpu=True).ok()
    on_cpu = forker.run(f"cpu_{layout}", words, ranks).ok()
    assert len(on_gpu.losses) == 3 and on_gpu.losses == pytest.approx(on_cpu.losses, abs=0.01)


def test_validation_over_all_of_its_text_in_batches_of_its_own_is_alike_in_layouts(
    folder: Path, forker: StockLoop, trained: dict[str, Run]
) -> None:
    write_documents(folder / "valid", *np.random.default_rng(1).integers(0, 62, size=(9, 100)))
    words = f"{MODEL} {TRAINING} {DATA} --load dist --ckpt-step {SAVED} --exit-interval {SAVED + 1} --eval-interval 1"
    words += " --valid-data-path valid --full-validation"
    layouts = {"alone": (1, ""), "tensor": (2, "--tensor-model-parallel-size 2"), "copies": (2, "")}
    layouts["pipeline"] = (4, "--pipeline-model-parallel-size 4")
    runs = {name: forker.run(f"valid_{name}", f"{words} {flags}", ranks) for name, (ranks, flags) in layouts.items()}
    found = {name: re.findall(VALIDATION_LOSS, run.ok().log) for name, run in runs.items()}
    assert [len(losses) for losses in found.values()] == [1] * len(layouts)
    losses = {name: float(loss) for name, (loss,) in found.items()}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["alone"]), abs=1e-4)
    for name, flag in {"micro": "--eval-micro-batch-size 4", "global": "--eval-global-batch-size 2"}.items():
        refused = forker.run(f"valid_{name}", f"{words} {flag}")
        assert f"of which there are 1: {flag} must be 1, or left out" in refused.error


UNFUSED = "--spec megatron.pruning.training.local_layers unfused_layers"


@pytest.mark.parametrize("heads", ["with groups", "large, without"])
def test_torch_attention_starts_as_megatrons_own(heads: str, forker: StockLoop) -> None:
    """Also where every head has its own key: Megatron's attention takes that in one layout only."""
    model = MODEL if heads == "with groups" else f"{MODEL} --num-query-groups 4 --kv-channels 66"
    words = f"{model} {TRAINING} {DATA} --exit-interval 3"
    name = heads.replace(", ", "_").replace(" ", "_")
    ours, theirs = forker.run(f"{name}_ours", words), forker.run(f"{name}_theirs", f"{words} {UNFUSED}")
    assert ours.code == theirs.code == 0, theirs.log[-3000:]
    assert len(ours.losses) == 3 and ours.losses == pytest.approx(theirs.losses, abs=2e-5)


@pytest.mark.parametrize("masked", ["causal", "documents apart"])
def test_torch_attention_trains_as_megatrons_own(masked: str, forker: StockLoop, trained: dict[str, Run]) -> None:
    words = f"{MODEL} {TRAINING} {DATA} --load dist --ckpt-step {SAVED} --exit-interval {SAVED + 5}"
    if masked != "causal":
        words += " --reset-attention-mask --null-tokenizer-eod-id 7"
    name = masked.replace(" ", "_")
    ours, theirs = forker.run(name, words), forker.run(f"{name}_unfused", f"{words} {UNFUSED}")
    assert ours.code == theirs.code == 0, theirs.log[-3000:]
    assert list(ours.losses) == list(range(SAVED + 1, SAVED + 6))
    assert ours.losses == pytest.approx(theirs.losses, abs=2e-5)
    assert (ours.losses[SAVED + 5] == trained["dist"].losses[SAVED + 5]) == (masked == "causal"), "what is masked?"


def test_norms_named_as_transformer_engine_does_resume_bitwise(
    folder: Path, forker: StockLoop, trained: dict[str, Run]
) -> None:
    shutil.copytree(folder / "whole" / f"iter_{SAVED:07d}", folder / "te" / f"iter_{SAVED:07d}")
    (folder / "te" / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    content = state(folder, "te", SAVED)
    names = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    model = content["model"]
    for layer in range(4):
        for local, theirs in names.items():
            model[f"decoder.layers.{layer}.{theirs}"] = model.pop(f"decoder.layers.{layer}.{local}")
    torch.save(content, folder / "te" / f"iter_{SAVED:07d}" / "mp_rank_00" / "model_optim_rng.pt")
    run = forker.run("te", f"{MODEL} {TRAINING} {DATA} --load te --exit-interval {SAVED + 4}")
    assert run.code == 0, run.log[-3000:]
    for step in (SAVED + 3, SAVED + 4):
        assert run.losses[step] == trained["whole"].losses[step]


def test_local_norms_load_into_layers_of_transformer_engine() -> None:
    from megatron.pruning.training.strict_loading import _with_norms_named_as_in

    theirs = {f"decoder.layers.{n}.self_attention.linear_qkv.layer_norm_weight": n for n in (0, 11)}
    theirs |= {f"decoder.layers.{n}.mlp.linear_fc1.layer_norm_weight": n for n in (0, 11)}
    theirs |= {"decoder.final_layernorm.weight": 1, "decoder.layers.0.mlp.linear_fc1.weight": 2}
    ours = {
        name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight").replace(
            "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
        ): value
        for name, value in theirs.items()
    }
    assert ours != theirs
    assert _with_norms_named_as_in(theirs, ours) == theirs == _with_norms_named_as_in(theirs, theirs)
    assert _with_norms_named_as_in(ours, theirs) == ours == _with_norms_named_as_in(ours, ours)
    both = ours | theirs
    assert _with_norms_named_as_in(ours, both) == both, "a weight too many must stay one"


def test_other_schedule_resumes_only_when_it_is_asked_for(
    folder: Path, forker: StockLoop, trained: dict[str, Run]
) -> None:
    longer = f"{MODEL} {TRAINING} {DATA} --load whole --ckpt-step {SAVED} --train-iters {2 * STEPS}"
    refused = forker.run("longer", longer)
    assert refused.code == 1
    for words in (f"is {4 * STEPS} samples", f"this run's {8 * STEPS} samples", "add --override-opt-param-scheduler"):
        assert words in refused.error
    run = forker.run("overridden", f"{longer} --override-opt-param-scheduler --exit-interval {STEPS}")
    assert run.code == 0, run.log[-3000:]
    rates = re.findall(r"iteration +(\d+)/.*learning rate: (\S+)", run.log)
    assert [int(step) for step, _ in rates] == list(range(SAVED + 1, STEPS + 1))
    cosine = [1e-2 * (1 + math.cos(math.pi * step / (2 * STEPS))) / 2 for step in range(SAVED + 1, STEPS + 1)]
    assert [float(rate) for _, rate in rates] == pytest.approx(cosine, rel=1e-5)
    other = forker.run("other_rate", f"{MODEL} {TRAINING} {DATA} --load whole --ckpt-step {SAVED} --lr 2e-2")
    assert "saved under another --lr" in other.error and not other.losses


def test_mistake_of_all_ranks_is_said_once(forker: StockLoop) -> None:
    run = forker.run("three", f"{MODEL} {TRAINING} {DATA} --tensor-model-parallel-size 3", ranks=2)
    assert run.code == 1
    assert run.error == (
        "[rank 0] error: 2 processes were started, which is no multiple of "
        "--tensor-model-parallel-size 3 x --pipeline-model-parallel-size 1 = 3"
    )
    assert "UserWarning" not in run.log


FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


def damage(folder: Path, name: str, source: str, change: str) -> None:
    """Copy a checkpoint and spoil the copy."""
    shutil.copytree(folder / source, folder / name)
    step = folder / name / f"iter_{STEPS:07d}"
    path = step / "mp_rank_00" / "model_optim_rng.pt"
    if change == "no iteration":
        shutil.rmtree(step)
    elif change == "no shard":
        next(step.glob("*.distcp")).unlink()
    elif change == "no file":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:20_000])
    else:
        content = load_whole(path)
        model = content["model"]
        if change == "missing weight":
            del model[FC2]
        elif change == "other shape":
            model[FC2] = model[FC2][:, :-1].clone()
        elif change == "extra weight":
            model["decoder.layers.9.mlp.linear_fc2.weight"] = model[FC2]
        torch.save(content, path)


def refused(forker: StockLoop, name: str, words: str, sentence: str, **how: object) -> None:
    (forker.folder / f"{name}.log").unlink(missing_ok=True)
    run = forker.run(name, words, **how)
    assert run.code == 1, run.log[-2000:]
    assert sentence in run.error
    assert not run.losses and "Traceback" not in run.log


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("missing weight", f"lacks {FC2}"),
        ("other shape", f"{FC2} is (32, 63) there and (32, 64) here"),
        ("extra weight", "has no decoder.layers.9.mlp.linear_fc2.weight"),
        ("truncated", "is not a complete file of torch.save"),
        ("no file", "neither mp_rank_*/model_optim_rng.pt nor .metadata"),
        ("no iteration", f"there is no iter_{STEPS:07d} in it"),
        ("no shard", ".metadata names __0_0.distcp, which is not there"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_damaged_checkpoint_is_refused(folder: Path, forker: StockLoop, change: str, sentence: str) -> None:
    name = change.replace(" ", "_")
    damage(folder, name, "dist" if change == "no shard" else "whole", change)
    refused(forker, name, f"{MODEL} {TRAINING} {DATA} --finetune --load {name}", sentence)


TUNED = f"{MODEL} {TRAINING} {DATA} --finetune --load dist"
WHOLE = "--full-validation --valid-data-path"
SPLIT = f"{MODEL} {TRAINING} --data-path data --data-cache-path cache --full-validation --split"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (f"{TUNED} --ffn-hidden-size 96", "linear_fc1.weight is (4, 128, 32) there and (4, 192, 32) here"),
        (f"{TUNED} --num-layers 2", "(4, 32) there and (2, 32) here"),
        (f"{MODEL} {TRAINING} {DATA} --load nowhere --save elsewhere", "--load nowhere holds no checkpoint"),
        (f"{TUNED} --load fresh --save fresh", "--load fresh holds no checkpoint"),
        (f"{TUNED} --distributed-backend nccl", "--distributed-backend nccl needs a GPU"),
        (f"{TUNED} --num-attention-heads 3", "Megatron refuses these flags"),
        (f"{TUNED} --lr-warmup-iters {STEPS}", f"-iters {STEPS} must be less than --train-iters {STEPS}"),
        (f"{TUNED} --lr-warmup-fraction 1.0", "--lr-warmup-fraction 1.0 must be less than 1"),
        (f"{TUNED} --attention-backend local", "local cannot be had in megatron-core 0.19: leave it out"),
        (
            f"{TUNED} --global-batch-size 3 --eval-global-batch-size 4",
            "global batch size (3) is not divisible by micro",
        ),
        (f"{MODEL} --micro-batch-size 2", "given: --seq-length --train-iters (or --train-samples) --lr --train-data"),
        (f"{MODEL} {TRAINING} --train-data-path absent", "--train-data-path absent: there is no absent.bin"),
        (f"{TUNED} --full-validation", "--full-validation needs a text: give --valid-data-path, or --split"),
        (f"{TUNED} {WHOLE} data --test-data-path data", "with a text to test on: leave --test-data-path out"),
        (f"{TUNED} {WHOLE} 1 data", "leave the weights out of --valid-data-path"),
        (f"{TUNED} {WHOLE} data --num-virtual-stages-per-pipeline-rank 2", "with a virtual pipeline: leave"),
        (f"{SPLIT} 9,1,1", "give --split 0 as its third number"),
        (f"{SPLIT} 9,0,0", "or --split a second number above 0"),
        (f"{TUNED} --save more --use-distributed-optimizer", "cannot resume without TransformerEngine or apex"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_flags_that_do_not_fit_are_refused_in_one_sentence(forker: StockLoop, words: str, sentence: str) -> None:
    refused(forker, "refused", words, sentence)


@pytest.mark.usefixtures("trained")
def test_saving_aside_without_its_library_or_a_gpu_is_a_sentence(forker: StockLoop) -> None:
    words = f"{TUNED} --save aside --async-save --use-persistent-ckpt-worker"
    refused(forker, "aside", words, "--use-persistent-ckpt-worker needs a GPU")
    refused(forker, "aside_gpu", words, "--async-save needs nvidia-resiliency-ext, which is not installed", gpu=True)


@pytest.mark.usefixtures("trained")
def test_weights_and_biases_without_a_login_is_a_sentence(folder: Path, forker: StockLoop) -> None:
    nobody = {"HOME": str(folder), "NETRC": "/dev/null", "WANDB_API_KEY": "", "WANDB_MODE": "online"}
    sentence = "--wandb-project curves: No API key configured; log in with `wandb login` or WANDB_API_KEY, or keep"
    refused(forker, "nobody", f"{TUNED} --wandb-project curves --save nobody", sentence, settings=nobody)
    with_place = "--wandb-project curves needs --wandb-save-dir, or --save"
    refused(forker, "nowhere", f"{TUNED} --wandb-project curves", with_place, settings=nobody)


def test_help_of_the_training_lists_the_flags_of_both(forker: StockLoop) -> None:
    help = forker.run("help", "--help").ok().log
    assert "--kd-temperature T" in help and "--wandb-project" in help and "1.10 = 10%)" in " ".join(help.split())


@pytest.mark.parametrize(
    ("flag", "library"), [("--tensorboard-dir", "tensorboard"), ("--wandb-project", "wandb")], ids=lambda name: name
)
def test_curves_without_what_writes_them_are_refused(monkeypatch: pytest.MonkeyPatch, flag: str, library: str) -> None:
    from megatron.pruning.training import flags

    args = argparse.Namespace(tensorboard_dir=None, wandb_project=None, wandb_save_dir=None, save="saved")
    flags._refuse_without_writers(args)
    setattr(args, flag.removeprefix("--").replace("-", "_"), "curves")
    flags._refuse_without_writers(args)
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{flag} curves needs {library}, which is not installed: pip install"):
        flags._refuse_without_writers(args)


def test_files_beside_the_checkpoint_follow_it_and_its_arguments_are_enough(
    folder: Path, forker: StockLoop, trained: dict[str, Run]
) -> None:
    parent = folder / "whole"
    (parent / "huggingface").mkdir()
    (parent / "huggingface" / "config.json").write_text("{}")
    (parent / "prune_plan.json").write_text("plan")
    words = (
        "--use-checkpoint-args --load child --pretrained-checkpoint whole --save child --tokenizer-type NullTokenizer "
        f"--vocab-size 63 {TRAINING} {DATA} --exit-interval"
    )
    first = forker.run("child", f"{words} 2")
    assert first.code == 0, first.log[-3000:]
    assert first.losses[1] < trained["whole"].losses[3] - 0.5, "it did not start from the parent's weights"
    assert (folder / "child" / "huggingface" / "config.json").read_text() == "{}"
    assert (folder / "child" / "prune_plan.json").read_text() == "plan"
    second = forker.run("child_again", f"{words} 4")
    assert min(second.losses) == 3, "the second start did not resume from --load"


def test_a_width_that_pruning_left_odd_is_trained(forker: StockLoop) -> None:
    alone = MODEL.replace("--ffn-hidden-size 64", "--ffn-hidden-size 25")
    done = forker.run("odd", f"{alone} {TRAINING} {DATA}".replace(f"--train-iters {STEPS}", "--train-iters 1"))
    assert sorted(done.ok().losses) == [1]


@pytest.mark.parametrize("hidden", [False, True])
def test_gpus_that_torch_cannot_use_are_said(
    hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(cpu_device, "DEVICES", tmp_path)
    if not hidden:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert cpu_device.count_gpus() == 0
    said = capsys.readouterr().err
    assert said == "" if hidden else said.startswith("note: this machine has GPUs that torch cannot use")
    assert said.count("\n") == (not hidden)


def test_entry_script_stands_the_cpu_in_only_for_itself() -> None:
    assert not (ROOT / "megatron" / "__init__.py").exists(), "it would hide pip's megatron.core"
    program = (
        "import torch; real = torch.cuda.is_available(); import pretrain_gpt, megatron.core, megatron.training; "
        "from megatron.pruning.training import cpu_device; "
        "assert cpu_device.is_installed() is not real; "
        "assert real or torch.zeros(1, device='cuda').device.type == 'cpu'; "
        "assert real or torch.zeros(1).cuda().to('cuda:0').type() == 'torch.cuda.FloatTensor'; "
        "assert real or not torch.accelerator.is_available(); print('as said')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), text=True, capture_output=True)
    assert done.stdout.endswith("as said\n"), done.stderr[-2000:]
    assert not done.stderr, "the import should be quiet"
    assert not getattr(torch.cuda, "_stands_for_cpu", False), "the tests' own process must keep its device"
