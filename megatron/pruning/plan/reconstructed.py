"""A pruned checkpoint whose weights were refitted on text, and the report of that."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.lineage import Refit
from megatron.pruning.model.weights import TABLE, WeightRow
from megatron.pruning.plan.plan import MADE_BY, Plan
from megatron.pruning.plan.pruned import Pruned
from megatron.pruning.storage.small_files import parse_as
from megatron.pruning.storage.views import View

REPORT_FILE = "reconstruct.json"  # lies beside the weights of a reconstructed checkpoint
VERSION = 1

AUTO: Final = "auto"  # the ridge of every weight is chosen on the held-out text
Ridge = float | Literal["auto"]


class WeightReport(msgspec.Struct, frozen=True, kw_only=True):
    """What refitting a weight gave: sums of squares on the text that was learned from, and on what was held out of it.

    `wanted` is what the weight should give, or, of one that adds to the hidden states, what these should be; `before`
    and `after` are what the cut and the refitted weight miss of it.
    `ridge` is None where the weight, or a part of it, was let be.
    """

    name: str
    layer: int | None
    ridge: float | None
    wanted: tuple[float, float]
    before: tuple[float, float]
    after: tuple[float, float]


class Losses(msgspec.Struct, frozen=True):
    """Mean losses in nats a token on the held-out text."""

    parent: float
    cut: float
    reconstructed: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was done: on which model and text, how, and how far it brought each weight.

    `parent`, `plan` and `tokens` are digests; `ridge` is what was asked for, None where no weight was refitted, only
    the hidden states were rotated; `text` has the share of each text. `layers_done` counts up to the model's and one
    more, for what comes after the layers.
    """

    parent: str
    plan: str
    tokens: str
    text: dict[str, float]
    sequences: int
    held_out_sequences: int
    sequence_length: int
    ridge: Ridge | None
    rotated: bool
    untied: bool
    dtype: str | None
    layers_done: int = 0
    weights: list[WeightReport] = []
    losses: Losses | None = None
    made_by: str = MADE_BY
    version: int = VERSION

    def to_json(self) -> bytes:
        """Return the file's content: the same bytes for the same report."""
        content = msgspec.to_builtins(self)
        weights = ",\n  ".join(json.dumps(weight) for weight in content.pop("weights"))
        return f'{json.dumps(content, indent=1)[:-2]},\n "weights": [\n  {weights}\n ]\n}}\n'.encode()

    @classmethod
    def from_json(cls, raw: bytes, where: str) -> "Report":
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        return parse_as(cls, raw, f"{where} is no report of a reconstruction")

    def same_job(self, other: "Report") -> bool:
        """Return whether both are of the same models and text, maybe not equally far."""
        far = {"layers_done": 0, "weights": [], "losses": None}
        return msgspec.structs.replace(self, **far) == msgspec.structs.replace(other, **far)

    @property
    def refit(self) -> Refit:
        """What a lineage says of it."""
        return Refit(
            sequences=self.sequences,
            sequence_length=self.sequence_length,
            rotated=self.rotated,
            untied=self.untied,
            losses=msgspec.to_builtins(self.losses) if self.losses else {},
        )

    def share_missed(self, layer: int | None, names: Sequence[str], after: bool) -> float:
        """Return the share that these weights of a layer miss of what is wanted on held-out text."""
        rows = [weight for weight in self.weights if weight.layer == layer and weight.name in names]
        missed = sum((row.after if after else row.before)[1] for row in rows)
        return missed / max(sum(row.wanted[1] for row in rows), 1e-300)


def plan_digest(plan: Plan) -> str:
    """Return 16 hex digits that tell plans apart."""
    return hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]


class Reconstructed(Pruned):
    """The lazy view of `parent` pruned by `plan`, with `weights`, by Hugging Face key, in the place of the cut ones.

    An output layer among them is the model's own, whatever the parent's was.
    """

    def __init__(self, parent: Checkpoint, plan: Plan, weights: Mapping[str, View]) -> None:
        super().__init__(parent, plan)
        self.weights_by_key = weights
        if TABLE[-1].hf_key(None) in weights:
            self.config = dataclasses.replace(self.config, tied=False)

    def weight(self, weight: WeightRow, layer: int | None) -> View:
        stored = self.weights_by_key.get(weight.hf_key(layer))
        return super().weight(weight, layer) if stored is None else stored
