"""The sums of record_scores.py for a model that no device has room for: its layers, one after the other, in one place.

Some sequences go through a layer before the next one is read from the checkpoint. What is kept of each are its hidden
states on the device, and in the machine's memory its unit vectors before every layer, of which pairs are compared, and,
where the loss without each layer is wanted, its hidden states without each, on the device or in that memory.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.scores import Sums
from megatron.pruning.storage.dtypes import BYTES, TORCH_NAMES
from megatron.pruning.storage.processes import is_first
from megatron.pruning.training import cpu_device
from megatron.pruning.training.layerwise import ROW, Layer, embed, layer_of, tensor_of
from megatron.pruning.training.record_scores import POSITIONS, Recorder
from megatron.pruning.training.room import free_memory, free_on_gpu, processes_here, too_large
from megatron.pruning.training.stock_model import build

AT_ONCE = 32  # sequences, at most: so often are the weights read once
_SHARE_OF_MEMORY = 0.25  # for what is kept of sequences


@dataclass
class _Reading:
    """A sequence on its way through the layers; `hidden` is what the next one is given, `[length, 1, hidden size]`."""

    tokens: torch.Tensor  # [1, length + 1]
    hidden: torch.Tensor
    states: list[torch.Tensor]  # its unit vectors before every layer so far, in the machine's memory
    without: list[torch.Tensor] | None  # where that is wanted, `hidden` without each of the layers so far


class LayerwiseRecorder(Recorder):
    """The sums of one process, which reads sequences of its own; `losses`: it is to measure those without each layer.

    What a sequence is without a layer goes beside the whole one from that layer on: before it they are the same.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str, length: int, losses: bool = False) -> None:
        self.checkpoint, config = checkpoint, checkpoint.config
        device = torch.device("cuda", torch.cuda.current_device())
        self.layer = Layer(config, getattr(torch, TORCH_NAMES[dtype]), device)
        super().__init__(self.layer.model, config, Layout(vocab_divisor=1), length)
        self.waiting: list[tuple[np.ndarray[Any, np.dtype[np.int64]], bool]] = []
        of_one = (config.num_layers + 1) * min(length, POSITIONS) * config.hidden_size * 4
        of_one += losses * config.num_layers * length * config.hidden_size * BYTES[dtype]
        room = torch.tensor(_SHARE_OF_MEMORY * free_memory() / processes_here(), device=device)
        torch.distributed.all_reduce(room, torch.distributed.ReduceOp.MIN)  # all processes must do the same
        self.at_once = max(1, min(AT_ONCE, int(room) // of_one))
        # What is without a layer is needed at each of the next: on a GPU, where that has room.
        self.aside = torch.device("cpu")
        if not cpu_device.is_installed() and self.at_once * of_one < free_on_gpu() / 2:
            self.aside = device

    def sequence(self, window: np.ndarray[Any, np.dtype[np.int64]], layer_losses: bool) -> None:
        """Take one sequence, as Recorder does; it is read with the next ones, or before `collect` returns."""
        self.waiting.append((window, layer_losses))
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
        reading = [self._begin(window, losses) for window, losses in self.waiting]
        self.waiting = []
        layers = range(self.config.num_layers)
        passes = [sum(1 if one.without is None else 1 + layer for one in reading) for layer in layers]
        for layer in layers:
            self.row = layer
            self.layer.load(layer_of(self.checkpoint, layer, self.dtype, self.device))
            for one in reading:
                self._take_through(one)
            self.done(len(reading) * passes[layer] / sum(passes))
        norm, head = self._last()
        for one in reading:
            self._end(one, norm, head)

    def _begin(self, window: np.ndarray[Any, np.dtype[np.int64]], losses: bool) -> _Reading:
        tokens = torch.from_numpy(np.array(window))[None].to(self.device)
        return _Reading(tokens, embed(self.checkpoint, tokens[:, :-1], self.dtype), [], [] if losses else None)

    def _take_through(self, one: _Reading) -> None:
        """Bring a sequence through the layer at hand, which watches the whole one alone."""
        if one.without is not None:
            for i, hidden in enumerate(one.without):  # in place: of a large model they take gigabytes
                one.without[i] = self.layer(hidden.to(self.device)).to(self.aside)
            one.without.append(one.hidden.to(self.aside))
        self.watching, self.states = True, one.states
        self._keep_state(one.hidden)
        one.hidden = self.layer(one.hidden)
        one.states[-1] = one.states[-1].to(self.aside)
        self.watching, self.states = False, []

    def _end(self, one: _Reading, norm: Callable[[torch.Tensor], torch.Tensor], head: torch.Tensor) -> None:
        """Add what is known of a sequence after the last layer."""

        def loss(hidden: torch.Tensor) -> torch.Tensor:
            logits = norm(hidden.to(self.device))[:, 0] @ head.T
            return cross_entropy(logits.float(), one.tokens[0, 1:], reduction="sum").double()

        self.watching, self.states = True, one.states  # of the norm's input, too
        whole = loss(one.hidden)
        self.watching, self.states = False, []
        self.sums["loss"] += whole
        states = torch.stack([state.to(self.device) for state in one.states]).flatten(1)
        self.sums["layer_cosines"] += states @ states.T
        if one.without is not None:
            self.sums["layer_losses"] += torch.stack([*map(loss, one.without), whole])

    def _last(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        """Return the final norm, and the weights of the output layer."""
        norm, head = self.model.decoder.final_layernorm, ROW["embed" if self.config.tied else "lm_head"]
        norm.weight.data.copy_(tensor_of(self.checkpoint.weight(ROW["final_norm"], None), self.dtype, self.device))
        return norm, tensor_of(self.checkpoint.weight(head, None), self.dtype, self.device)


def recorder_for(
    checkpoint: Checkpoint, layout: Layout, dtype: str, length: int, losses: bool = False, layer_by_layer: bool = False
) -> Recorder:
    """Return a recorder for a model, of all of it in `layout`, or of a layer at a time: also where it has no room.

    `losses`: it is to measure, of some sequences, the loss without each layer.
    """
    if layout.tensor * layout.pipeline == 1:
        why = too_large(checkpoint, dtype, "cpu" if cpu_device.is_installed() else "cuda")
        without = torch.tensor(float(bool(why) or layer_by_layer), device="cuda")
        torch.distributed.all_reduce(without)  # all processes must do the same
        if why and is_first() and not layer_by_layer:
            print(f"note: {why}: one layer is held at a time", file=sys.stderr)
        layer_by_layer = float(without) > 0
    if layer_by_layer:
        return LayerwiseRecorder(checkpoint, dtype, length, losses)
    return Recorder(build(checkpoint, layout, dtype), checkpoint.config, layout, length)
