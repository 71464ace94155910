"""A checkpoint seen through a plan: the same face, sliced weights."""

from collections.abc import Iterator

import numpy as np

from megatron.pruning.model.axes import CHOSEN
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.lineage import Cut, Lineage, Refit, Shape
from megatron.pruning.model.weights import WeightRow, kept_elements
from megatron.pruning.plan.plan import BALANCE, UNBALANCE, Plan, check_layout
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.views import Bits, Index, View, cast, take

NORMS = ("attn_norm", "mlp_norm", "final_norm")  # in the order of a plan's `norm_gains`: two a layer, one at the end


class Scaled(View):
    """An fp32 view, multiplied by a number."""

    def __init__(self, parent: View, factor: float) -> None:
        self.parent, self.factor, self.shape, self.dtype = parent, np.float32(factor), parent.shape, "fp32"

    def read_into(self, rows: Index, out: Bits) -> None:
        self.parent.read_into(rows, out)
        values = out.view(np.float32)
        values *= self.factor

    def sources(self) -> Iterator[File]:
        return self.parent.sources()


class Pruned(Checkpoint):
    """The lazy view of `parent`, the model that `plan` was made for; nothing is read before a weight is."""

    refit: Refit | None = None  # how its weights were reconstructed, if they were

    def __init__(self, parent: Checkpoint, plan: Plan) -> None:
        self.parent, self.plan = parent, plan
        self.path, self.root, self.files = parent.path, parent.root, parent.files
        self.tokenizer_folder, self.declared_dtype = parent.tokenizer_folder, parent.declared_dtype
        self.format, self.layout, self.transformer_impl = parent.format, parent.layout, parent.transformer_impl
        self.config = parent.config.with_sizes(plan.sizes)

    @property
    def lineage(self) -> Lineage:
        config, evidence = self.parent.config, self.plan.evidence
        chosen = any(self.plan.sizes[axis] != config.sizes[axis] for axis in CHOSEN)
        cut = Cut(
            dropped_layers=self.plan.dropped_layers,
            criterion=evidence.criterion if chosen else None,
            layer_criterion=evidence.layer_criterion,
            seed=evidence.seed,
            refit=self.refit,
        )
        return self.parent.lineage.cut(cut, Shape(config.sizes, config.parameters))

    def weight(self, weight: WeightRow, layer: int | None) -> View:
        parent_layer = None if layer is None else int(self.plan.layers[layer])
        view, keep = self.parent.weight(weight, parent_layer), self.plan.keep(layer)
        for dim, dim_axes in enumerate(weight.dims):
            view = take(view, dim, kept_elements(dim_axes, keep, self.parent.config.sizes))
        return self._with_corrected_gain(view, weight, layer)

    def _with_corrected_gain(self, view: View, weight: WeightRow, layer: int | None) -> View:
        """Multiply a norm's gain as the plan says, in fp32, rounded once to its own dtype."""
        if not self.plan.norm_gains or weight.name not in NORMS:
            return view
        place = -1 if layer is None else 2 * layer + NORMS.index(weight.name)
        return cast(Scaled(cast(view, "fp32"), self.plan.norm_gains[place]), view.dtype)

    def boundaries(self, axis: str, layer: int, tensor: int) -> list[int]:
        """Even blocks; after an unbalanced pruning for this many ranks, each rank keeps what fell into its block."""
        if self.plan.prune_type == BALANCE or tensor != self.plan.tensor_parallel:
            return super().boundaries(axis, layer, tensor)
        edges = [self.parent.config.sizes[axis] * rank // tensor for rank in range(tensor + 1)]
        return [int(bound) for bound in np.searchsorted(self.plan.keep(layer)[axis], edges)]

    def check_layout(self, layout: Layout) -> None:
        unbalanced = self.plan.prune_type == UNBALANCE and layout.tensor == self.plan.tensor_parallel
        check_layout(self.config.sizes, self.parent.config.sizes, layout, UNBALANCE if unbalanced else BALANCE)
