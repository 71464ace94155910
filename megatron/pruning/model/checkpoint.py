"""A checkpoint as the rest of the project sees it: a config and logical weights that are pulled one at a time."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.weights import WeightRow, all_weights
from megatron.pruning.storage.dtypes import BYTES
from megatron.pruning.storage.small_files import read_small
from megatron.pruning.storage.views import View

PLAN_FILE = "prune_plan.json"  # lies beside the weights of a pruned checkpoint

# Files that travel with a model beside its weights and its config.json.
CARRIED_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)


class Checkpoint(ABC):
    """A dense Llama on disk, or a pruned view of one.

    `weight` gives the logical weight: unfused, unsplit, without vocabulary padding, shaped as the table says.
    """

    path: Path  # as the user named it
    root: Path  # where the small files lie
    files: list[Path]  # of the weights
    format: str
    layout: Layout | None
    config: LlamaConfig
    transformer_impl: str = "local"  # whose layers a Megatron `torch` checkpoint was saved from
    has_optimizer: bool = False  # which is never carried on
    tokenizer_folder: Path  # where the tokenizer's files are, if there are any
    vocab_is_known: bool = True  # False: `config.vocab_size` may count rows of padding

    @abstractmethod
    def weight(self, weight: WeightRow, layer: int | None) -> View:
        """Return a lazy view of one logical weight; `layer` is None for the weights outside the layers."""

    def boundaries(self, axis: str, layer: int, tensor: int) -> list[int]:
        """Return where the `tensor` ranks' blocks of `axis` begin and end in `layer`: even unless pruned otherwise."""
        size = self.config.sizes[axis]
        return [size * rank // tensor for rank in range(tensor + 1)]

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError unless this model can be cut to `layout`."""
        layout.check_split(self.config.sizes, "the model's")
        layout.check_stages(self.config.sizes, "the model's")

    def weights(self) -> Iterator[tuple[WeightRow, int | None, View]]:
        """Yield every logical weight in the order of the forward pass."""
        for weight, layer in all_weights(self.config.num_layers, self.config.tied, self.config.features):
            yield weight, layer, self.weight(weight, layer)

    def carried_files(self) -> dict[str, bytes]:
        """Return the tokenizer and other small files that go with the model, by name."""
        return {}

    @property
    def dtype(self) -> str:
        """The dtype of the embedding, which stands for the model's."""
        return next(self.weights())[2].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all logical weights."""
        return sum(int(np.prod(view.shape)) * BYTES[view.dtype] for _, _, view in self.weights())

    def __str__(self) -> str:
        where = f" {self.layout}" if self.layout else ""
        return f"{self.path} ({self.format}{where}, {self.dtype}, {self.config.parameters:,} parameters)"


def carried_files_of(directory: Path) -> dict[str, bytes]:
    """Return the files of `directory` that `CARRIED_PATTERNS` name."""
    found = sorted({path for pattern in CARRIED_PATTERNS for path in directory.glob(pattern) if path.is_file()})
    return {path.name: read_small(path) for path in found}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return 16 hex digits that tell models of one shape apart, the same in every format and layout.

    Digests the first row of every weight: a few MB even of the largest model.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config.sizes, sort_keys=True).encode())
    for _, _, view in checkpoint.weights():
        digest.update(view.dtype.encode() + view.read(np.zeros(1, dtype=np.intp)).tobytes())
    return digest.hexdigest()[:16]
