"""The sums of record_scores.py for a model that no device has room for: its layers, one after the other, in one place.

Some sequences go through a layer before the next one is read from the checkpoint. What is kept of each are its hidden
states on the device, and in the machine's memory its unit vectors before every layer, of which pairs are compared.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.scores import Sums
from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.storage.processes import is_first
from megatron.pruning.training import cpu_device
from megatron.pruning.training.layerwise import ROW, Layer, embed, layer_of, tensor_of
from megatron.pruning.training.record_scores import POSITIONS, Recorder
from megatron.pruning.training.room import free_memory, processes_here, too_large
from megatron.pruning.training.stock_model import build

AT_ONCE = 32  # sequences, at most: so often are the weights read once
_SHARE_OF_MEMORY = 0.25  # for the unit vectors


class LayerwiseRecorder(Recorder):
    """The sums of one process, which reads sequences of its own. It measures no loss without a layer."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, length: int) -> None:
        self.checkpoint, config = checkpoint, checkpoint.config
        device = torch.device("cuda", torch.cuda.current_device())
        self.layer = Layer(config, getattr(torch, TORCH_NAMES[dtype]), device)
        super().__init__(self.layer.model, config, Layout(vocab_divisor=1), length)
        self.waiting: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        of_one = (config.num_layers + 1) * min(length, POSITIONS) * config.hidden_size * 4
        room = torch.tensor(_SHARE_OF_MEMORY * free_memory() / processes_here(), device=device)
        torch.distributed.all_reduce(room, torch.distributed.ReduceOp.MIN)  # all processes must do the same
        self.at_once = max(1, min(AT_ONCE, int(room) // of_one))

    def sequence(self, window: np.ndarray[Any, np.dtype[np.int64]], layer_losses: bool) -> None:
        """Take one sequence, as Recorder does; it is read with the next ones, or before `collect` returns."""
        assert not layer_losses
        self.waiting.append(window)
        if len(self.waiting) == self.at_once:
            self._read()

    def collect(self) -> Sums | None:
        """Return the sums, as Recorder does."""
        self._read()
        return super().collect()

    @torch.no_grad()
    def _read(self) -> None:
        """Bring what waits through all layers."""
        if not self.waiting:
            return
        tokens = [torch.from_numpy(np.array(window))[None].to(self.device) for window in self.waiting]
        hidden = [embed(self.checkpoint, one[:, :-1], self.dtype) for one in tokens]
        kept: list[list[torch.Tensor]] = [[] for _ in tokens]
        self.watching = True
        for number in range(self.config.num_layers):
            self.row = number
            self.layer.load(layer_of(self.checkpoint, number, self.dtype, self.device))
            for i, states in enumerate(hidden):
                self.states = kept[i]
                self._keep_state(states)
                hidden[i] = self.layer(states)
                self.states[-1] = self.states[-1].cpu()
            self.done(len(tokens) / self.config.num_layers)
        norm, head = self._last()
        for i, one in enumerate(tokens):
            self.states = kept[i]
            logits = norm(hidden[i])[:, 0] @ head.T  # the norm is watched, too
            self.sums["loss"] += cross_entropy(logits.float(), one[0, 1:], reduction="sum").double()
            states = torch.stack([state.to(self.device) for state in self.states]).flatten(1)
            self.sums["layer_cosines"] += states @ states.T
        self.watching, self.states, self.waiting = False, [], []

    def _last(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        """Return the final norm, and the weights of the output layer."""
        norm, head = self.model.decoder.final_layernorm, ROW["embed" if self.config.tied else "lm_head"]
        norm.weight.data.copy_(tensor_of(self.checkpoint.weight(ROW["final_norm"], None), self.dtype, self.device))
        return norm, tensor_of(self.checkpoint.weight(head, None), self.dtype, self.device)


def recorder_for(
    checkpoint: Checkpoint, layout: Layout, dtype: str, length: int, losses: bool = False, layer_by_layer: bool = False
) -> Recorder:
    """Return a recorder for a model, of all of it in `layout`, or of a layer at a time: also where it has no room.

    That one cannot measure the `losses` without each layer.
    """
    if layout.tensor * layout.pipeline == 1 and not losses:
        why = too_large(checkpoint, dtype, "cpu" if cpu_device.is_installed() else "cuda")
        without = torch.tensor(float(bool(why) or layer_by_layer), device="cuda")
        torch.distributed.all_reduce(without)  # all processes must do the same
        if why and is_first() and not layer_by_layer:
            print(f"note: {why}: one layer is held at a time", file=sys.stderr)
        layer_by_layer = float(without) > 0
    if layer_by_layer:
        return LayerwiseRecorder(checkpoint, dtype, length)
    return Recorder(build(checkpoint, layout, dtype), checkpoint.config, layout, length)
