"""Broken checkpoints, given to the training as users start it: what it checks first, and then the stock loader.

Each case is a fork of a process that has imported pretrain_gpt.py, and ends when the model has been loaded. What was
loaded is the original's weights, bit for bit, unless the change itself was to data, and no command of a pickle runs.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_bytes import DATA, Breaker, break_bytes, break_json, break_length, break_tree
from fuzz_checkpoints import make_bases
from fuzz_fields import break_archive, break_metadata, break_order
from fuzz_guards import Child
from fuzz_pickles import break_content, break_pickle
from fuzz_values import break_argument

import pretrain_gpt
from megatron.pruning.formats.megatron import ARGS_FILE

RUN = (
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 22 --seq-length 16 --micro-batch-size 1 --train-iters 5 "
    "--lr 1e-3 --lr-warmup-iters 0 --eval-iters 0"
).split()
BREAKERS: tuple[Breaker, ...] = (
    break_bytes, break_length, break_tree, break_json, break_pickle, break_pickle, break_content, break_argument,
    break_archive, break_metadata, break_metadata, break_order,
)  # fmt: skip
# A tensor that is one of whole numbers, or has another's values, is other data, which the stock loader takes as it is.
OTHER_DATA = (DATA, "tensor int", "tensor shared")
# gloo meets itself through a socket.
ALLOWED = ("socket.", "pickle.find_class")


class Training:
    """The sound checkpoints, of one process and in both of Megatron's formats, and what each has when it is loaded."""

    def __init__(self, top: Path, trained: bool = True) -> None:
        self.top = top
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
            os.environ.pop(name, None)  # each case is a run of its own
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as every script of this project sets it
        self.classes = torch.serialization.get_safe_globals()  # Megatron's, which some breakers take away
        self.foreign = make_bases(top / "bases")
        self.bases = {name: path for name, path in self.foreign.items() if name.endswith(("torch 1 1", "torch_dist"))}
        for format in ("torch", "torch_dist") if trained else ():
            self.bases[f"trained {format}"] = self._train(top / "bases" / f"trained {format}", format)
        self.known: dict[str, dict[str, str]] = {}

    def wanted(self, name: str) -> dict[str, str]:
        """Return the digests of the weights of a sound checkpoint, as they are loaded."""
        if name not in self.known:
            path = self.bases[name]
            ended, self.known[name] = self._load(path, self._words(name, path, Random(0)))
            assert ended.require(name), ended.said[-500:]
        return self.known[name]

    def attempt(self, random: Random) -> tuple[str, str]:
        """Break one checkpoint and load it. Returns the case and how it ended; raises AssertionError if wrongly."""
        name = random.choice(sorted(self.bases))
        source = self.top / "source"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(self.bases[name], source)
        breaker = random.choice(BREAKERS)
        said = breaker(source, random, self.foreign)
        torch.serialization.add_safe_globals(self.classes)
        case = f"{name}: {breaker.__name__}: {said}"
        ended, found = self._load(source, self._words(name, source, random))
        assert not any(self.top.rglob("RAN")), f"{case}: a command of it ran"
        if not ended.require(case):
            return f"{case}: {ended.last}", "refused"
        if not any(what in said for what in OTHER_DATA):
            wanted = self.wanted(name)
            assert found.keys() == wanted.keys(), f"{case}: silently other tensors"
            wrong = [key for key in wanted if found[key] != wanted[key]]
            assert not wrong, f"{case}: silently another {', '.join(wrong)[:100]}"
        return case, "loaded"

    def _words(self, name: str, source: Path, random: Random) -> list[str]:
        """Return the flags of a run that loads a checkpoint: those beside the sound one, or those in its arguments."""
        told = (self.bases[name] / ARGS_FILE).read_text().split()
        if name.startswith("trained") and random.random() < 0.5:
            return ["--load", str(source), "--use-checkpoint-args", *RUN]
        return ["--load", str(source), *random.choice((["--use-checkpoint-args"], told)), *RUN, "--finetune"]

    def _load(self, source: Path, words: list[str]) -> tuple[Any, dict[str, str]]:
        report = self.top / "found"
        report.unlink(missing_ok=True)
        child = Child(self.top, "training", pretrain_gpt.main, words, ALLOWED, lambda: _stop_when_loaded(report))
        ended = child.wait()
        return ended, json.loads(report.read_text()) if report.exists() else {}

    def _train(self, path: Path, format: str) -> Path:
        """Let the stock loop write a checkpoint, with its optimizer, after one step."""
        source = self.foreign[f"untied {format}" if format == "torch_dist" else "untied torch 1 1"]
        words = ["--load", str(source), "--use-checkpoint-args", "--finetune", *RUN, "--exit-interval", "1"]
        words += ["--save", str(path), "--ckpt-format", format]
        assert Child(self.top, "training", pretrain_gpt.main, words, ALLOWED).wait().require(f"training {format}")
        shutil.copy(source / ARGS_FILE, path)
        return path


def _stop_when_loaded(report: Path) -> None:
    """Let this process end when it has its model, and say what the model has."""
    setup: Callable[..., Any] = pretrain_gpt.training.setup_model_and_optimizer

    def until_loaded(*args: Any, **kwargs: Any) -> Any:
        model = setup(*args, **kwargs)[0][0]
        state = {
            name: value.detach().contiguous().view(torch.uint8).numpy() for name, value in model.named_parameters()
        }
        report.write_text(json.dumps({name: hashlib.sha256(bits).hexdigest() for name, bits in state.items()}))
        raise SystemExit(0)

    pretrain_gpt.training.setup_model_and_optimizer = until_loaded


def main(argv: Sequence[str]) -> None:
    """Try a few cases, with files in a folder, in a process that has imported pretrain_gpt.py for other tests, too."""
    training = Training(Path(argv[0]), trained=False)
    for number in range(int(argv[1])):
        training.attempt(Random(f"suite {number}"))
