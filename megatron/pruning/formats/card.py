"""The model card of a pruned model: what it is, what was cut, how it was recovered, what that is worth, how to load it.

All that it says comes from files that may be anybody's: words are held to a few characters where they stand in code,
and are quoted where they stand in the front matter.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from megatron.pruning import __version__
from megatron.pruning.model.axes import AXIS, PRUNABLE
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.config import short
from megatron.pruning.model.lineage import COMMIT, Cut, Lineage, Origin, Training
from megatron.pruning.storage.small_files import read_small

TOOL = "megatron-llama-pruning"
_MOST_EVALUATION = 10_000_000  # bytes
_CACHED = re.compile(rf"models--([\w.-]+)/snapshots/{COMMIT}/?$")

# What tools/evaluate.py wrote of one checkpoint: its path, its parameters, and figures by name.
_Measured = Annotated[dict[Annotated[str, Meta(max_length=1000)], str | int | float], Meta(max_length=100)]
Evaluation = Annotated[list[_Measured], Meta(max_length=100)]
_NOT_FIGURES = ("path", "parameters")


def read_evaluation(file: Path, parameters: int) -> Evaluation:
    """Return what `tools/evaluate.py --json FILE` wrote.

    Raises ValueError for any other file, and where no model of so many parameters is in it.
    """
    if not file.is_file():
        raise ValueError(f"--evaluation {file}: no such file; tools/evaluate.py --json {file} writes it")
    try:
        found = msgspec.json.decode(read_small(file, _MOST_EVALUATION), type=Evaluation)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValueError(f"--evaluation {file} is not what tools/evaluate.py --json writes: {error}") from error
    for run in found:
        figures = [value for name, value in run.items() if name != "path"]
        if not isinstance(run.get("path"), str) or not all(isinstance(value, int | float) for value in figures):
            raise ValueError(f"--evaluation {file} is not what tools/evaluate.py --json writes: a path with numbers")
    if parameters not in [run.get("parameters") for run in found]:
        raise ValueError(f"--evaluation {file} is of no model of {parameters:,} parameters, which this one has")
    return found


def model_card(checkpoint: Checkpoint, evaluation: Evaluation | None = None) -> bytes:
    """Return the README.md of a pruned checkpoint: the same bytes for the same model and evaluation."""
    lineage = checkpoint.lineage
    origin = lineage.origin
    name = origin.name.rpartition("/")[2] if origin.name else checkpoint.config.family.capitalize()
    sections = {
        f"# {name}, pruned to {short(checkpoint.config.parameters)} parameters": _what(checkpoint, lineage),
        "## What was cut": _cuts(lineage),
        "## How it was recovered": _trainings(lineage),
        "## Losses": _losses(lineage, evaluation),
        "## How to load it": _loading(),
    }
    text = "\n\n".join(f"{title}\n\n{'\n'.join(lines)}" for title, section in sections.items() if (lines := [*section]))
    return f"{_front_matter(origin, checkpoint.config.family)}\n{text}\n".encode()


def _front_matter(origin: Origin, family: str) -> str:
    """Return the lines between `---` that the hub reads; a string in quotes is the same in JSON and YAML."""
    known = {
        "base_model": origin.name,
        "license": origin.license,
        "license_name": origin.license_name,
        "license_link": origin.license_link,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in known.items() if value is not None]
    lines += ["base_model_relation: finetune"] * (origin.name is not None)
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in (family, "pruned", TOOL)), "---", ""])


def _what(checkpoint: Checkpoint, lineage: Lineage) -> Iterator[str]:
    origin, before, after = lineage.origin, lineage.parent, checkpoint.config
    assert before is not None  # it was cut
    parent = (
        f"[{origin.name}](https://huggingface.co/{origin.name})" if origin.name else "a model whose name is not known"
    )
    commit = f" at commit `{origin.commit}`" if origin.commit else ""
    yield f"A smaller model, cut out of {parent}{commit} with {TOOL} {__version__}."
    if origin.license is None:
        yield "The licence of the parent is not known here, and holds for this model, too."
    yield ""
    sizes = {AXIS[axis].words: (before.sizes[axis], after.sizes[axis]) for axis in (*PRUNABLE, "vocab")}
    rows = {"parameters": (before.parameters, after.parameters), **sizes}
    yield from _table(
        ("", "parent", "this model", "remains"),
        ((name, f"{was:,}", f"{now:,}", f"{now / was:.1%}") for name, (was, now) in rows.items()),
    )


def _cuts(lineage: Lineage) -> Iterator[str]:
    if gone := lineage.dropped_layers():
        yield f"Layers of the parent that are gone, counted from 0: {', '.join(map(str, gone))}."
        yield ""
    for cut in lineage.steps:
        if not isinstance(cut, Cut):
            continue
        said = [f"channels and heads kept by `{cut.criterion}`"] if cut.criterion else []
        if cut.dropped_layers:
            said.append(
                f"layers dropped by `{cut.layer_criterion}`" if cut.layer_criterion else "layers named one by one"
            )
        line = f"- {'; '.join(said)} (seed {f'{cut.seed}'[:40]})"
        if refit := cut.refit:
            line += f". Refitted on {refit.sequences:,} sequences of {refit.sequence_length:,} tokens, without training"
            line += ", hidden states rotated" * refit.rotated + ", output layer untied" * refit.untied
        yield f"{line}."


def _trainings(lineage: Lineage) -> Iterator[str]:
    trainings = [step for step in lineage.steps if isinstance(step, Training)]
    if not trainings:
        yield "It was not trained after it was cut."
    for training in trainings:
        parts = [f"{training.iterations:,} iterations"]
        if training.batch_size and training.sequence_length:
            parts[0] += f" of {training.batch_size:,} sequences of {training.sequence_length:,} tokens"
        if training.sequences and training.sequence_length:
            parts.append(f"{short(training.sequences * training.sequence_length)} tokens in all")
        if training.learning_rate is not None:
            parts.append(f"learning rate {training.learning_rate:g}")
        if training.distilled is not None:
            parts.append(f"distilled, with {training.distilled:.0%} of the loss the distillation's")
        yield f"- {', '.join(parts)}, in Megatron."


def _losses(lineage: Lineage, evaluation: Evaluation | None) -> Iterator[str]:
    for cut in lineage.steps:
        if isinstance(cut, Cut) and cut.refit and cut.refit.losses:
            yield from ("On text held out of the refitting, in nats a token, right after it:", "")
            losses = cut.refit.losses
            yield from _table([*losses], [[f"{loss:.3f}" for loss in losses.values()]])
            yield ""
    if evaluation:
        names = list(dict.fromkeys(name for run in evaluation for name in run if name not in _NOT_FIGURES))
        yield from ("By `tools/evaluate.py`; the loss is in nats a token:", "")
        yield from _table(
            ("", "parameters", *map(_code, names)),
            [
                [_code(label), *(_figure(run.get(name)) for name in ("parameters", *names))]
                for run, label in zip(evaluation, _labels([str(run["path"]) for run in evaluation]), strict=True)
            ],
        )


def _loading() -> Iterator[str]:
    yield from (
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'path = "."  # this directory, or the name that it has on the hub',
        "tokenizer = AutoTokenizer.from_pretrained(path)",
        'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")',
        'tokens = tokenizer("The", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))",
        "```",
    )


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (heading, ["---"] * len(heading), *rows):
        yield f"| {' | '.join(row)} |"


def _label(path: str) -> str:
    """Return a checkpoint's name: on the hub, where it lies in the hub's cache, or else of its directory."""
    if cached := _CACHED.search(path):
        return cached[1].replace("--", "/")
    return Path(path).name


def _labels(paths: Sequence[str]) -> list[str]:
    """Return the names of checkpoints; of those that share one, with the directory that they lie in."""
    labels = [_label(path) for path in paths]
    return [
        "/".join(Path(path).parts[-2:]) if labels.count(label) > 1 else label
        for path, label in zip(paths, labels, strict=True)
    ]


def _code(text: str) -> str:
    """Return foreign text as code, which ends neither the code nor a cell, and is no link."""
    return f"`{re.sub(r'[^\w .,/=%+-]', '?', text)[:100].strip() or '?'}`"


def _figure(value: str | int | float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
