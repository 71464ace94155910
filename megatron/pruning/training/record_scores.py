"""Watch a GPTModel read text, one sequence at a time, for the sums of plan/scores.py, on every layout.

Each rank sums what it holds. A pipeline stage hands the next one its output together with the layer inputs so far (unit
vectors at evenly spaced positions), so that the last stage, which has them all, compares every pair of layers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron.pruning.model.axes import AXES, PER_LAYER
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.scores import Sums

POSITIONS = 512  # of a sequence, at most, at which layers are compared

# Arrays of an axis that tensor parallelism splits: each rank has its block of columns.
_SPLIT = tuple(name for axis in AXES if axis.split for name in (axis.name, f"added_by_{axis.name}"))


class Recorder:
    """The sums of one rank, fed by hooks on its stage of the model.

    `model` is this rank's stage, in eval mode, `config` that of the whole model, `length` the tokens of a sequence.
    `done` is told how many sequences have been read since it was told last.
    """

    at_once = 1  # sequences that are read together

    def __init__(self, model: GPTModel, config: LlamaConfig, layout: Layout, length: int) -> None:
        self.model, self.config, self.layout, self.length = model, config, layout, length
        stage = parallel_state.get_pipeline_model_parallel_rank()
        self.layers = layout.layers_of_stage(config.num_layers, stage)
        self.first, self.last = stage == 0, stage == layout.pipeline - 1
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = next(model.parameters()).dtype
        read = min(length, POSITIONS)
        self.positions = torch.arange(read, device=self.device) * length // read
        self.states: list[torch.Tensor] = []  # unit vectors, [positions, hidden] each, of the sequence at hand
        self.skipped: int | None = None  # the global layer that is left out of the pass at hand
        self.watching = False
        self.row = 0  # of the layer that stands first among the layers of `model`
        self.done: Callable[[float], None] = lambda sequences: None
        self._input: torch.Tensor  # of the layer at hand
        self._clear()
        self._watch()

    def _clear(self) -> None:
        count, tensor, total = len(self.layers), self.layout.tensor, self.config.num_layers
        shapes: dict[str, tuple[int, ...]] = {
            "norm_outputs": (2 * count, self.config.hidden_size),
            "norm_inputs": (2 * count + self.last, self.config.hidden_size),
            "heads": (count, self.config.num_attention_heads // tensor),
            "ffn": (count, self.config.ffn_hidden_size // tensor),
            **{f"added_by_{axis}": (count, self.config.sizes[axis] // tensor) for axis in PER_LAYER},
        }
        if self.last:
            shapes |= {"layer_cosines": (total + 1, total + 1), "layer_losses": (total + 1,), "loss": (1,)}
        self.sums = {name: torch.zeros(s, dtype=torch.float64, device=self.device) for name, s in shapes.items()}

    def _watch(self) -> None:
        for i, layer in enumerate(self.model.decoder.layers):
            layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True)
            layer.register_forward_hook(self._leave_layer(self.layers[i]))
            for j, norm in enumerate((layer.input_layernorm, layer.pre_mlp_layernorm)):
                norm.register_forward_hook(self._norm(2 * i + j))
            layer.self_attention.linear_proj.register_forward_pre_hook(self._linear_input("heads", i))
            layer.mlp.linear_fc2.register_forward_pre_hook(self._linear_input("ffn", i))
        if self.last:
            last = 2 * len(self.model.decoder.layers)
            self.model.decoder.final_layernorm.register_forward_hook(self._norm(last, final=True))

    def _enter_layer(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self._keep_state(self._input)

    def _leave_layer(self, number: int) -> Callable[..., Any]:
        def hook(layer: Any, args: Any, output: tuple[torch.Tensor, Any]) -> Any:
            return (self._input, *output[1:]) if number == self.skipped else None

        return hook

    def _keep_state(self, hidden: torch.Tensor) -> None:
        if self.watching:  # hidden is [sequence, 1, hidden size]
            picked = hidden[self.positions, 0].float()
            self.states.append(torch.nn.functional.normalize(picked, dim=-1))

    def _norm(self, row: int, final: bool = False) -> Callable[..., None]:
        def hook(norm: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if self.watching:
                at = row + 2 * self.row
                self.sums["norm_inputs"][at] += args[0][:, 0].float().square().sum(0)
                if final:
                    self._keep_state(args[0])
                else:
                    self.sums["norm_outputs"][at] += _squared_mean(output)

        return hook

    def _linear_input(self, name: str, row: int) -> Callable[..., None]:
        def hook(linear: Any, args: tuple[torch.Tensor]) -> None:
            if self.watching:
                units, at = self.sums[name].shape[1], row + self.row
                self.sums[name][at] += _squared_mean(args[0]).view(units, -1).sum(1)
                added: dict[int, torch.Tensor] = {}  # by the number of units: without groups each head is one
                for axis in ("heads", "groups") if name == "heads" else (name,):
                    sums = self.sums[f"added_by_{axis}"][at]
                    if len(sums) not in added:
                        added[len(sums)] = _added(args[0], linear.weight, len(sums))
                    sums += added[len(sums)]

        return hook

    @torch.no_grad()
    def sequence(self, window: np.ndarray[Any, np.dtype[np.int64]], layer_losses: bool) -> None:
        """Add one sequence of `[length + 1]` tokens: the inputs and, one later, the labels.

        With `layer_losses` the loss without each layer is measured, too, by one more pass a layer.
        """
        self.watching, self.states = True, []
        loss = self._forward(window)
        if self.last:
            states = torch.stack(self.states).flatten(1)  # [layers + 1, positions * hidden]
            self.sums["layer_cosines"] += states @ states.T
            self.sums["loss"] += loss
        self.watching, self.states = False, []
        for layer in range(self.config.num_layers if layer_losses else 0):
            self.skipped = layer
            without = self._forward(window)
            if self.last:
                self.sums["layer_losses"][layer] += without
        self.skipped = None
        if layer_losses and self.last:
            self.sums["layer_losses"][-1] += loss
        self.done(1)

    def _forward(self, window: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
        """Return the summed loss on the last stage, something of no meaning on the others."""
        tokens = torch.from_numpy(np.array(window))[None].to(self.device)
        if not self.first:
            self._receive()
        positions = torch.arange(self.length, device=self.device)[None]
        output: torch.Tensor = self.model(tokens[:, :-1] if self.first else None, positions, None, labels=tokens[:, 1:])
        if not self.last:
            self._send(output)
        return output.double().sum()

    def _receive(self) -> None:
        hidden = torch.empty(self.length, 1, self.config.hidden_size, dtype=self.dtype, device=self.device)
        source = parallel_state.get_pipeline_model_parallel_prev_rank()
        torch.distributed.recv(hidden, source)
        self.model.set_input_tensor(hidden)
        if self.watching:
            shape = (self.layers.start, len(self.positions), self.config.hidden_size)
            states = torch.empty(shape, device=self.device)
            torch.distributed.recv(states, source)
            self.states = list(states)

    def _send(self, output: torch.Tensor) -> None:
        target = parallel_state.get_pipeline_model_parallel_next_rank()
        torch.distributed.send(output.contiguous(), target)
        if self.watching:
            torch.distributed.send(torch.stack(self.states), target)

    def collect(self) -> Sums | None:
        """Return, on rank 0, the sums of all ranks together since the last call, with `loss` [1]; None elsewhere."""
        mine = {name: array.cpu().numpy() for name, array in self.sums.items()}
        place = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
        )
        self._clear()
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        everyone: list[Any] | None = [None] * world if rank == 0 else None
        torch.distributed.gather_object((place, mine), everyone)
        return None if everyone is None else _combine(dict(everyone), self.layout)


def _combine(parts: dict[tuple[int, int, int], Sums], layout: Layout) -> Sums:
    """Add up the data-parallel copies, put tensor ranks' columns and stages' rows in their order."""
    copies = 1 + max(copy for _, _, copy in parts)

    def stage(p: int, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        ranks = range(layout.tensor if name in _SPLIT else 1)
        return np.concatenate([sum(parts[p, t, copy][name] for copy in range(copies)) for t in ranks], axis=-1)

    last = layout.pipeline - 1
    return {
        name: np.concatenate([stage(p, name) for p in range(layout.pipeline) if name in parts[p, 0, 0]])
        for name in parts[last, 0, 0]
    }


def _squared_mean(values: torch.Tensor) -> torch.Tensor:
    """Return the square of the mean magnitude over the sequence, of `[sequence, 1, channels]`, in float64."""
    return values[:, 0].float().abs().mean(0).double().square()


def _added(inputs: torch.Tensor, weight: torch.Tensor, units: int) -> torch.Tensor:
    """Return for each of `units` blocks of channels the sum over tokens of |W a|^2, of the linear's inputs in it.

    `inputs` are [sequence, 1, channels], `weight` is [hidden, channels]. With A the second moment of a block's inputs
    and V that of its columns, the sum is that of A times V: no output is computed.
    """
    if inputs.shape[-1] == units:  # numbers, of which there are thousands
        a, w = (t.flatten(0, -2).float().square().sum(0).double() for t in (inputs, weight))
        return a * w
    a, w = (t.flatten(0, -2).float().view(-1, units, t.shape[-1] // units).transpose(0, 1) for t in (inputs, weight))
    added: torch.Tensor = ((a.transpose(1, 2) @ a) * (w.transpose(1, 2) @ w)).double().sum((1, 2))
    return added
