"""Broken checkpoints, converted by the library and met by the commands that users type, in this process.

Each case copies a tiny checkpoint (Hugging Face, Megatron `torch` or `torch_dist`, of several layouts), breaks it and
converts it; or breaks it, its plan, its scores or its manifest, and it is converted, pruned, shown, verified or looked
into as before a training. What must hold, whatever was broken:

- it ends, within seconds and within a bounded memory, in a ValueError or an OSError of one line, or in a checkpoint;
- a refused conversion leaves nothing at its target;
- what was read is the original's weights, bit for bit, unless the change itself was to data or to the model's shape;
- no code of the checkpoint runs: no process starts, nothing outside the target's directory is written.
"""

import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import convert as converter
import numpy as np
import show_checkpoint
from fuzz_bytes import DATA, Breaker, break_bytes, break_json, break_length, break_tree
from fuzz_fields import break_archive, break_metadata, break_order, break_safetensors
from fuzz_guards import MEGABYTES, SECONDS, HangError, megabytes, time_limit, watched
from fuzz_pickles import break_content, break_pickle
from fuzz_values import break_argument, break_config, break_plan, break_scores
from helpers import as_bin, convert, make_llama

import prune_llama
from megatron.pruning.formats import FORMATS, megatron_dist, open_checkpoint, save_checkpoint
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.decide import PruneRequest, decide
from megatron.pruning.plan.scores import Facts, Scores, shapes
from megatron.pruning.plan.scores import write as write_scores
from megatron.pruning.storage.harmless import require_harmless
from megatron.pruning.storage.manifest import verify
from megatron.pruning.storage.views import read_all

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


def make_tiny(path: Path, tied: bool = False, seed: int = 0, **save: Any) -> Path:
    """Save a random Llama of two layers with a tokenizer, in Hugging Face's format."""
    make_llama(path, TINY | {"tie_word_embeddings": tied}, layers=2, vocab=23, seed=seed, **save)
    (path / "generation_config.json").unlink()
    (path / "tokenizer.json").write_text('{"model": {}}')
    return path


def make_bases(top: Path) -> dict[str, Path]:
    """Make the checkpoints that are broken, by name: one model, tied and untied, in every format."""
    bases = {}
    for name, tied in (("untied", False), ("tied", True)):
        one = bases[f"{name} hf"] = make_tiny(top / name / "hf", tied)
        bases[f"{name} hf sharded"] = make_tiny(top / name / "sharded", tied, max_shard_size="7KB")
        bases[f"{name} hf bin"] = as_bin(make_tiny(top / name / "bin", tied))
        for tensor, pipeline, impl in ((1, 1, "local"), (2, 1, "transformer_engine"), (1, 2, "local"), (2, 2, "local")):
            target = bases[f"{name} torch {tensor} {pipeline}"] = top / name / f"torch{tensor}{pipeline}"
            convert(one, target, layout=Layout(tensor, pipeline, 4), transformer_impl=impl)
        bases[f"{name} torch_dist"] = top / name / "dist"
        whole, megatron_dist.SHARD_BYTES = megatron_dist.SHARD_BYTES, 4000  # so that there are several files
        try:
            convert(one, bases[f"{name} torch_dist"], "torch_dist", layout=Layout(vocab_divisor=4))
        finally:
            megatron_dist.SHARD_BYTES = whole
    return bases


def weights_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return every logical weight as bits."""
    return {weight.hf_key(layer): read_all(view) for weight, layer, view in checkpoint.weights()}


BREAKERS: tuple[Breaker, ...] = (
    break_bytes,
    break_length,
    break_tree,
    break_json,
    break_pickle,
    break_content,
)


FIELD_BREAKERS = (break_safetensors, break_archive, break_order, break_metadata, break_config, break_argument)
BESIDE = dict.fromkeys(("plan", "scores"), (break_bytes, break_length, break_json))


def _alone(file: Path) -> Path:
    """Move a file into a directory of its own, which a breaker takes for a checkpoint, and leave a link to it."""
    folder = file.with_name(f"{file.name}.folder")
    folder.mkdir()
    file.rename(folder / file.name)
    file.symlink_to(folder / file.name)
    return folder


def some_scores(checkpoint: Checkpoint) -> Scores:
    """Return scores that fit a model, of no text at all."""
    sizes = {axis: checkpoint.config.sizes[axis] for axis in ("layers", "hidden", "heads", "groups", "ffn")}
    draw = np.random.default_rng(0)
    facts = Facts(
        parent=fingerprint(checkpoint), text="", dtype="fp32", sizes=sizes, sequences=3, sequences_wanted=3,
        sequence_length=10, loss_sequences=0, positions=10, loss=1.0,
    )  # fmt: skip
    return Scores(facts, {name: draw.random(shape) for name, shape in shapes(sizes).items()})


class Fuzzer:
    """Make the sound checkpoints once, and try cases on them."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.bases = make_bases(top / "bases")
        others = {f"other {seed}": make_tiny(top / "other" / str(seed), seed=seed) for seed in (1, 2)}
        shards = {
            f"{name} torch": convert(source, top / "other" / f"{name} torch", layout=Layout(2, 2, 4))
            for name, source in others.items()
        }
        self.foreign = self.bases | others | shards
        self.wanted = {name: weights_of(open_checkpoint(path)) for name, path in self.bases.items()}
        self.configs = {name: open_checkpoint(path).config for name, path in self.bases.items()}
        self.plans, self.scores = {}, {}
        for name, path in self.bases.items():
            checkpoint = open_checkpoint(path)
            request = PruneRequest(remain={"hidden": 12, "ffn": 12, "heads": 2, "groups": 1}, drop_layers=(1,))
            self.plans[name] = decide(request, checkpoint).to_json().encode()
            write_scores(top / "scores", some_scores(checkpoint))
            self.scores[name] = (top / "scores").read_bytes()
            (top / "scores").unlink()

    def field(self, random: Random) -> tuple[str, str]:
        """Break one field of a format, and convert or run a command, as `attempt` and `command` do."""
        if random.random() < 0.5:
            return self.attempt(random, FIELD_BREAKERS)
        return self.command(
            random, FIELD_BREAKERS, {"plan": (break_plan,), "scores": (break_scores, break_safetensors)}
        )

    def attempt(self, random: Random, breakers: Sequence[Breaker] = BREAKERS) -> tuple[str, str]:
        """Break one checkpoint and convert it. Returns the case and how it ended; raises AssertionError if wrongly."""
        name = random.choice(sorted(self.bases))
        source, target = self.top / "source", self.top / "target"
        for leftover in (source, target, self.top / "beside"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(self.bases[name], source)
        breaker = random.choice(breakers)
        said = breaker(source, random, self.foreign)
        case = f"{name}: {breaker.__name__}: {said}"
        format = random.choice(list(FORMATS))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = megabytes("VmRSS")
        try:
            with time_limit(SECONDS), watched(self.top) as seen:
                checkpoint = open_checkpoint(source)
                save_checkpoint(checkpoint, target, format=format, layout=Layout(1, 1, 4))
                config = checkpoint.config
            ended = "read"
        except (ValueError, OSError) as error:
            ended = self._refusal(case, error)
        except HangError:
            raise AssertionError(f"{case}: hangs") from None
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {str(error)[:300]}") from error
        assert not seen, f"{case}: {seen}"
        grown = megabytes("VmHWM") - before
        assert grown < MEGABYTES, f"{case}: {grown:.0f} MB more"
        if ended == "read":
            # What all ranks say alike of the model, or only one does, is believed.
            one_voice = breaker in (break_pickle, break_content, break_argument, break_config) or (
                breaker is break_tree and name.endswith("1 1")
            )
            one_voice &= not name.endswith(("1 2", "2 1", "2 2"))
            self.check_read(case, name, config, target, DATA in said, "config.json" in said or one_voice)
        else:
            left = [path.name for path in self.top.iterdir() if path.name not in ("bases", "other", "source")]
            assert not left, f"{case}: left {left}"
        return case, ended

    def command(
        self,
        random: Random,
        breakers: Sequence[Breaker] = BREAKERS,
        beside_breakers: Mapping[str, Sequence[Breaker]] = BESIDE,
    ) -> tuple[str, str]:
        """Break one checkpoint, or a file that goes with it, and run a command on it, as `attempt` does."""
        name = random.choice(sorted(self.bases))
        source, target, beside = self.top / "source", self.top / "target", self.top / "beside"
        for leftover in (source, target, beside):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(self.bases[name], source)
        beside.mkdir()
        files = {"plan": beside / "plan.json", "scores": beside / "scores.safetensors"}
        files["plan"].write_bytes(self.plans[name])
        files["scores"].write_bytes(self.scores[name])
        to, plan = ["--load", str(source), "--save", str(target)], ["--plan", str(files["plan"])]
        choice = ["--ffn-hidden-size-remain", "12", "--criterion", "activation", "--min-scores-tokens", "1"]
        formats = ["--format", random.choice(list(FORMATS))]
        commands: dict[str, tuple[Callable[[list[str]], Any], list[str]]] = {
            "convert": (converter.main, [*to, *formats]),
            "plan": (prune_llama.main, [*to, *plan, *formats]),
            "scores": (prune_llama.main, [*to, *choice, *formats, "--scores", str(files["scores"])]),
            "magnitude": (prune_llama.main, [*to, *choice[:2], *formats, "--criterion", "magnitude"]),
            "show": (show_checkpoint.main, [str(source), "--weights", "--digest"]),
            "verify": (show_checkpoint.main, [str(source), "--verify"]),
            "flags": (show_checkpoint.main, [str(source), "--megatron-flags"]),
            "before a training": (lambda argv: require_harmless(source / "release"), []),
        }
        what = random.choice(sorted(commands))
        if what in files and random.random() < 0.7:
            breaker = random.choice(beside_breakers[what])
            said = breaker(_alone(files[what]), random, self.foreign)
        else:
            breaker = random.choice(breakers)
            said = breaker(source, random, self.foreign)
        case = f"{name}: {what}: {breaker.__name__}: {said}"
        run, argv = commands[what]
        shown = io.StringIO()
        Path("/proc/self/clear_refs").write_text("5")
        before = megabytes("VmRSS")
        try:
            with time_limit(SECONDS), watched(self.top) as seen, redirect_stdout(shown), redirect_stderr(shown):
                run(argv)
            ended = f"{what}: done"
        except (ValueError, OSError) as error:
            ended = f"{what}: {self._refusal(case, error)}"
        except HangError:
            raise AssertionError(f"{case}: hangs") from None
        except BaseException as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {str(error)[:300]}") from error
        assert not seen, f"{case}: {seen}"
        assert (grown := megabytes("VmHWM") - before) < MEGABYTES, f"{case}: {grown:.0f} MB more"
        strange = [c for c in shown.getvalue() if not c.isprintable() and c not in "\n\r"]
        assert not strange, f"{case}: shows {strange[:9]}"
        assert target.exists() == (ended.endswith("done") and "--save" in argv), f"{case}: {ended}, target is there"
        if target.exists():
            weights_of(open_checkpoint(target))
            assert verify(target) == [], f"{case}: its own manifest is wrong"
        left = {path.name for path in self.top.iterdir()} - {"bases", "other", "source", "beside", "target"}
        assert not left, f"{case}: left {left}"
        return case, ended

    def _refusal(self, case: str, error: Exception) -> str:
        text = str(error)
        assert text.strip(), f"{case}: an empty {type(error).__name__}"
        assert len(text) < 20_000, f"{case}: a message of {len(text)} characters: {text[:200]}"
        return f"refused, {type(error).__name__}"

    def check_read(
        self, case: str, name: str, config: LlamaConfig, target: Path, other_data: bool, other_config: bool
    ) -> None:
        """Raise AssertionError unless what was read, and written to `target`, is the checkpoint of this name.

        Its weights may be others where `other_data` was put in, and its shape where `other_config` was said.
        """
        try:
            found = weights_of(open_checkpoint(target))
        except ValueError as error:
            raise AssertionError(f"{case}: its output cannot be read: {error}") from error
        if config != self.configs[name]:
            assert other_config, f"{case}: silently another config: {config}"
            return
        if other_data:
            return
        wanted = self.wanted[name]
        assert found.keys() == wanted.keys(), f"{case}: silently other tensors"
        for key, bits in wanted.items():
            assert np.array_equal(bits, found[key]), f"{case}: silently another {key}"
