"""A checkpoint as the rest of the project sees it: a config and logical weights that are pulled one at a time."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.lineage import LINEAGE_FILE, Lineage, read_lineage
from megatron.pruning.model.weights import WeightRow, all_weights
from megatron.pruning.storage.small_files import as_json, read_small
from megatron.pruning.storage.views import View

SAMPLED_ROWS = 8  # of a matrix, by which a model is told from another
PLAN_FILE = "prune_plan.json"  # lies beside the weights of a pruned checkpoint

# Files that travel with a model beside its weights and its config.json: data and texts, never a program.
_CARRIED = re.compile(
    r"(?:tokenizer|tekken|vocab|merges|added_tokens|special_tokens_map|generation_config|chat_template|spiece"
    r"|sentencepiece)[\w.-]*\.(?:json|model|txt|jinja|tiktoken|bpe)(?:\.v\d+)?|additional_chat_templates/[\w.-]+\.jinja"
    r"|(?:LICENSE|USE_POLICY|NOTICE)[\w-]*(?:\.(?:txt|md))?|merges|vocab"
    rf"|{re.escape(LINEAGE_FILE)}"
)
# Settings of a carried JSON file that have a reader run code, or fetch it.
_RUNS_CODE = ("auto_map",)


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
    declared_dtype: str | None = None  # of the whole model, as its config.json has it
    left_behind: tuple[str, ...] = ()  # settings of its config.json that name code, which does not go on
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

    @property
    def training_layout(self) -> Layout:
        """The layout that a training of it has unless told otherwise."""
        return self.layout or Layout()

    def weights(self) -> Iterator[tuple[WeightRow, int | None, View]]:
        """Yield every logical weight in the order of the forward pass."""
        for weight, layer in all_weights(self.config.num_layers, self.config.tied, self.config.features):
            yield weight, layer, self.weight(weight, layer)

    @property
    def lineage(self) -> Lineage:
        """Where the model comes from. Raises ValueError where the file that should say it says something else."""
        return read_lineage(self.tokenizer_folder)

    def carried_files(self) -> dict[str, bytes]:
        """Return the tokenizer and other small files that go with the model, by name."""
        files, lineage = carried_files_of(self.tokenizer_folder, self.root), self.lineage
        return files if lineage == Lineage() else files | {LINEAGE_FILE: lineage.to_json()}

    @property
    def dtype(self) -> str:
        """The dtype that the model declares, if it has weights of it; else that of the embedding stands for it."""
        dtypes = [view.dtype for _, _, view in self.weights()]
        return self.declared_dtype if self.declared_dtype in dtypes else dtypes[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all logical weights."""
        return sum(view.nbytes for _, _, view in self.weights())

    def __str__(self) -> str:
        where = f" {self.layout}" if self.layout else ""
        return f"{self.path} ({self.format}{where}, {self.dtype}, {self.config.parameters:,} parameters)"


def kept_plan(directory: Path) -> dict[str, bytes]:
    """Return the plan beside a checkpoint's weights under its name, or nothing.

    Raises ValueError for a link that leads out of the checkpoint.
    """
    plan = directory / PLAN_FILE
    if not plan.is_file():
        return {}
    require_inside(plan, directory)
    return {PLAN_FILE: read_small(plan)}


def carried_files_of(directory: Path, home: Path | None = None) -> dict[str, bytes]:
    """Return the tokenizer's and the licence's files of `directory`, by name, without what has a reader run code.

    `home` is the directory of the checkpoint, where that is another.

    Raises ValueError for a link that leads out of the checkpoint, and for a file that is something else by content.
    """
    found = {}
    for path in sorted((*directory.glob("*"), *directory.glob("additional_chat_templates/*"))):
        name = path.relative_to(directory).as_posix()
        if _CARRIED.fullmatch(name) and path.is_file():
            require_inside(path, home or directory)
            found[name] = _as_carried(name, read_small(path))
            if not found[name] or (name.endswith((".json", ".model")) and found[name].lstrip()[:1] == b"<"):
                what = "a web page" if found[name] else "empty"
                raise ValueError(f"{path} is {what}, not the file that its name says: fetch it again, or remove it")
    return found


def require_inside(path: Path, directory: Path) -> None:
    """Raise ValueError unless a file of a checkpoint lies in its `directory`, or in the hub's cache that it is of."""
    target, home = path.resolve(), directory.resolve()
    homes = [home] + [home.parents[1] / "blobs"] * (len(home.parents) > 1 and home.parent.name == "snapshots")
    if not any(target.is_relative_to(place) for place in homes):
        raise ValueError(f"{path} is a link to {target}, outside of its checkpoint: it is not carried along")


def _as_carried(file: str, content: bytes) -> bytes:
    """Return a carried file's content: a tokenizer's settings name no code, and are spelled as transformers 4 does.

    Transformers 5 reads both spellings, 4 only its own. What needs no change keeps its bytes.
    """
    if file != "tokenizer_config.json":
        return content
    try:
        values = json.loads(content)
    except ValueError:
        return content
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply") from None
    if not isinstance(values, dict):
        return content
    spelled = {name: value for name, value in values.items() if name not in _RUNS_CODE}
    if spelled.get("tokenizer_class") == "TokenizersBackend":
        spelled["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(spelled.get("extra_special_tokens"), list):
        spelled.setdefault("additional_special_tokens", spelled.pop("extra_special_tokens"))
    return content if spelled == values else as_json(spelled)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return 16 hex digits that tell models of one shape apart, the same in every format and layout.

    Digests the shape, the constants, all of each norm and bias, and of each matrix rows from all over it, a hundred MB
    of the largest model: what training or an edit of a whole weight changes is found, a single changed row may not be.
    """
    config = checkpoint.config
    digest = hashlib.sha256(json.dumps({**config.sizes, **config.constants}, sort_keys=True).encode())
    for number, (_, _, view) in enumerate(checkpoint.weights()):
        rows = np.arange(view.shape[0])
        if len(view.shape) > 1 and len(rows) > SAMPLED_ROWS:
            # Evenly spread, and others in each weight.
            rows = (rows[:SAMPLED_ROWS] * len(rows) // SAMPLED_ROWS + number) % len(rows)
        digest.update(view.dtype.encode() + view.read(np.sort(rows)).tobytes())
    return digest.hexdigest()[:16]
