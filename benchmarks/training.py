"""Training speed: pretrain_gpt.py against the Trainer of transformers, on the same model, data, batch and machine.

    python benchmarks/training.py                                  # tiny-llama, fp32, on the CPU
    python benchmarks/training.py --model 58m --sequence-length 512 --micro-batch-size 4 --global-batch-size 8
    python benchmarks/training.py --model 1b --sequence-length 4096 --micro-batch-size 4 --steps 20   # bf16, on a GPU

Three arms, each in a process of its own, one after the other and that as many times as --rounds says: the stock loop
as scripts/check_model.sh runs it, the same loop with Megatron's unfused attention, and the Trainer. A round's figure is
the median time of its steps after the first few; the table has the median over rounds, and ratios to the Trainer within
a round. On a GPU it also has the share of the device's peak that the model's own operations are (`model_flops`), and
memory. An arm that cannot run, as the unfused attention of long sequences, has a dash in its row.

The results are JSON: `benchmark`, `model`, `machine`, `dtype`, `rounds`, `sequence_length` (tokens), `micro_batch_size`
and `global_batch_size` (sequences), and `arms`, from the name of an arm to its `tokens_per_second`, its ratio
`to_the_trainer`, and on a GPU its `utilisation` (a share, of a device whose peak is known) and `memory_gigabytes`.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import environment
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from megatron.pruning.formats import open_checkpoint, save_checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.report import table
from megatron.pruning.storage.small_files import as_json, write_durably
from megatron.pruning.training.quiet import quiet_imports

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
WARM_UP = 3  # steps that are not timed
# Dense bf16 peaks in floating point operations per second, without sparsity (NVIDIA's data sheets).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SHAPES = {  # of models with random weights
    "58m": LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=32000,
    ),
    "1b": LlamaConfig(  # TinyLlama's shape
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
}
UNFUSED = "--transformer-impl local --spec megatron.pruning.training.local_layers unfused_layers"
ARMS = {"pretrain_gpt.py": "", "pretrain_gpt.py, unfused attention": UNFUSED, "transformers Trainer": None}


def parse() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(ROOT / "assets/tiny-llama"), help=f"a Hugging Face directory, or {', '.join(SHAPES)}"
    )
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="sequences of a forward pass")
    parser.add_argument("--global-batch-size", type=int, default=16, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=10, help=f"steps of an arm, the first {WARM_UP} are not timed")
    parser.add_argument("--rounds", type=int, default=3, help="how many times every arm runs")
    parser.add_argument(
        "--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), metavar="ARM", help="some of them"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="file of the results (default: benchmarks/results/training-MODEL.json)",
    )
    parser.add_argument("--trainer", type=Path, help=argparse.SUPPRESS)  # be the Trainer's arm, in this folder
    return parser.parse_args()


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Lay the model in both formats and the data, random tokens, into `folder`."""
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    source = Path(args.model)
    if args.model in SHAPES:
        source = folder / "hf"
        LlamaForCausalLM(SHAPES[args.model]).bfloat16().save_pretrained(source)
    else:
        (folder / "hf").symlink_to(source.resolve())
    checkpoint = open_checkpoint(source)
    save_checkpoint(checkpoint, folder / "megatron", format="torch", layout=Layout(1, 1, 1))
    count = args.steps * args.global_batch_size * args.sequence_length + 1
    tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, count)
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.int32)
    builder.add_document(tokens, [count])
    builder.finalize(str(folder / "data.idx"))


def stock_loop(args: argparse.Namespace, folder: Path, flags: str) -> tuple[list[float], float]:
    """Return the seconds of each step of pretrain_gpt.py, and the peak of memory in GB (0 on a CPU)."""
    words = (
        f"{(folder / 'megatron' / 'megatron_args.txt').read_text()} --pretrained-checkpoint {folder / 'megatron'} "
        f"--train-data-path {folder / 'data'} --data-cache-path {folder / 'cache'} --tokenizer-type NullTokenizer "
        f"--seq-length {args.sequence_length} --micro-batch-size {args.micro_batch_size} "
        f"--global-batch-size {args.global_batch_size} --train-iters {args.steps} --lr 1e-5 --lr-decay-style constant "
        f"--clip-grad 1.0 --weight-decay 0.01 --eval-iters 0 --log-interval 1 {flags}"
    )
    words += " --bf16 --cross-entropy-loss-fusion" * torch.cuda.is_available()
    log = output([sys.executable, str(ROOT / "pretrain_gpt.py"), *words.split()])
    times = [float(time) / 1e3 for time in re.findall(r"elapsed time per iteration \(ms\): (\S+)", log)]
    memory = [float(value) for value in re.findall(r"max allocated: (\S+)", log)]
    return times, max(memory, default=0.0) / 1e3


def trainer(args: argparse.Namespace, folder: Path) -> tuple[list[float], float]:
    """Return the same of transformers' Trainer, which another process of this script runs."""
    given = {name: value for name, value in vars(args).items() if name not in ("trainer", "json", "arms")}
    given["trainer"] = folder
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    times, memory = json.loads(output([sys.executable, __file__, *words]).splitlines()[-1])
    return times, memory


def output(command: list[str]) -> str:
    """Return what a command prints. Raises RuntimeError, with the end of that, where it fails."""
    threads = len(os.sched_getaffinity(0))
    done = subprocess.run(command, env=environment(OMP_NUM_THREADS=threads), text=True, capture_output=True)
    if done.returncode:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise RuntimeError(f"{' '.join(command[:2])} ended with status {done.returncode}:\n{said}")
    return done.stdout


class Clock(TrainerCallback):
    """Note when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Note when the first step begins."""
        self.ends.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note when a step ends, which is when the device has done it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def be_trainer(args: argparse.Namespace) -> None:
    """Train, and print the seconds of each step and the peak of memory in GB (0 on a CPU)."""
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    gpu = torch.cuda.is_available()
    data = IndexedDataset(str(args.trainer / "data"))  # without a name it would go, and its memory with it
    tokens = torch.from_numpy(data[0].astype("int64"))
    samples = [{"input_ids": part, "labels": part} for part in tokens[:-1].split(args.sequence_length)]
    settings = TrainingArguments(
        output_dir=str(args.trainer / "trainer"),
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.global_batch_size // args.micro_batch_size,
        max_steps=args.steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=gpu,
        use_cpu=not gpu,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    clock = Clock()
    model = AutoModelForCausalLM.from_pretrained(args.trainer / "hf", dtype=torch.float32)
    Trainer(model=model, args=settings, train_dataset=samples, callbacks=[clock]).train()
    times = np.diff(clock.ends).tolist()
    print(json.dumps([times, torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0]))


def model_flops(args: argparse.Namespace, folder: Path) -> float:
    """Return a step's operations: 6 a weight and token without the embedding, causal attention's 6 * L * width * s."""
    config = open_checkpoint(folder / "hf").config
    weights = config.parameters - (0 if config.tied else config.vocab_size * config.hidden_size)
    attention = 6 * config.num_layers * config.num_attention_heads * config.head_dim * args.sequence_length
    return float((6 * weights + attention) * args.sequence_length * args.global_batch_size)


def main() -> None:
    """Run the arms in turn and print the table."""
    args = parse()
    if args.trainer:
        be_trainer(args)
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    peak = next((flops for name, flops in PEAKS.items() if gpu and name in gpu), None)
    tokens = args.sequence_length * args.global_batch_size
    speeds: dict[str, list[float]] = {arm: [] for arm in args.arms}
    memory = dict.fromkeys(args.arms, 0.0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(args, folder)
        flops = model_flops(args, folder)
        for arm in args.arms * args.rounds:
            flags = ARMS[arm]
            try:
                times, memory[arm] = trainer(args, folder) if flags is None else stock_loop(args, folder, flags)
                speeds[arm].append(tokens / statistics.median(times[WARM_UP:]))
            except RuntimeError as failure:
                print(f"{arm}: {failure}", file=sys.stderr)
    arms: dict[str, dict[str, float]] = {}
    for arm, found in speeds.items():
        arms[arm] = {}
        if len(found) < args.rounds:
            continue
        arms[arm]["tokens_per_second"] = statistics.median(found)
        if len(trainers := speeds.get("transformers Trainer", [])) == args.rounds:
            arms[arm]["to_the_trainer"] = statistics.median(a / b for a, b in zip(found, trainers, strict=True))
        if peak:
            arms[arm]["utilisation"] = flops * arms[arm]["tokens_per_second"] / tokens / peak
        if gpu:
            arms[arm]["memory_gigabytes"] = memory[arm]
    show(arms)
    name = Path(args.model).name
    settings = ("rounds", "sequence_length", "micro_batch_size", "global_batch_size")
    results = {
        "benchmark": "training",
        "model": name,
        "machine": gpu or f"{len(os.sched_getaffinity(0))} CPU cores",
        "dtype": "bf16" if gpu else "fp32",
        **{setting: getattr(args, setting) for setting in settings},
        "arms": arms,
    }
    file = args.json or RESULTS / f"training-{name}.json"
    write_durably(file, as_json(results))
    print(f"results: {file}")


def show(arms: dict[str, dict[str, float]]) -> None:
    """Print the arms as a table."""
    columns = {"tokens_per_second": ",.0f", "to_the_trainer": ".2f", "utilisation": ".0%", "memory_gigabytes": ".1f"}
    rows = [["", "tokens/s", "to the Trainer", "model FLOP utilisation", "memory GB"]]
    for arm, found in arms.items():
        rows.append([arm, *(format(found[name], form) if name in found else "-" for name, form in columns.items())])
    print(table(rows))


if __name__ == "__main__":
    main()
