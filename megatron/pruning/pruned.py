"""A checkpoint seen through a plan: the same face, sliced weights."""

import numpy as np

from megatron.pruning.checkpoint import Checkpoint
from megatron.pruning.layout import Layout
from megatron.pruning.plan import Plan, check_layout
from megatron.pruning.table import Weight, kept_elements
from megatron.pruning.views import View, take


class Pruned(Checkpoint):
    """The lazy view of `parent`, the model that `plan` was made for; nothing is read before a weight is."""

    def __init__(self, parent: Checkpoint, plan: Plan) -> None:
        self.parent, self.plan = parent, plan
        self.path, self.root, self.files = parent.path, parent.root, parent.files
        self.format, self.layout, self.transformer_impl = parent.format, parent.layout, parent.transformer_impl
        self.config = parent.config.with_sizes(plan.sizes)

    def weight(self, weight: Weight, layer: int | None) -> View:
        parent_layer = None if layer is None else int(self.plan.layers[layer])
        view, keep = self.parent.weight(weight, parent_layer), self.plan.keep(layer)
        for dim, dim_axes in enumerate(weight.dims):
            view = take(view, dim, kept_elements(dim_axes, keep, self.parent.config.sizes))
        return view

    def boundaries(self, axis: str, layer: int, tensor: int) -> list[int]:
        """Even blocks; after an unbalanced pruning for this many ranks, each rank keeps what fell into its block."""
        if self.plan.prune_type == "balance" or tensor != self.plan.tensor_parallel:
            return super().boundaries(axis, layer, tensor)
        edges = [self.parent.config.sizes[axis] * rank // tensor for rank in range(tensor + 1)]
        return [int(bound) for bound in np.searchsorted(self.plan.keep(layer)[axis], edges)]

    def check_layout(self, layout: Layout) -> None:
        unbalanced = self.plan.prune_type == "unbalance" and layout.tensor == self.plan.tensor_parallel
        check_layout(self.config.sizes, self.parent.config.sizes, layout, "unbalance" if unbalanced else "balance")

    def carried_files(self) -> dict[str, bytes]:
        return self.parent.carried_files()
