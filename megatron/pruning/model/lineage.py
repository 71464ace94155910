"""Where a model comes from: its first parent, and every cut and training since, in a small file that travels with it.

The file is data that came with a checkpoint: what it may hold is said by the types below, and nothing else is read.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from megatron.pruning.model.axes import AXES, AXIS
from megatron.pruning.storage.small_files import as_json, parse_as, read_small

LINEAGE_FILE = "lineage.json"  # lies with the tokenizer's files
CARD_FILE = "README.md"
HUB_NAME = r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}"
COMMIT = r"[0-9a-f]{40}"
_MOST_CARD = 1_000_000  # bytes of a card that are looked at
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(
    r"""^(license|license_name|license_link):[ \t]+(["']?)([^"'\s#][^"'\s]*)\2[ \t]*(?:[ \t]#.*)?\r?$""", re.MULTILINE
)

_Name = Annotated[str, Meta(pattern=rf"(?a)^{HUB_NAME}\Z")]
_Word = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}\Z")]
_Link = Annotated[
    str, Meta(pattern=r"(?a)^(?:https://[\w.-]{1,200}/[\w./~%-]{0,400}|(?:LICENSE|NOTICE)[\w.-]{0,50})\Z")
]
_Count = Annotated[int, Meta(ge=0, le=1 << 62)]
_Number = Annotated[float, Meta(ge=-1e9, le=1e9)]


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A model of the Hugging Face hub: its name, commit and licence, each None where it is not known."""

    name: _Name | None = None
    commit: Annotated[str, Meta(pattern=rf"^{COMMIT}\Z")] | None = None
    license: _Word | None = None
    license_name: _Word | None = None
    license_link: _Link | None = None


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The size of every axis of a model, and the number of its parameters."""

    sizes: Annotated[dict[str, int], Meta(max_length=len(AXES))]
    parameters: _Count

    def __post_init__(self) -> None:
        if set(self.sizes) != set(AXIS) or not all(1 <= size <= AXIS[axis].limit for axis, size in self.sizes.items()):
            raise ValueError(f"sizes must be of {', '.join(AXIS)}, from 1 on")


class Refit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A reconstruction: on how much text, how, and the losses in nats a token on text that was held out."""

    sequences: _Count
    sequence_length: _Count
    rotated: bool
    untied: bool
    losses: Annotated[dict[_Word, _Number], Meta(max_length=3)]


class Cut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="step", tag="cut"):
    """A pruning: which layers of the model before it went, what decided, and the reconstruction, if it had one.

    `criterion` is None where only layers went, `layer_criterion` where they were named.
    """

    dropped_layers: Annotated[list[_Count], Meta(max_length=AXIS["layers"].limit)]
    criterion: _Word | None
    layer_criterion: _Word | None
    seed: int
    refit: Refit | None = None


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="step", tag="training"):
    """A training in Megatron: iterations, sequences in all and in a step, their tokens, learning rate, distillation.

    `distilled` is the share of the distillation loss, where there was a teacher. What is not known is None.
    """

    iterations: _Count
    sequences: _Count | None = None
    sequence_length: _Count | None = None
    batch_size: _Count | None = None
    learning_rate: Annotated[float, Meta(ge=0, le=1e3)] | None = None
    distilled: Annotated[float, Meta(ge=0, le=1)] | None = None


class Lineage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model's first parent, and what was done to it since, first to last. `parent` is None before the first cut."""

    version: Annotated[int, Meta(ge=1, le=1)] = 1
    origin: Origin = Origin()
    parent: Shape | None = None
    steps: Annotated[list[Cut | Training], Meta(max_length=1000)] = []

    def __post_init__(self) -> None:
        if self.steps and (self.parent is None or not isinstance(self.steps[0], Cut)):
            raise ValueError("the first step must be a cut of a parent")

    def cut(self, step: Cut, before: Shape) -> "Lineage":
        """Return the lineage of what a cut left of a model of the shape `before`."""
        return msgspec.structs.replace(self, parent=self.parent or before, steps=[*self.steps, step])

    def trained(self, args: Namespace, iterations: int) -> "Lineage":
        """Return the lineage of a checkpoint of a training with such arguments; before a cut it is the parent's own."""
        step = _training(args, iterations)
        return msgspec.structs.replace(self, steps=[*self.steps, step]) if self.steps else self

    def dropped_layers(self) -> list[int]:
        """Return the numbers of the first parent's layers that are gone."""
        assert self.parent is not None
        layers = every = [*range(self.parent.sizes["layers"])]
        for step in self.steps:
            if isinstance(step, Cut):
                gone = set(step.dropped_layers)
                layers = [layer for number, layer in enumerate(layers) if number not in gone]
        return sorted({*every}.difference(layers))

    def to_json(self) -> bytes:
        """Return the file's content: the same bytes for the same lineage."""
        return as_json(msgspec.to_builtins(self))


def read_lineage(folder: Path) -> Lineage:
    """Return the lineage that lies in the `folder` of a checkpoint's small files.

    Without one the model is its own first parent, and the folder says what is known of it: the hub's cache has its name
    in the path, its card has a licence. Raises ValueError for a file that holds anything else than a lineage.
    """
    file = folder / LINEAGE_FILE
    if file.is_file():
        return parse_as(Lineage, read_small(file), f"{file} is no lineage of a model; remove it to go on without")
    place, card = folder.resolve(), folder / CARD_FILE
    known: dict[str, str] = {}
    kind, *name = place.parent.parent.name.split("--")
    if place.parent.name == "snapshots" and re.fullmatch(COMMIT, place.name) and kind == "models":
        known |= {"name": "/".join(name), "commit": place.name}
    if card.is_file():
        with card.open("rb") as content:
            known |= _licence(content.read(_MOST_CARD).decode(errors="replace"))
    return Lineage(origin=_with_valid(Origin(), known))


def _licence(card: str) -> dict[str, str]:
    """Return what the front matter of a card says of the licence in plain values; nothing that it says twice."""
    if not (front := _FRONT_MATTER.match(card)):
        return {}
    lines = [(found[1], found[3]) for found in _LICENSE.finditer(front[1])]
    names = [name for name, _ in lines]
    return {name: value for name, value in lines if names.count(name) == 1}


def _training(args: Namespace, iterations: int) -> Training:
    def get(name: str) -> Any:
        return getattr(args, name, None)

    found = {
        "sequences": get("consumed_train_samples"),
        "sequence_length": get("seq_length"),
        "batch_size": get("global_batch_size"),
        "learning_rate": get("lr"),
    }
    if get("teacher_load") is not None or get("kd_load") is not None:
        found["distilled"] = get("kd_alpha")
    return _with_valid(Training(iterations=iterations), found)


def _with_valid[T: msgspec.Struct](struct: T, found: Mapping[str, Any]) -> T:
    """Return a struct with those of the values found that it may have; any other is as if it were not there."""
    for name, value in found.items():
        try:
            struct = msgspec.convert({**msgspec.to_builtins(struct), name: value}, type(struct))
        except msgspec.ValidationError:
            continue
    return struct
