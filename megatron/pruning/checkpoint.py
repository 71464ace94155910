"""A checkpoint as the rest of the project sees it: a config and logical weights that are pulled one at a time."""

import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron.pruning.config import LlamaConfig
from megatron.pruning.layout import Layout
from megatron.pruning.table import Weight, all_weights
from megatron.pruning.views import BYTES, Stored, View

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
# Of each of them; the largest tokenizers have 40 MB.
MAX_CARRIED_BYTES = 100_000_000


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
    vocab_is_known: bool = True  # False: `config.vocab_size` may count rows of padding

    @abstractmethod
    def weight(self, weight: Weight, layer: int | None) -> View:
        """Return a lazy view of one logical weight; `layer` is None for the weights outside the layers."""

    def boundaries(self, axis: str, layer: int, tensor: int) -> list[int]:
        """Return where the `tensor` ranks' blocks of `axis` begin and end in `layer`: even unless pruned otherwise."""
        size = self.config.sizes[axis]
        return [size * rank // tensor for rank in range(tensor + 1)]

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError unless this model can be cut to `layout`."""
        layout.check_split(self.config.sizes, "the model's")
        layout.check_stages(self.config.sizes, "the model's")

    def weights(self) -> Iterator[tuple[Weight, int | None, View]]:
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


def read_small(path: Path, limit: int = MAX_CARRIED_BYTES) -> bytes:
    """Return the content of a file that should be small. Raises ValueError when it has more than `limit` bytes."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: more than {limit:,} is no such file")
    return content


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError, naming `what`, for anything else, also for a name that is in it twice.

    Python reads more than JSON: NaN and infinities, which other readers would refuse in what is written of them.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it holds {next(name for name in names if names.count(name) > 1)!r} twice")
        return found

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:40]} is not a number of JSON")
        return value

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text, and could not be written
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds {type(value).__name__}, not an object")
    return value


def check_tensor(where: str, key: str, view: View, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless a stored tensor has the shape that the config implies."""
    if view.shape != expected:
        raise ValueError(f"{where}: {key} has shape {view.shape}, but the model's config implies {expected}")


def check_apart(tensors: Iterable[tuple[str, View]]) -> None:
    """Raise ValueError when two of the tensors that lie in files share bytes: an offset is wrong then."""
    places = [
        (str(view.file.path), view.offset, view.offset + view.nbytes, key)
        for key, view in tensors
        if isinstance(view, Stored)
    ]
    for before, after in itertools.pairwise(sorted(places)):
        if before[0] == after[0] and after[1] < before[2]:
            raise ValueError(f"{before[0]}: {before[3]} and {after[3]} share bytes from {after[1]} on")


def check_keys(where: str, found: set[str], expected: set[str]) -> None:
    """Raise ValueError, naming a few, when tensors are missing or unexpected."""
    for problem, keys in (("lacks", expected - found), ("holds unexpected", found - expected)):
        if keys:
            names = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"{where} {problem} tensors: {names}")
