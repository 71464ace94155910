"""Other ways to a smaller Llama without training, beside which benchmarks/reconstruction.py stands.

    python benchmarks/other_ways.py WAY --load PARENT --data PREFIX --valid english=PREFIX code=PREFIX --json FILE

`slicegpt` is SliceGPT, written anew after its description (arXiv 2401.15024): each block has a rotation of its own, by
the principal components of its inputs on the text, so that there is a matrix in each skip connection, two a layer; the
ffn stays, and so does the input of the output layer. `minitron` is nvidia-modelopt's pruning of Megatron's model by
activations (arXiv 2407.14679), which wants TransformerEngine's layers: on a CPU the tests' stand-in gives them.
`--packages` is a folder with it:

    pip install --no-deps --target FOLDER nvidia-modelopt==0.47.0 "pulp<3" omegaconf antlr4-python3-runtime==4.9.3 \\
        nvidia-ml-py rich pydantic pydantic_core annotated_types typing_inspection scipy ninja markdown-it-py mdurl

The result is JSON: `parameters`, and the perplexity on each text.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from experiment import ROOT
from torch import Tensor

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.training.tokens import windows

Model = Callable[[Tensor], Tensor]  # tokens [length + 1] to the loss of each but the first, in nats


class SliceGpt:
    """A transformers model with a rotation in each block; its linear layers hold the rotated weights."""

    def __init__(self, parent: Checkpoint, texts: Sequence[Tensor], hidden: int) -> None:
        from megatron.pruning.training import hf_model

        self.llama: Any = hf_model.build(parent, "fp32", "cpu")
        self.whole, self.epsilon = parent.config.hidden_size, parent.config.norm_epsilon
        self.skips: list[tuple[Tensor, Tensor]] = []
        body, head = self.llama.model, self.llama.lm_head
        states = [body.embed_tokens(tokens[:-1]) for tokens in texts]
        basis = principal_components(states)[:, :hidden]
        self.embedding = body.embed_tokens.weight @ basis
        for number, layer in enumerate(body.layers):
            attention, mlp = layer.self_attn, layer.mlp
            self._read((attention.q_proj, attention.k_proj, attention.v_proj), layer.input_layernorm, basis)
            states = [x @ basis for x in states]
            middle = [x @ basis.T + self._attend(layer, x) for x in states]
            between = principal_components(middle)[:, :hidden]
            attention.o_proj.weight.data = between.T @ attention.o_proj.weight
            self._read((mlp.gate_proj, mlp.up_proj), layer.post_attention_layernorm, between)
            # The next block is given what this one makes of states that were cut in between.
            middle = [x @ (basis.T @ between) + self._attend(layer, x) for x in states]
            states = [x @ between.T + mlp(self._normed(x)) for x in middle]
            last = number + 1 == len(body.layers)
            after = principal_components(states)[:, : None if last else hidden]
            mlp.down_proj.weight.data = after.T @ mlp.down_proj.weight
            self.skips.append((basis.T @ between, between.T @ after))
            basis = after
        self.head = head.weight * body.norm.weight @ basis

    def _read(self, linears: Sequence[Any], norm: Any, basis: Tensor) -> None:
        for linear in linears:
            linear.weight.data = linear.weight * norm.weight @ basis

    def _normed(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.whole + self.epsilon)

    def _attend(self, layer: Any, x: Tensor) -> Tensor:
        places = self.llama.model.rotary_emb(x[None], torch.arange(len(x))[None])
        found: Tensor = layer.self_attn(self._normed(x)[None], position_embeddings=places, attention_mask=None)[0][0]
        return found

    def __call__(self, tokens: Tensor) -> Tensor:
        x = self.embedding[tokens[:-1]]
        for layer, (first, second) in zip(self.llama.model.layers, self.skips, strict=True):
            x = x @ first + self._attend(layer, x)
            x = x @ second + layer.mlp(self._normed(x))
        logits = self._normed(x) @ self.head.T
        return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")

    @property
    def parameters(self) -> int:
        """Of all matrices, those of the skip connections among them; the norms have none."""
        layers = sum(
            weight.numel() for name, weight in self.llama.model.layers.named_parameters() if "norm" not in name
        )
        return layers + self.embedding.numel() + self.head.numel() + sum(a.numel() + b.numel() for a, b in self.skips)


def principal_components(states: Sequence[Tensor]) -> Tensor:
    """Return the eigenvectors of the second moment of states `[tokens, hidden]`, the largest first."""
    moment = sum(x.double().T @ x.double() for x in states)
    assert isinstance(moment, Tensor)
    moment += 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    return torch.linalg.eigh(moment).eigenvectors.flip(-1).to(states[0])


class Minitron:
    """Megatron's model of TransformerEngine's layers, pruned by nvidia-modelopt."""

    def __init__(self, parent: Checkpoint, texts: Sequence[Tensor], hidden: int, ffn: int) -> None:
        self.model = self._engine_model(parent)
        import modelopt.torch.prune as pruning  # wants all of the above
        from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config

        mode = get_mcore_minitron_config(hidden_size_divisor=2, ffn_hidden_size_divisor=2, num_layers_divisor=1)
        pruning.prune(
            self.model,
            mode=[("mcore_minitron", mode)],
            constraints={"export_config": {"hidden_size": hidden, "ffn_hidden_size": ffn}},
            dummy_input=None,
            config={"forward_loop": lambda model: [self(tokens) for tokens in texts]},
        )

    def _engine_model(self, parent: Checkpoint) -> Any:
        from megatron.pruning.training import cpu_device

        sys.path.insert(0, str(ROOT / "tests" / "te_stand_in"))
        import transformer_engine  # noqa: F401 - before it is hidden for want of a GPU

        cpu_device.install()
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training.models.gpt import GPTModelBuilder, default_layer_spec

        from megatron.pruning.formats.megatron import rank_views
        from megatron.pruning.model.layout import Layout
        from megatron.pruning.training import stock_model

        layout = Layout(1, 1, parent.config.vocab_size)
        stock_model.join(layout)
        config = stock_model.watched_model(parent.config, layout, "fp32")
        config.transformer.transformer_impl = "transformer_engine"
        config.transformer_layer_spec = default_layer_spec
        model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()
        stock_model.load_weights(model, rank_views(parent, layout, 0, 0))
        return model

    def __call__(self, tokens: Tensor) -> Tensor:
        places = torch.arange(len(tokens) - 1)[None]
        found: Tensor = self.model(tokens[None, :-1], places, None, labels=tokens[None, 1:])
        return found[0]

    @property
    def parameters(self) -> int:
        """Of the model, a tied embedding once."""
        return sum(weight.numel() for weight in self.model.parameters())


@torch.no_grad()
def main() -> None:
    """Prune, measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("slicegpt", "minitron"))
    parser.add_argument("--load", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="PREFIX", help="text to learn from")
    parser.add_argument("--sequences", type=int, default=48, metavar="N")
    parser.add_argument("--sequence-length", type=int, default=512, metavar="S")
    parser.add_argument("--hidden-size", type=int, required=True, metavar="H")
    parser.add_argument("--ffn-hidden-size", type=int, metavar="F")
    parser.add_argument("--valid", nargs="+", required=True, metavar="NAME=PREFIX", help="texts to measure on")
    parser.add_argument("--valid-sequences", type=int, default=24, metavar="N")
    parser.add_argument("--packages", type=Path, metavar="DIR")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    if (args.way == "minitron") != (args.ffn_hidden_size is not None):
        parser.error("--ffn-hidden-size goes with minitron, which cuts the ffn, and with it alone")
    if args.packages:
        sys.path.append(str(args.packages))
    parent = open_checkpoint(args.load)
    tokens = windows(args.data, args.sequence_length, args.sequences, parent, spread=True)
    texts = [torch.from_numpy(window) for window in tokens]
    if args.way == "slicegpt":
        model: SliceGpt | Minitron = SliceGpt(parent, texts, args.hidden_size)
    else:
        model = Minitron(parent, texts, args.hidden_size, args.ffn_hidden_size)
    found: dict[str, float] = {"parameters": model.parameters}
    for name, prefix in (text.split("=", 1) for text in args.valid):
        valid = windows(Path(prefix), args.sequence_length, args.valid_sequences, parent, spread=True)
        losses = [float(model(torch.from_numpy(window)).double().mean()) for window in valid]
        found[name] = round(math.exp(sum(losses) / len(losses)), 2)
    args.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
