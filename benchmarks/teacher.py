"""A teacher that was recorded, beside one that reads along: how fast is training, and what does it come to, by K?

    python benchmarks/teacher.py --work-dir runs/teacher      # about an hour on two cores

Speed: a pruned model is trained by the text alone, beside its parent, and from the K likeliest tokens of the parent,
which was recorded before; each arm in a process of its own, one after the other and that as many times as --rounds
says. A round's figure is the median time of its steps after the first few; ratios are to the LM loss within a round.

Loss: the embedded model, pruned to 53.6%, is trained on few tokens from several K, beside the parent that reads along;
the mean of three seeds. Runs that are done are kept, so that the benchmark may be stopped and goes on where it was.

Prints two tables, and writes benchmarks/results/teacher.json, from which docs/tables.py makes those of
docs/en/recover.md: `benchmark`, `machine`, `rounds`, `speed` (by model and arm: `tokens_per_second` and `to_lm`) and
`loss` (by arm: the validation loss after each number of tokens, as `mean` and `deviation`).
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from experiment import (
    RESULTS,
    ROOT,
    TOKENIZER,
    VALIDATION,
    Experiment,
    Run,
    command,
    machine,
    show,
    spread,
    spread_text,
    write_results,
)

KEPT = (16, 64, 256, 1024)
LM, ALONG, HIDDEN = "LM loss", "teacher reads along", "teacher reads along, hidden states"
SEEDS, STEPS, MARKS = (1, 2, 3), 300, (100, 200, 300)
RATES = {LM: 2e-3}  # those that benchmarks/recovery.py finds best; of distillation twice as large
WARM_UP = 3  # steps that are not timed
# The shape that is pruned to, and tokens of a sequence, sequences of a micro batch and steps that are timed.
SPEED = {"tiny-llama": ((128, 288), 256, 8, 12), "58m": ((384, 1024), 256, 4, 8)}


class Loss:
    """What training from recorded answers comes to."""

    def __init__(self, work: Path) -> None:
        self.experiment = Experiment(work, 1)
        scores = ("--criterion", "activation", "--scores", self.experiment.scores(), "--no-correct-norms")
        shape = ("--hidden-size-remain", 128, "--ffn-hidden-size-remain", 288, "--num-layers-remain", 6)
        self.start = self.experiment.prune("activation", *shape, *scores)

    def arm(self, name: str, seed: int, flags: tuple[str, ...]) -> dict[int, float]:
        """Return the validation loss after each mark."""
        lr = RATES.get(name, 4e-3)
        run = Run(f"{name.replace(', ', '-').replace(' ', '_')}-{seed}", self.start, STEPS, lr, seed, MARKS, flags)
        return self.experiment.train([run])[run.name]

    def recorded(self, k: int, seed: int) -> dict[int, float]:
        """Return those of an arm that learns from K tokens; the order of the text hangs on the seed."""
        name, cache = f"K = {k}", self.experiment.work / f"answers-{k}-{seed}"
        if f"{name.replace(' ', '_')}-{seed}, {STEPS} steps, lr 0.004" not in self.experiment.results:
            sizes = {"MICRO_BATCH_SIZE": 4, "GLOBAL_BATCH_SIZE": 4, "SEQ_LENGTH": 256, "TRAIN_ITERS": STEPS}
            sizes |= {"LR_WARMUP_ITERS": 1, "EVAL_ITERS": 0}
            data, valid = (self.experiment.text() / name for name in ("train_text_document", VALIDATION))
            train(
                {"LOAD_PATH": self.start, "DATA_PATH": data, "VALID_DATA_PATH": valid,
                 "TEACHER_LOAD": self.experiment.parent,
                 "TEACHER_SAVE": cache, "KD_TOP_K": k, "TOKENIZER_MODEL": TOKENIZER, **sizes},
                "--seed", seed,
            )  # fmt: skip
        return self.arm(name, seed, ("--kd-load", str(cache)))

    def all(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the losses of all arms by tokens, over the seeds."""
        found: dict[str, list[dict[int, float]]] = {}
        for seed in SEEDS:
            found.setdefault(LM, []).append(self.arm(LM, seed, ()))
            along = ("--teacher-load", str(self.experiment.parent))
            found.setdefault(ALONG, []).append(self.arm(ALONG, seed, along))
            found.setdefault(HIDDEN, []).append(self.arm(HIDDEN, seed, (*along, "--kd-hidden", "1")))
            for k in KEPT:
                found.setdefault(f"K = {k}", []).append(self.recorded(k, seed))
        tokens = self.experiment.sequence * self.experiment.batch
        return {
            arm: {str(mark * tokens): spread([run[mark] for run in runs]) for mark in MARKS}
            for arm, runs in found.items()
        }


def speeds(work: Path, model: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return tokens a second by arm, and their ratio to the LM loss."""
    shape, sequence, micro_batch, steps = SPEED[model]
    folder = work / f"speed-{model}"
    parent, start, data = folder / "parent", folder / "pruned", folder / "data"
    if not start.exists():
        folder.mkdir(parents=True, exist_ok=True)
        prepare(model, parent, data, steps * micro_batch * sequence)
        hidden, ffn = shape
        command("prune_llama.py", "--load", parent, "--save", start, "--format", "torch",
                "--hidden-size-remain", hidden, "--ffn-hidden-size-remain", ffn)  # fmt: skip
    settings = {
        "LOAD_PATH": start, "SAVE_PATH": folder / "trained", "DATA_PATH": data, "TOKENIZER_TYPE": "NullTokenizer",
        "SEQ_LENGTH": sequence, "MICRO_BATCH_SIZE": micro_batch, "GLOBAL_BATCH_SIZE": micro_batch,
        "TRAIN_ITERS": steps, "LR_WARMUP_ITERS": 1, "EVAL_ITERS": 0, "SAVE_INTERVAL": 1000,
    }  # fmt: skip
    arms: dict[str, dict[str, object]] = {LM: {}, ALONG: {"TEACHER_LOAD": parent}}
    for k in (64, 256):
        cache = folder / f"answers-{k}"
        if not cache.exists():
            train({**settings, "TEACHER_LOAD": parent, "TEACHER_SAVE": cache, "KD_TOP_K": k})
        arms[f"K = {k}"] = {"KD_LOAD": cache}
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, more in arms.items():
            log = train({**settings, **more}, "--no-save-optim", "--save-interval", "100000", "--load", folder / "none")
            times = [float(ms) / 1000 for ms in re.findall(r"elapsed time per iteration \(ms\): (\S+)", log)]
            found[arm].append(micro_batch * sequence / statistics.median(times[WARM_UP:]))
    return {
        arm: {
            "tokens_per_second": statistics.median(rates),
            "to_lm": statistics.median(rate / lm for rate, lm in zip(rates, found[LM], strict=True)),
        }
        for arm, rates in found.items()
    }


def prepare(model: str, parent: Path, data: Path, tokens: int) -> None:
    """Lay the parent and random tokens."""
    from training import SHAPES
    from transformers import LlamaForCausalLM

    from megatron.pruning.formats import open_checkpoint
    from megatron.pruning.training.quiet import quiet_imports

    if model in SHAPES:
        LlamaForCausalLM(SHAPES[model]).bfloat16().save_pretrained(parent)
    else:
        parent.symlink_to(ROOT / "assets" / model)
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    drawn = np.random.default_rng(0).integers(0, open_checkpoint(parent).config.vocab_size, tokens + 1)
    builder = IndexedDatasetBuilder(str(data.with_suffix(".bin")), dtype=np.int32)
    builder.add_document(drawn, [len(drawn)])
    builder.finalize(str(data.with_suffix(".idx")))


def train(settings: dict[str, object], *flags: object) -> str:
    """Run check_model.sh, and return what it printed."""
    fixed = {"PYTHON": sys.executable, "OMP_NUM_THREADS": 1, "GPUS_PER_NODE": 1, "VERBOSE": 1, "SPLIT": "1,0,0"}
    environment = {**os.environ, **{name: str(value) for name, value in {**fixed, **settings}.items()}}
    words = ["bash", str(ROOT / "scripts" / "check_model.sh"), *map(str, flags)]
    done = subprocess.run(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(words)} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def main() -> None:
    """Do what is left of the benchmark, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "teacher", metavar="DIR")
    parser.add_argument("--rounds", type=int, default=3, help="how many times every arm of the speed runs")
    parser.add_argument("--json", type=Path, default=RESULTS / "teacher.json", metavar="FILE")
    args = parser.parse_args()
    losses = Loss(args.work_dir).all()
    show([["", *next(iter(losses.values()))], *([arm, *map(spread_text, row.values())] for arm, row in losses.items())])
    rates = {model: speeds(args.work_dir, model, args.rounds) for model in SPEED}
    for model, arms in rates.items():
        shown = [[arm, f"{row['tokens_per_second']:,.0f}", f"{row['to_lm']:.2f}"] for arm, row in arms.items()]
        show([[model, "tokens/s", "to the LM loss"], *shown])
    write_results(
        args.json,
        {"benchmark": "teacher", "machine": machine(), "rounds": args.rounds, "seeds": len(SEEDS),
         "speed": rates, "loss": losses},
    )  # fmt: skip


if __name__ == "__main__":
    main()
