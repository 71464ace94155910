"""A model one layer at a time: Megatron's own layer, whose weights are exchanged, and hidden states that lie in files.

Whatever the size of the model, memory holds one layer of it and a few thousand tokens. So a model is also evaluated
that no device has room for: `loss_sums`.
"""

import errno
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor
from torch.nn.functional import cross_entropy, rms_norm

from megatron.pruning.formats.megatron import full_key
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout, fused_order
from megatron.pruning.model.weights import TABLE, all_weights
from megatron.pruning.storage.dtypes import BY_TORCH_NAME, TORCH_NAMES
from megatron.pruning.storage.progress import Progress
from megatron.pruning.storage.views import View, blocks, take
from megatron.pruning.training.quiet import quiet_imports
from megatron.pruning.training.stock_model import watched_model

ROW = {row.name: row for row in TABLE}
Weights = dict[str, Tensor]  # by the name of their row


def tensor_of(view: View, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Read a whole weight."""
    found = torch.empty(view.shape, dtype=dtype, device=device)
    start = 0
    for _, bits in blocks(view):
        # To the device first: between two devices a copy would change the dtype on the host, and send twice the bytes.
        bits_there = torch.from_numpy(bits).view(getattr(torch, TORCH_NAMES[view.dtype])).to(device)
        found[start : start + len(bits)] = bits_there
        start += len(bits)
    return found


def layer_of(checkpoint: Checkpoint, layer: int, dtype: torch.dtype, device: torch.device) -> Weights:
    """Read the weights of one layer."""
    config = checkpoint.config
    rows = [row for row, at in all_weights(config.num_layers, config.tied, config.features) if at == layer]
    return {row.name: tensor_of(checkpoint.weight(row, layer), dtype, device) for row in rows}


class Layer:
    """One layer of Megatron's GPTModel, of the shape and constants of `config`; states: `[sequence, batch, hidden]`."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        alone = config.with_sizes({"layers": 1, "vocab": 1})
        name = BY_TORCH_NAME.get(str(dtype), "fp32")  # float64 is none of a checkpoint's
        with quiet_imports():
            built: GPTModel = GPTModelBuilder(watched_model(alone, Layout(vocab_divisor=1), name)).build_model(
                ProcessGroupCollection.use_mpu_process_groups()
            )
        self.model = built.requires_grad_(False).eval().to(device=device, dtype=dtype)
        self.layer = self.model.decoder.layers[0]
        self._seen: Tensor  # what the last linear of a block was given
        for linear in (self.layer.self_attention.linear_proj, self.layer.mlp.linear_fc2):
            linear.register_forward_pre_hook(self._see)

    def _see(self, linear: torch.nn.Module, args: tuple[Tensor]) -> None:
        self._seen = args[0]

    def load(self, weights: Weights) -> None:
        """Take these weights, some or all of the layer's."""
        parameters = dict(self.model.named_parameters())
        for name in dict.fromkeys(ROW[name].megatron for name in weights):
            rows = [row for row in TABLE if row.megatron == name]
            fused = torch.cat([weights[row.name] for row in rows])
            if len(rows) > 1:
                order = fused_order(rows, [len(weights[row.name]) for row in rows], self.config.sizes)
                fused = fused[torch.from_numpy(order).to(fused.device)]
            parameters[full_key(name, 0)].data.copy_(fused)

    def attend(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return what attention gives to its output projection, and the states after it."""
        rotary = self.model.rotary_pos_emb(len(states))
        added, _ = self.layer.self_attention(self.layer.input_layernorm(states), None, rotary_pos_emb=rotary)
        return self._seen, states + added

    def add_mixed(self, states: Tensor, mixed: Tensor) -> Tensor:
        """Return the states after attention, from what it gave to its output projection."""
        added: Tensor = self.layer.self_attention.linear_proj(mixed)[0]
        return states + added

    def feed(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the feed-forward block gives to its down projection, and the states after it."""
        added, _ = self.layer.mlp(self.layer.pre_mlp_layernorm(states))
        return self._seen, states + added

    def __call__(self, states: Tensor) -> Tensor:
        """Return the states after the layer."""
        return self.feed(self.attend(states)[1])[1]


class States:
    """Hidden states of a text, by a name that says of what they are, for each stretch of it.

    Each stretch is a file, or, where there is a `holder`, a tensor on that device, the GPU or the host, and a file only
    once that is asked for.
    Processes may share the directory, each with stretches of its own: `numbers`.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, numbers: Sequence[int],
        holder: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.dtype, self.device, self.numbers, self.holder = folder, dtype, device, numbers, holder
        self._held: dict[tuple[str, int], Tensor] = {}

    def put(self, name: str, number: int, states: Tensor) -> None:
        """Keep the states of stretch `number`, `[sequence, batch, width]`, which nobody writes to any more."""
        if self.holder is not None:
            self._held[name, number] = states.to(self.dtype).to(self.holder)
        else:
            self._write(name, number, states)

    def _write(self, name: str, number: int, states: Tensor) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self._path(name, number)
        try:
            with path.open("wb") as file:
                np.save(file, states.to(self.dtype).cpu().numpy(), allow_pickle=False)
        except OSError as error:  # numpy's has no name of a file, and may have no number
            raise OSError(error.errno or errno.ENOSPC, error.strerror or str(error), str(path)) from error

    def get(self, name: str, number: int) -> Tensor:
        """Return them."""
        if (name, number) in self._held:
            return self._held[name, number].to(self.device)
        with self._path(name, number).open("rb") as file:
            return torch.from_numpy(np.load(file, allow_pickle=False)).to(self.device)

    def make_durable(self, *names: str) -> None:
        """Let states be there after a failure of the machine, too."""
        for name, number in itertools.product(names, self.numbers):
            if (name, number) in self._held:
                self._write(name, number, self._held[name, number])
        for path in self._paths(names):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def free(self, *names: str) -> None:
        """Forget what memory holds of states; their files stay."""
        for name, number in itertools.product(names, self.numbers):
            self._held.pop((name, number), None)

    def drop(self, *names: str) -> None:
        """Forget states."""
        self.free(*names)
        for path in self._paths(names):
            path.unlink(missing_ok=True)

    def _paths(self, names: Sequence[str]) -> list[Path]:
        return [self._path(name, number) for name in names for number in self.numbers]

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number:06d}.npy"


def embed(checkpoint: Checkpoint, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows of the embedding, `[sequence, batch, hidden]`, of tokens `[batch, sequence]`."""
    ids, places = torch.unique(tokens.cpu(), return_inverse=True)
    rows = tensor_of(take(checkpoint.weight(ROW["embed"], None), 0, ids.numpy()), dtype, tokens.device)
    return rows[places.to(tokens.device)].transpose(0, 1).contiguous()


def loss_sums(
    checkpoint: Checkpoint,
    portions: Mapping[int, tuple[Tensor, Tensor]],
    states: States,
    dtype: torch.dtype,
    progress: Progress,
) -> Tensor:
    """Return a model's summed loss in nats and over how many tokens that is, `[2]` in float64, computed in `dtype`.

    `portions` of the text go through a layer at once: by the number under which `states` keeps theirs, tokens
    `[batch, length + 1]` and which of the last `length` count, `[batch, length]`. `progress` counts layers.
    """
    config, device = checkpoint.config, states.device
    layer = Layer(config, dtype, device)
    for number, (tokens, _) in portions.items():
        states.put("loss", number, embed(checkpoint, tokens[:, :-1], dtype))
    for at in range(config.num_layers):
        layer.load(layer_of(checkpoint, at, dtype, device))
        for number in portions:
            states.put("loss", number, layer(states.get("loss", number).to(dtype)))
        progress.advance(1)
    gain = tensor_of(checkpoint.weight(ROW["final_norm"], None), dtype, device)
    head = tensor_of(checkpoint.weight(ROW["embed" if config.tied else "lm_head"], None), dtype, device)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for number, (tokens, counted) in portions.items():
        normed = rms_norm(states.get("loss", number).to(dtype), (config.hidden_size,), gain, config.norm_epsilon)
        for one, labels, counts in zip(normed.unbind(1), tokens[:, 1:], counted, strict=True):
            total[0] += cross_entropy((one[counts] @ head.T).float(), labels[counts], reduction="sum")
            total[1] += counts.sum()
    states.drop("loss")
    return total
