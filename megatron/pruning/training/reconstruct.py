"""Reconstruction: after cutting, what remains is refitted so that it computes what the parent computed, layer by layer.

Both models read the same text side by side. In each layer the weights that read the hidden states (q, k, v; gate, up)
are refitted to give what the parent's give, on the inputs that the pruned model really has by then; the weights that
write (o, down) to bring the pruned model's hidden states to the parent's: what earlier layers got wrong is part of what
they are to add. Each is one ridge regression towards the cut weight (least_squares.py), so without evidence nothing
changes. Where layers were dropped, the last one before them learns to stand in for them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.weights import READERS
from megatron.pruning.plan.plan import Plan
from megatron.pruning.plan.pruned import Pruned
from megatron.pruning.plan.reconstructed import AUTO, Ridge
from megatron.pruning.storage.progress import Progress
from megatron.pruning.training.basis import Basis, rotation
from megatron.pruning.training.calibration import Calibration, Stretch
from megatron.pruning.training.layerwise import ROW, Layer, States, Weights, embed, layer_of, loss_sums, tensor_of
from megatron.pruning.training.least_squares import Fit, LeastSquares, Moments


@dataclass(frozen=True)
class Options:
    """How to reconstruct. With an infinite `ridge` the weights stay as they were cut, or rotated."""

    ridge: Ridge = AUTO
    rotate: bool = False
    untie: bool = False

    @property
    def refits(self) -> bool:
        """Whether weights are refitted."""
        return self.ridge == AUTO or math.isfinite(self.ridge)


@dataclass(frozen=True)
class Text:
    """This rank's share of the calibration text, on a device."""

    calibration: Calibration
    device: torch.device
    rank: int = 0
    ranks: int = 1

    def stretches(self, held_out: bool | None = None) -> Iterator[Stretch]:
        """Yield the stretches of this rank: all, or those that are held out, or those that are not."""
        for stretch in self.calibration.stretches[self.rank :: self.ranks]:
            if held_out in (None, stretch.held_out):
                yield stretch

    def tokens(self, stretch: Stretch) -> Tensor:
        """Return its tokens and one more, `[batch, length + 1]`."""
        return torch.from_numpy(self.calibration.tokens[list(stretch.sequences)]).to(self.device)

    def add_up(self, *sums: Tensor) -> None:
        """Let every rank have the sums of all."""
        if self.ranks > 1:
            for tensor in sums:
                torch.distributed.all_reduce(tensor)

    def from_first(self, tensor: Tensor) -> Tensor:
        """Return what the first rank has, of which others may have other last bits, or signs."""
        if self.ranks > 1:
            tensor = tensor.contiguous()
            torch.distributed.broadcast(tensor, 0)
        return tensor


@dataclass
class Reconstruction:
    """The two models side by side. Call `start`, then `layer` for each of the pruned model's layers, then `finish`.

    `fits` has, by the row's name, what the last of these calls fitted.

    `stored` rounds a refitted weight, given with its row's name and layer, to what will be written of it, so that the
    layers after it see what the written model will give. All arithmetic is in `dtype`, sums are in float64.
    """

    parent: Checkpoint
    plan: Plan
    text: Text
    options: Options
    states: States
    stored: Callable[[str, int | None, Tensor], Tensor] = lambda name, layer, weight: weight
    fits: dict[str, Fit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = self.parent.config.sizes
        self.dtype, self.device = self.states.dtype, self.text.device
        self.config = self.parent.config.with_sizes(self.plan.sizes)
        # The parent with its heads and channels cut, but all of its hidden size: what the pruned model is to give.
        whole = np.arange(sizes["hidden"])
        self.narrow = Pruned(self.parent, replace(self.plan, hidden=whole, norm_gains=()))
        self.basis = Basis(torch.from_numpy(self.plan.hidden).to(self.device))
        self.epsilon = self.parent.config.norm_epsilon
        # Where nothing is cut there is nothing to mend, and rounding alone would change the last bits.
        cuts = self.options.rotate or self.options.untie or self.plan.sizes != dict(self.plan.parent_sizes)
        self.refits = self.options.refits and cuts
        self.parent_layer = Layer(self.parent.config, self.dtype, self.device)
        self.pruned_layer = Layer(self.config, self.dtype, self.device)

    def start(self) -> Weights:
        """Give both models their first hidden states; return the embedding where it is another than the parent's."""
        if self.options.rotate:
            self.set_basis(self._rotation())
        self._embed("parent")
        first: Weights = {}
        if self.basis.matrix is not None:
            rows = tensor_of(self.parent.weight(ROW["embed"], None), self.dtype, self.device)
            first = {"embed": self._stored("embed", None, self.basis.project(rows))}
        for stretch in self.text.stretches():
            if first:
                tokens = self.text.tokens(stretch)[:, :-1]
                states = first["embed"][tokens].transpose(0, 1).contiguous()
            else:
                states = self.basis.project(self.states.get("parent.0", stretch.number))
            self.states.put("pruned.0", stretch.number, states)
        self._through_parent("parent.0", range(int(self.plan.layers[0])))
        return first

    def set_basis(self, matrix: Tensor) -> None:
        """Rotate the hidden states by a matrix that `start` of an earlier run has found."""
        self.basis = replace(self.basis, matrix=matrix.to(device=self.device, dtype=self.dtype))

    def layer(self, layer: int) -> Weights:
        """Refit layer `layer` of the pruned model, and bring both models' states beyond it. Return its weights."""
        self.fits = {}
        number = int(self.plan.layers[layer])
        following = int(self.plan.layers[layer + 1]) if layer + 1 < len(self.plan.layers) else self._parent_layers
        target = layer_of(self.narrow, layer, self.dtype, self.device)
        cut = self.basis.cut(target)
        self.parent_layer.load(layer_of(self.parent, number, self.dtype, self.device))
        before, after = f".{layer}", f".{layer + 1}"
        self._read("attn_norm", layer, target, cut, f"parent{before}", f"pruned{before}")
        self.pruned_layer.load(cut)
        self._attend(layer, cut, before)
        self._read("mlp_norm", layer, target, cut, "parent.middle", "pruned.middle")
        self.pruned_layer.load(cut)
        for stretch in self.text.stretches():
            states = self.parent_layer.feed(self.states.get("parent.middle", stretch.number))[1]
            self.states.put(f"parent{after}", stretch.number, states)
        self._through_parent(f"parent{after}", range(number + 1, following))
        self._feed(layer, cut, after)
        self.states.drop("parent.middle", "pruned.middle", "pruned.mixed")
        return cut

    def finish(self) -> Weights:
        """Refit what comes after the layers: the final norm and, where it has weights of its own, the output layer."""
        self.fits = {}
        config, last = self.parent.config, f".{len(self.plan.layers)}"
        target = {"final_norm": tensor_of(self.parent.weight(ROW["final_norm"], None), self.dtype, self.device)}
        if not config.tied or self.options.untie:
            head = ROW["embed" if config.tied else "lm_head"]
            target["lm_head"] = tensor_of(self.parent.weight(head, None), self.dtype, self.device)
        cut = self.basis.cut(target)
        self._read("final_norm", None, target, cut, f"parent{last}", f"pruned{last}")
        return cut

    @property
    def _parent_layers(self) -> int:
        return self.parent.config.num_layers

    def _stored(self, name: str, layer: int | None, weight: Tensor) -> Tensor:
        return self.stored(name, layer, weight).to(device=self.device, dtype=self.dtype)

    def _embed(self, who: str) -> None:
        for stretch in self.text.stretches():
            tokens = self.text.tokens(stretch)[:, :-1]
            self.states.put(f"{who}.0", stretch.number, embed(self.parent, tokens, self.dtype))

    def _through_parent(self, name: str, layers: Sequence[int]) -> None:
        """Bring the parent's states beyond layers that the pruned model has not."""
        for layer in layers:
            self.parent_layer.load(layer_of(self.parent, layer, self.dtype, self.device))
            for stretch in self.text.stretches():
                self.states.put(name, stretch.number, self.parent_layer(self.states.get(name, stretch.number)))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def _moments(self, inputs: int, targets: int) -> dict[bool, Moments]:
        return {held_out: Moments(inputs, targets, self.device) for held_out in (False, True)}

    def _refit(
        self,
        names: Sequence[str],
        layer: int | None,
        cut: Weights,
        moments: dict[bool, Moments],
        target: Weights,
        squares: Tensor | None = None,
    ) -> None:
        """Put into `cut` the weights of these names that fit best; `target` has the parent's, of those that read.

        What weights that write miss is compared with the `squares` of the hidden states that they complete.
        """
        for sums in moments.values():
            self.text.add_up(sums.inputs, sums.cross, sums.targets)
            if not math.isfinite(float(sums.inputs.trace() + sums.targets.trace())):
                where = "after the layers" if layer is None else f"in layer {layer}"
                raise ValueError(
                    f"{self.parent.path} gives NaN or infinite numbers on this text, at {names[0]} {where}"
                )
        if squares is not None:
            self.text.add_up(squares)
        solver = LeastSquares(moments[False], moments[True], self.options.ridge)
        for name in names if self.refits else ():
            fit = solver.fit(cut[name], target.get(name))
            cut[name] = self._stored(name, layer, fit.weight)
            wanted = fit.wanted if squares is None else (float(squares[0]), float(squares[1]))
            self.fits[name] = replace(fit, weight=cut[name], wanted=wanted)

    def _read(
        self, norm: str, layer: int | None, target: Weights, cut: Weights, parent_states: str, pruned_states: str
    ) -> None:
        """Scale a norm's gain for the smaller hidden size, and refit the weights that read it."""
        whole, kept = self.parent.config.hidden_size, self.config.hidden_size
        moments, share = self._moments(kept, whole), self._zeros(2)
        for stretch in self.text.stretches():
            x, z = (self.states.get(name, stretch.number) for name in (parent_states, pruned_states))
            inputs = rms_norm(z, (kept,), cut[norm], self.epsilon)
            moments[stretch.held_out].add(inputs, rms_norm(x, (whole,), target[norm], self.epsilon))
            if kept < whole and not stretch.held_out:
                normed = rms_norm(x, (whole,), None, self.epsilon)
                squares = self.basis.project(normed).double().square()
                share[0] += squares.mean(-1).sum()
                share[1] += squares[..., 0].numel()
        self.text.add_up(share)
        # RMSNorm averages over fewer channels: with this factor what is kept comes out as large as in the parent.
        factor = math.sqrt(float(share[0] / share[1])) if kept < whole else 1.0
        scaled = self._stored(norm, layer, cut[norm] * factor)
        for sums in moments.values():
            sums.scale_inputs(factor)
        cut[norm] = scaled
        self._refit([name for name in READERS[norm] if name in cut], layer, cut, moments, target)

    def _attend(self, layer: int, cut: Weights, states: str) -> None:
        """Bring both models' states beyond attention, and refit the weight that writes its output."""
        moments, squares = self._moments(cut["o"].shape[1], self.config.hidden_size), self._zeros(2)
        for stretch in self.text.stretches():
            x, z = (self.states.get(f"{who}{states}", stretch.number) for who in ("parent", "pruned"))
            mixed, _ = self.pruned_layer.attend(z)
            _, middle = self.parent_layer.attend(x)
            whole = self.basis.project(middle)
            moments[stretch.held_out].add(mixed, whole - z)
            squares[int(stretch.held_out)] += whole.double().square().sum()
            self.states.put("parent.middle", stretch.number, middle)
            self.states.put("pruned.mixed", stretch.number, mixed)
        self._refit(("o",), layer, cut, moments, {}, squares)
        self.pruned_layer.load({"o": cut["o"]})
        for stretch in self.text.stretches():
            z = self.states.get(f"pruned{states}", stretch.number)
            mixed = self.states.get("pruned.mixed", stretch.number)
            self.states.put("pruned.middle", stretch.number, self.pruned_layer.add_mixed(z, mixed))

    def _feed(self, layer: int, cut: Weights, states: str) -> None:
        """Refit what writes the output of the feed-forward block, and bring the pruned model's states beyond it."""
        moments, squares = self._moments(cut["down"].shape[1], self.config.hidden_size), self._zeros(2)
        for stretch in self.text.stretches():
            x, z = (self.states.get(name, stretch.number) for name in (f"parent{states}", "pruned.middle"))
            whole = self.basis.project(x)
            moments[stretch.held_out].add(self.pruned_layer.feed(z)[0], whole - z)
            squares[int(stretch.held_out)] += whole.double().square().sum()
        self._refit(("down",), layer, cut, moments, {}, squares)
        self.pruned_layer.load({"down": cut["down"]})
        for stretch in self.text.stretches():
            z = self.states.get("pruned.middle", stretch.number)
            self.states.put(f"pruned{states}", stretch.number, self.pruned_layer.feed(z)[1])

    def _rotation(self) -> Tensor:
        """Read the text through the parent, and return the basis of its hidden states."""
        hidden = self.parent.config.hidden_size
        seen, readers = self._zeros(hidden, hidden), self._zeros(hidden, hidden)

        def see(states: Tensor) -> None:
            normed = rms_norm(states, (hidden,), None, self.epsilon).flatten(0, -2)
            seen.add_(normed.T @ normed)

        self._embed("parent")
        for layer in range(self._parent_layers):
            weights = layer_of(self.parent, layer, self.dtype, self.device)
            self.parent_layer.load(weights)
            for norm in ("attn_norm", "mlp_norm"):
                for name in READERS[norm]:
                    folded = weights[name] * weights[norm]
                    readers += folded.T @ folded
            for stretch in self.text.stretches():
                states = self.states.get("parent.0", stretch.number)
                _, middle = self.parent_layer.attend(states)
                _, after = self.parent_layer.feed(middle)
                if not stretch.held_out:
                    see(states)
                    see(middle)
                self.states.put("parent.0", stretch.number, after)
        for stretch in self.text.stretches(held_out=False):
            see(self.states.get("parent.0", stretch.number))
        self.text.add_up(seen)
        return self.text.from_first(rotation(seen, readers, self.config.hidden_size))


def loss_of(checkpoint: Checkpoint, text: Text, states: States, progress: Progress) -> float:
    """Return a model's mean loss in nats on what is held out, one layer at a time; `progress` counts these."""
    tokens = {stretch.number: text.tokens(stretch) for stretch in text.stretches(held_out=True)}
    portions = {number: (some, torch.ones_like(some[:, 1:], dtype=torch.bool)) for number, some in tokens.items()}
    total = loss_sums(checkpoint, portions, states, states.dtype, progress)
    text.add_up(total)
    return float(total[0] / total[1])
