"""What the tests share: tiny models made by transformers, what is done with them, and how programs are run."""

import argparse
import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import torch
from model_shapes import SHAPES
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import prune_llama
from megatron.pruning.formats import open_checkpoint, save_checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.plan import Plan

# Models --------------------------------------------------------------------------------------------------------------


def make_llama(
    path: Path,
    shape: str | dict[str, Any] = "gqa",
    layers: int = 4,
    dtype: torch.dtype = torch.float32,
    vocab: int = 101,
    seed: int = 0,
    **save: Any,
) -> Path:
    """Save a random Llama, its norms' gains random too, as Hugging Face does it.

    `shape` is one of SHAPES or fields of a config.json; `save` goes to save_pretrained.
    """
    torch.manual_seed(seed)
    fields = {"model_type": "llama", "max_position_embeddings": 64, "rms_norm_eps": 1e-4}
    fields |= SHAPES[shape] if isinstance(shape, str) else shape
    config = AutoConfig.for_model(num_hidden_layers=layers, vocab_size=vocab, **fields)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = 1.0 if "norm" in name else 0.0
            parameter.copy_(gain + 0.15 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(path, **save)
    return path


def as_bin(path: Path, **more: torch.Tensor) -> Path:
    """Replace the model.safetensors of a directory by a pytorch_model.bin, with more tensors in it."""
    torch.save(load_file(path / "model.safetensors") | more, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


def set_config(**values: Any) -> Callable[[Path], None]:
    """Return a function that changes the config.json of a directory; None removes a field."""

    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | values
        config = {key: value for key, value in config.items() if value is not None}
        (path / "config.json").write_text(json.dumps(config))

    return apply


def hf_logits(path: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the logits of LlamaForCausalLM, [batch, sequence, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens).logits


def hf_loss(path: Path, tokens: np.ndarray) -> float:
    """Return the mean loss of LlamaForCausalLM, in fp32, on one sequence."""
    sequence = torch.from_numpy(tokens.astype(np.int64))[None]
    return float(torch.nn.functional.cross_entropy(hf_logits(path, sequence[:, :-1])[0], sequence[0, 1:]))


def write_documents(prefix: Path, *documents: np.ndarray) -> None:
    """Write tokens as Megatron's own builder writes them: `prefix`.bin and `prefix`.idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # takes seconds

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


def write_repeated(prefix: Path, sample: np.ndarray, times: int) -> None:
    """Write a text of which every window is the same sample; the token after it is its first."""
    write_documents(prefix, np.append(np.tile(sample, times), sample[0]))


# Checkpoints ---------------------------------------------------------------------------------------------------------


def convert(
    source: Path, target: Path, format: str = "torch", tensor: int = 1, pipeline: int = 1, **options: Any
) -> Path:
    """Convert a checkpoint, and return the target; `layout` may be given instead of its two sizes."""
    layout = options.pop("layout", Layout(tensor, pipeline))
    save_checkpoint(open_checkpoint(source), target, format=format, layout=layout, **options)
    return target


def prune(source: Path, target: Path, *flags: str) -> Path:
    """Prune a checkpoint by the flags of prune_llama.py, to torch unless they name a format, and return the target."""
    named = any(flag.startswith("--format") for flag in flags)
    prune_llama.main(["--load", str(source), "--save", str(target), *flags, *([] if named else ["--format=torch"])])
    return target


def plan_of(path: Path) -> Plan:
    """Return the plan by which a checkpoint was pruned."""
    return Plan.from_json((path / "prune_plan.json").read_text(), str(path))


def sliced(state: dict[str, torch.Tensor], plan: Plan, head_dim: int) -> dict[str, torch.Tensor]:
    """Prune a Hugging Face state dict weight by weight, name by name: what the project derives from its table."""

    def rows(heads: np.ndarray) -> torch.Tensor:
        return torch.tensor([h * head_dim + i for h in heads.tolist() for i in range(head_dim)])

    hidden, out = torch.tensor(plan.hidden), {}
    for new, old in enumerate(plan.layers.tolist()):
        heads, groups, ffn = rows(plan.heads[new]), rows(plan.groups[new]), torch.tensor(plan.ffn[new])
        for name, (first, second) in {
            "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (groups, hidden),
            "self_attn.v_proj": (groups, hidden), "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
        }.items():  # fmt: skip
            out[f"model.layers.{new}.{name}.weight"] = state[f"model.layers.{old}.{name}.weight"][first][:, second]
        vectors = {"q_proj.bias": heads, "k_proj.bias": groups, "v_proj.bias": groups}
        for name, kept in {**vectors, "q_norm.weight": slice(None), "k_norm.weight": slice(None)}.items():
            if (key := f"model.layers.{old}.self_attn.{name}") in state:
                out[f"model.layers.{new}.self_attn.{name}"] = state[key][kept]
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"model.layers.{new}.{name}.weight"] = state[f"model.layers.{old}.{name}.weight"][hidden]
    out["model.norm.weight"] = state["model.norm.weight"][hidden]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            out[name] = state[name][:, hidden]
    return out


# What is in files ----------------------------------------------------------------------------------------------------


def digests(top: Path) -> dict[str, str]:
    """Return the digest of every file under a directory, by its relative name."""
    files = sorted(path for path in top.rglob("*") if path.is_file())
    return {str(path.relative_to(top)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a directory of safetensors, read by their own library."""
    return {key: value for file in sorted(path.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Assert that two state dicts have the same names, dtypes, shapes and bits."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (found[name], value))), name


# What the rank files of Megatron-LM hold beside tensors and plain values.
_NUMPY_RECONSTRUCT: Any = np.ndarray(0).__reduce__()[0]
PLAIN_CLASSES: list[Any] = [
    argparse.Namespace,
    signal.Signals,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *((_NUMPY_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
MEGATRON_CLASSES = {
    "megatron.core.enums.ModelType",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
}


def load_whole(path: Path) -> dict[str, Any]:
    """Return all that a rank file holds, with the real classes of megatron, fit to be changed and saved again."""
    named = MEGATRON_CLASSES.intersection(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    with torch.serialization.safe_globals([*PLAIN_CLASSES, *map(locate, sorted(named))]):
        return torch.load(path, weights_only=True)


def rank_file(path: Path, name: str) -> Path:
    """Return the path of a rank file, e.g. of mp_rank_00."""
    return path / "release" / name / "model_optim_rng.pt"


def rewritten(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return a function that changes the content of one rank file of a checkpoint."""

    def apply(path: Path) -> None:
        content = load_whole(rank_file(path, name))
        change(content)
        torch.save(content, rank_file(path, name))

    return apply
