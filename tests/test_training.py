"""The stock training loop on a CPU: layouts agree, a killed run resumes bit for bit, bad checkpoints are refused.

A launch costs seconds of imports, so one driver process imports pretrain_gpt once and forks a child for every
single-process run below, in order; only the runs over two processes are launched by torchrun.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVED, KILLED = 24, 10, 16  # the whole run, the checkpoint to resume from, the step after which -9 comes
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
DRIVER = """
import json, os, signal, sys, time
sys.path.insert(0, {root!r})
import pretrain_gpt

def child(words, log):
    sys.argv = ["pretrain_gpt.py", *words]
    out = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1), os.dup2(out, 2)
    try:
        pretrain_gpt.run()
        code = 0
    except SystemExit as leave:
        code = leave.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)

def main():
    for line in sys.stdin:
        log, words, kill_after = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(words, log)
        done = 0
        while kill_after and not done:
            time.sleep(0.002)
            done, status = os.waitpid(pid, os.WNOHANG)
            seen = open(log).read() if os.path.exists(log) else ""
            if not done and f"iteration {{kill_after:8d}}/" in seen:
                os.kill(pid, signal.SIGKILL)
                break
        if not done:
            _, status = os.waitpid(pid, 0)
        print("exit", os.waitstatus_to_exitcode(status), flush=True)

if __name__ == "__main__":
    main()
"""


@dataclass
class Run:
    """What a training run left: its exit status and its log."""

    code: int
    log: str

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step. The stock log's first line after a start is counted again in its second."""
        return {int(step): float(loss) for step, loss in re.findall(r"iteration +(\d+)/.*lm loss: (\S+)", self.log)}

    @property
    def error(self) -> str:
        """The sentence that ended the run."""
        lines = [line for line in self.log.splitlines() if re.match(r"(\[rank \d+\] )?error: ", line)]
        assert len(lines) == 1, self.log[-2000:]
        return lines[0]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


class Forker:
    """The driver process of this module, and the folder that its runs write to."""

    def __init__(self, folder: Path) -> None:
        (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "driver.py"],
            cwd=folder,
            env=environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def run(self, name: str, words: str, kill_after: int | None = None) -> Run:
        """Runs pretrain_gpt.py with these flags in one process, killed with -9 after a step if that is asked for."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([f"{name}.log", words.split(), kill_after]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        assert answer[:1] == ["exit"], "the driver died"
        return Run(int(answer[1]), (self.folder / f"{name}.log").read_text())


def launched(folder: Path, processes: int, words: str) -> Run:
    """Runs a case over several processes with torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "pretrain_gpt.py"), *words.split()]
    done = subprocess.run(
        command, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return Run(done.returncode, done.stdout)


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


@pytest.fixture(scope="module")
def forker(folder: Path) -> Iterator[Forker]:
    """Starts and ends the driver."""
    forker = Forker(folder)
    yield forker
    forker.process.communicate()


@pytest.fixture(scope="module")
def trained(forker: Forker) -> dict[str, Run]:
    """Whole runs in both formats, and one killed with -9 and started again by the same command."""
    again = f"{MODEL} {TRAINING} {DATA} --ckpt-format torch --load again --save again"
    runs = {
        "whole": forker.run("whole", f"{MODEL} {TRAINING} {DATA} --ckpt-format torch --load whole --save whole"),
        "killed": forker.run("killed", again, KILLED),
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
    """What a `torch` checkpoint of one rank holds; it was written by this test."""
    return torch.load(folder / name / f"iter_{step:07d}" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)


def test_run_killed_midway_and_started_again_equals_uninterrupted_run_bitwise(
    folder: Path, trained: dict[str, Run]
) -> None:
    assert trained["killed"].code == -signal.SIGKILL
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


@pytest.mark.parametrize(
    "layout",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ],
)
def test_layouts_continue_the_same_training(layout: str, folder: Path, trained: dict[str, Run]) -> None:
    run = launched(folder, 2, f"{MODEL} {TRAINING} {DATA} --load dist --ckpt-step {SAVED} {layout}")
    assert run.code == 0, run.log[-3000:]
    compared = range(SAVED + 3, STEPS + 1)
    assert [run.losses[step] for step in compared] == pytest.approx(
        [trained["dist"].losses[step] for step in compared], abs=1e-4
    )


def damage(folder: Path, name: str, source: str, change: str) -> None:
    """Copies a checkpoint and spoils the copy."""
    shutil.copytree(folder / source, folder / name)
    step = folder / name / f"iter_{STEPS:07d}"
    if change == "no iteration":
        shutil.rmtree(step)
    elif change == "no shard":
        next(step.glob("*.distcp")).unlink()
    elif change == "no file":
        (step / "mp_rank_00" / "model_optim_rng.pt").unlink()
    elif change == "truncated":
        path = step / "mp_rank_00" / "model_optim_rng.pt"
        path.write_bytes(path.read_bytes()[:20_000])
    else:
        path = step / "mp_rank_00" / "model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        key = "decoder.layers.1.mlp.linear_fc2.weight"
        if change == "missing weight":
            del content["model"][key]
        elif change == "other shape":
            content["model"][key] = content["model"][key][:, :-1].clone()
        elif change == "extra weight":
            content["model"]["decoder.layers.9.mlp.linear_fc2.weight"] = content["model"][key]
        torch.save(content, path)


def test_checkpoint_that_does_not_fit_is_refused_in_one_sentence(
    folder: Path, forker: Forker, trained: dict[str, Run]
) -> None:
    fc2 = "decoder.layers.1.mlp.linear_fc2.weight"
    damaged = {
        "missing weight": ("whole", f"lacks {fc2}"),
        "other shape": ("whole", f"{fc2} is (32, 63) there and (32, 64) here"),
        "extra weight": ("whole", "has no decoder.layers.9.mlp.linear_fc2.weight"),
        "truncated": ("whole", "mp_rank_00/model_optim_rng.pt is cut short"),
        "no file": ("whole", "neither mp_rank_*/model_optim_rng.pt nor .metadata"),
        "no iteration": ("whole", f"there is no iter_{STEPS:07d} in it"),
        "no shard": ("dist", "cannot load the checkpoint in no_shard"),
    }
    for change, (source, _) in damaged.items():
        damage(folder, change.replace(" ", "_"), source, change)
    base = f"{MODEL} {TRAINING} {DATA} --finetune"
    words = {name: f"{base} --load {name}" for name in (change.replace(" ", "_") for change in damaged)} | {
        "dist_ffn": f"{base} --load dist --ffn-hidden-size 96",
        "dist_depth": f"{base} --load dist --num-layers 2",
        "nowhere": f"{MODEL} {TRAINING} {DATA} --load nowhere --save elsewhere",
        "finetune_nothing": f"{base} --load fresh --save fresh",
        "nccl": f"{base} --load dist --distributed-backend nccl",
        "no_heads": f"{base} --load dist --num-attention-heads 3",
        "dist_optim": f"{base} --load dist --save more --use-distributed-optimizer",
    }
    sentences = {change.replace(" ", "_"): sentence for change, (_, sentence) in damaged.items()} | {
        "dist_ffn": "decoder.layers.mlp.linear_fc1.weight is (4, 128, 32) there and (4, 192, 32) here",
        "dist_depth": "(4, 32) there and (2, 32) here",
        "nowhere": "--load nowhere holds no checkpoint",
        "finetune_nothing": "--load fresh holds no checkpoint",
        "nccl": "--distributed-backend nccl needs a GPU",
        "no_heads": "these flags do not go together",
        "dist_optim": "--use-distributed-optimizer cannot resume without TransformerEngine or apex",
    }
    for name, sentence in sentences.items():
        run = forker.run(name, words[name])
        assert run.code == 1, (name, run.log[-2000:])
        assert sentence in run.error, (name, run.error)
        assert not run.losses


def test_files_beside_the_checkpoint_follow_it_and_its_arguments_are_enough(
    folder: Path, forker: Forker, trained: dict[str, Run]
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


def test_entry_script_stands_the_cpu_in_only_for_itself() -> None:
    assert not (ROOT / "megatron" / "__init__.py").exists(), "it would hide pip's megatron.core"
    program = (
        "import torch; real = torch.cuda.is_available(); import pretrain_gpt; from megatron.pruning import cpu_device; "
        "import megatron.core, megatron.training; "
        "assert cpu_device.is_installed() is not real; "
        "assert real or torch.zeros(1, device='cuda').device.type == 'cpu'; "
        "assert real or torch.zeros(1).cuda().to('cuda:0').type() == 'torch.cuda.FloatTensor'; "
        "assert real or not torch.accelerator.is_available(); print('as said')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), text=True, capture_output=True)
    assert done.stdout.endswith("as said\n"), done.stderr[-2000:]
    assert not getattr(torch.cuda, "_stands_for_cpu", False), "the tests' own process must keep its device"
