"""What the experiments share: a text, a parent and its scores, training runs that are done once, and tables.

A run is known by its name; its result lies in WORK/results.json, so that an experiment that was cut short goes on where
it was. Training is scripts/check_model.sh, as a user starts it, one process and one thread a run.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

PARENT = ROOT / "assets" / "tiny-llama"
TOKENIZER = PARENT / "tokenizer.model"
SEQUENCE, BATCH = 256, 4  # tokens, sequences a step
SCORED = 512  # sequences that the parent is scored on, and reconstructed
EVALUATED = 65_536  # tokens of the validation text, from its start
VALIDATION = "valid_text_document"


@dataclass(frozen=True)
class Run:
    """One training run: from what, how long, how fast, in which order of data."""

    name: str
    start: Path  # a Megatron checkpoint at tp1 pp1
    steps: int
    lr: float
    seed: int
    marks: tuple[int, ...]  # steps at which the validation loss is measured; the last is `steps`
    flags: tuple[str, ...] = ()  # more of pretrain_gpt.py
    keep: bool = False  # its last checkpoint stays

    @property
    def key(self) -> str:
        """Under which its result is kept: another setting is another run."""
        return f"{self.name}, {self.steps} steps, lr {self.lr:g}"


class Experiment:
    """The folder of an experiment, and the runs that are done in it.

    Args:
        work: the folder.
        jobs: runs at a time.
        parent: what is scored and pruned; of any format.
        sequence, batch: tokens in a sequence, sequences a step.
        text: a folder with train.jsonl and valid.jsonl; None: the text of the embedded model.
    """

    def __init__(
        self, work: Path, jobs: int, parent: Path = PARENT, sequence: int = SEQUENCE, batch: int = BATCH,
        text: Path | None = None,
    ) -> None:  # fmt: skip
        self.work, self.jobs, self.parent = work, jobs, parent
        self.sequence, self.batch, self.source = sequence, batch, text
        self.lock = threading.Lock()
        work.mkdir(parents=True, exist_ok=True)
        self.file = work / "results.json"
        self.results: dict[str, dict[str, float]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def settle(self, settings: Mapping[str, object]) -> None:
        """Note what this folder's results are of; what is there must be of the same. Ends the program if it is not."""
        file, text = self.work / "settings.json", json.dumps(settings, indent=1, default=str) + "\n"
        if (file.exists() and file.read_text() != text) or (self.results and not file.exists()):
            raise SystemExit(f"error: {self.work} holds the results of other settings: give another --work-dir")
        file.write_text(text)

    def text(self) -> Path:
        """Return the folder of the text as tokens: train_text_document and valid_text_document."""
        folder = self.work / "data"
        with self.lock:  # runs start side by side
            if not (folder / f"{VALIDATION}.idx").exists():
                self._tokenize(folder)
        return folder

    def _tokenize(self, folder: Path) -> None:
        source = self.source or folder
        if self.source is None:
            command("assets/make_tiny_llama.py", "--data-only", folder)
        for part in ("train", "valid"):
            command(
                "tools/preprocess_data.py", "--input", source / f"{part}.jsonl", "--output-prefix", folder / part,
                "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", TOKENIZER,
                "--append-eod", "--workers", self.jobs,
            )  # fmt: skip

    def scores(self) -> Path:
        """Return the parent's scores over SCORED sequences of the training text."""
        file = self.work / "parent.scores"
        if not file.exists():
            command(
                "tools/score_importance.py", "--load", self.parent, "--data", self.text() / "train_text_document",
                "--save", file, "--sequences", SCORED, "--sequence-length", self.sequence,
            )  # fmt: skip
        return file

    def prune(self, name: str, *flags: object) -> Path:
        """Return the parent pruned by these flags of prune_llama.py, as Megatron tp1."""
        path = self.work / "start" / name
        if not path.exists():
            command("prune_llama.py", "--load", self.parent, "--save", path, "--format", "torch", *flags)
        return path

    def convert(self, name: str, source: Path) -> Path:
        """Return a checkpoint as Megatron tp1."""
        path = self.work / "start" / name
        if not path.exists():
            command("tools/checkpoint_conversion/convert.py", "--load", source, "--save", path, "--format", "torch")
        return path

    def random_start(self, name: str, changes: Mapping[str, int], seed: int) -> Path:
        """Return the embedded model so changed, with transformers' random weights, as Megatron tp1."""
        source = self.work / "start" / f"{name}-hf"
        if not source.exists():
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(seed)
            config = AutoConfig.from_pretrained(PARENT, **changes)
            AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(source)
            for file in PARENT.glob("tokenizer*"):
                shutil.copy(file, source)
        return self.convert(name, source)

    def evaluate(self, name: str, checkpoint: Path, iteration: int | None = None) -> float:
        """Return the validation loss in nats, measured once for each name."""
        if "loss" not in self.results.get(name, {}):
            import torch

            from megatron.pruning.formats import open_checkpoint
            from megatron.pruning.storage.processes import World
            from megatron.pruning.training.evaluation import Evaluation
            from megatron.pruning.training.tokens import windows

            torch.set_num_threads(1)
            opened = open_checkpoint(checkpoint, iteration)
            data = windows(self.text() / VALIDATION, self.sequence, EVALUATED // self.sequence, opened)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            reader = Evaluation(World(), layered=False, dtype="fp32", device=device, batch=8)
            value = reader.loss(opened, reader.model(opened), data)
            self.keep(name, {"loss": value})
        return self.results[name]["loss"]

    def keep(self, name: str, result: dict[str, float]) -> None:
        """Write a result down."""
        with self.lock:
            self.results[name] = result
            aside = self.file.with_suffix(".new")
            aside.write_text(json.dumps(self.results, indent=1) + "\n")
            aside.replace(self.file)

    def train(self, runs: Sequence[Run]) -> dict[str, dict[int, float]]:
        """Do the runs that are not done yet, `jobs` at a time; return the loss at each mark of all of them."""
        left = [run for run in runs if run.key not in self.results]
        with ThreadPoolExecutor(self.jobs) as pool:
            for done, run in enumerate(pool.map(self._train, left), start=1):
                losses = ", ".join(f"{step}: {loss:.4f}" for step, loss in self.results[run.key].items())
                print(f"{done}/{len(left)} {run.key}: {losses}", flush=True)
        return {run.name: {int(step): loss for step, loss in self.results[run.key].items()} for run in runs}

    def trained(self, run: Run) -> Path:
        """Return where a run saves: of one to be kept, a Megatron checkpoint of its last step, once it is done."""
        return self.work / "trained" / run.name

    def _train(self, run: Run) -> Run:
        save, data = self.trained(run), self.text()
        shutil.rmtree(save, ignore_errors=True)
        save.mkdir(parents=True)
        every = int(np.gcd.reduce(run.marks))
        settings = {
            "PYTHON": sys.executable, "OMP_NUM_THREADS": 1, "GPUS_PER_NODE": 1,
            "LOAD_PATH": run.start, "SAVE_PATH": save, "DATA_PATH": data / "train_text_document",
            "VALID_DATA_PATH": data / VALIDATION, "TOKENIZER_MODEL": TOKENIZER,
            "SEQ_LENGTH": self.sequence, "MICRO_BATCH_SIZE": self.batch, "GLOBAL_BATCH_SIZE": self.batch,
            "TRAIN_ITERS": run.steps, "LR": run.lr, "MIN_LR": run.lr / 10, "LR_WARMUP_ITERS": run.steps // 20,
            "SAVE_INTERVAL": every, "EVAL_INTERVAL": 10 * run.steps, "EVAL_ITERS": 0, "LOG_INTERVAL": 50, "VERBOSE": 1,
        }  # fmt: skip
        environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        words = ["bash", ROOT / "scripts" / "check_model.sh", "--seed", str(run.seed), "--no-save-optim", *run.flags]
        with (save / "log.txt").open("w") as log:
            status = subprocess.run(words, env=environment, stdout=log, stderr=log).returncode
        if status:
            raise SystemExit(f"error: run {run.name} failed: see {save / 'log.txt'}")
        # One process at a time in here: evaluation is short.
        with EVALUATION:
            losses = {str(mark): self.evaluate(f"{run.key}@{mark}", save, mark) for mark in run.marks}
        self.keep(run.key, losses)
        for folder in save.glob("iter_*"):
            if not (run.keep and folder.name == f"iter_{run.steps:07d}"):
                shutil.rmtree(folder)
        return run


EVALUATION = threading.Lock()


def environment(**settings: object) -> dict[str, str]:
    """Return the environment of a program of this project."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in settings.items()}}


@dataclass(frozen=True)
class Cost:
    """What a command took: seconds of wall clock and of processors, and peak megabytes of anonymous memory.

    Pages that children share with it, or with each other, are counted for each of them.
    """

    wall: float
    cpu: float
    anonymous: float


def command(program: str, *words: object) -> Cost:
    """Run one of the project's programs and return what it took, or end with what it said."""
    return measure([sys.executable, str(ROOT / program), *map(str, words)])


def measure(words: Sequence[str]) -> Cost:
    """Run a command and return what it took, its children included, or end with what it said."""
    start, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile() as log:
        env = environment(PYTHONDONTWRITEBYTECODE="")
        process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=log)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            # The kernel's own peak, ru_maxrss, starts at what this process held when it started that one.
            peak = max(peak, _anonymous(process.pid))
            time.sleep(min(max(0.005, (time.perf_counter() - start) / 1000), 0.25))
        wall, (_, status, usage) = time.perf_counter() - start, ended
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"error: {words[1]} failed:\n{log.read()[-2000:].decode(errors='replace')}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak)


def _anonymous(pid: int) -> float:
    """Return the megabytes of anonymous memory of a process and its children; 0 when it has gone."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError):
        return 0.0
    return int(lines.get("RssAnon", "0").split()[0]) / 1024 + sum(_anonymous(int(child)) for child in children)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the `mean` and, of values that differ, the sample standard `deviation`, as the results hold them."""
    if len(set(values)) == 1:
        return {"mean": float(values[0])}
    return {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1))}


def spread_text(found: Mapping[str, float]) -> str:
    """Return what `spread` gives as a cell of a table."""
    return f"{found['mean']:.3f}" + (f" ± {found['deviation']:.3f}" if "deviation" in found else "")


def machine() -> str:
    """Return the machine's name in the results."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{len(os.sched_getaffinity(0))} CPU cores"


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first row its heading."""
    from megatron.pruning.plan.report import table

    print(table(rows))


def write_results(file: Path, results: Mapping[str, object]) -> None:
    """Write the results of a benchmark as JSON."""
    from megatron.pruning.storage.small_files import as_json, write_durably

    write_durably(file, as_json(results))
    print(f"results: {file}")
