"""Which pickles may be given to readers that run them: Python's own, inside of Megatron and torch.

A pickle is a program. This project's own reader (pickles.py) only looks, so that any class may be named to it; but the
stock training loop unpickles `.metadata`, the bytes objects of torch_dist and the extra states of TransformerEngine
with Python's unpickler, which calls what they name. So before it is given a checkpoint, every pickle in it is read as
data, and may name nothing but what Megatron and torch themselves write there.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.pruning.storage.dcp_file import METADATA, read_metadata
from megatron.pruning.storage.pickles import NotDataError, Record, names_in
from megatron.pruning.storage.small_files import read_small
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.torch_reader import MAX_HEADER_BYTES, Tensor, Window, load_torch, pickle_of

# What unpickling may call or name: it makes plain values, arrays, tensors and members of enumerations.
_HARMLESS = re.compile(
    "|".join(
        (
            r"(?:builtins|__builtin__)\.(?:set|frozenset|bytearray|complex|slice|range|object)",
            r"_codecs\.encode|_io\.BytesIO|argparse\.Namespace|collections\.(?:OrderedDict|deque)|signal\.Signals",
            r"pathlib(?:\._local)?\.(?:Pure)?(?:Posix)?Path",
            r"numpy\.(?:ndarray|dtype)|numpy\.(?:_core|core)\.multiarray\.(?:_reconstruct|scalar)|numpy\.dtypes\.\w+DType",
            r"numpy\._?core\.numeric\._frombuffer|numpy\.(?:bool_?|u?int\d+|float\d+)",
            r"torch\.(?:\w+Storage|Size|device|dtype|bool|b?float\d+\w*|u?int\d+|complex\d+|strided)",
            r"torch\._utils\._rebuild_(?:tensor|tensor_v2|parameter|parameter_with_state)|torch\.storage\.(?:Untyped|Typed)Storage",
            r"torch\.serialization\._get_layout|torch\._tensor\._rebuild_from_type_v2|torch\.(?:Tensor|nn\.parameter\.Parameter)",
            r"torch\.distributed\.checkpoint\.filesystem\.(?:_StorageInfo|_StoragePrefix)",
            r"torch\.distributed\.checkpoint\.metadata\.(?:Metadata|MetadataIndex|StorageMeta|TensorProperties"
            r"|TensorStorageMetadata|BytesStorageMetadata|ChunkStorageMetadata|_MEM_FORMAT_ENCODING)",
            r"torch\.distributed\.checkpoint\.planner\.(?:SavePlan|WriteItem|WriteItemType|TensorWriteData)",
            r"megatron\.core\.dist_checkpointing\.strategies\.torch\.MCore(?:Metadata|SavePlan)",
            r"megatron\.core\.(?:transformer\.)?enums\.[A-Z]\w*",
            r"megatron\.core\.rerun_state_machine\.(?:RerunDiagnostic|RerunMode|RerunState)",
            r"transformer_engine\.common\.recipe\.(?:_FormatHelper|Format|DelayedScaling)",
        )
    )
)
_EXTRA_STATE = "_extra_state"  # in the name of a state that TransformerEngine unpickles a second time


def require_harmless(folder: Path) -> None:
    """Look into every pickle of the weights in `folder`, of whatever format of Megatron.

    Raises ValueError, naming the file, when one names anything that could do more than make a value, or is damaged.
    """
    if (folder / METADATA).is_file():
        _check(folder / METADATA, read_small(folder / METADATA, MAX_HEADER_BYTES))
        entries = read_metadata(folder)
        for path in sorted({chunk.path for entry in entries.values() for chunk in entry.chunks.values()}):
            if not path.is_file():  # a pipe would be waited for without end
                raise ValueError(f"{folder / METADATA} names {path.name}, which is not there or is no file")
        for name, entry in entries.items():
            if entry.shape is None or _EXTRA_STATE in name:  # tensors are never unpickled: torch reads their bytes
                for chunk in entry.chunks.values():
                    _check_saved(Window(File(chunk.path), chunk.start, chunk.length), name)
    for path in sorted(folder.rglob("*.pt")):
        _check_saved(Window(File(path)), "")


def _check_saved(window: Window, name: str) -> None:
    """Check a file of torch.save, and what in it is unpickled later: all of it, if it is called an extra state."""
    path = window.file.path
    _check(path, pickle_of(path, window))
    for inner in _pickles_within(load_torch(window), _EXTRA_STATE in name):
        if inner.startswith(b"PK\3\4"):
            inner = pickle_of(path, io.BytesIO(inner))
        _check(path, inner)


def _pickles_within(content: Any, is_extra: bool) -> Iterator[bytes]:
    """Yield the bytes in extra states. What is in several places is looked into once: it may be nested in itself."""
    waiting, seen = [(content, is_extra)], set[tuple[int, bool]]()
    while waiting:
        value, is_extra = waiting.pop()
        if (id(value), is_extra) in seen:
            continue
        seen.add((id(value), is_extra))
        if isinstance(value, dict):
            waiting += [(item, is_extra or _EXTRA_STATE in str(key)[:1000]) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(item, is_extra) for item in value]
        elif isinstance(value, Record) and not (is_extra and value.name == "_codecs.encode"):
            waiting += [(item, is_extra) for item in (*value.args, value.state)]
        elif is_extra and isinstance(value, Record):  # bytes, as protocol 2 has them
            yield str(value.args[0]).encode("latin1")
        elif is_extra and isinstance(value, bytes | bytearray | Tensor):
            if raw := value.raw() if isinstance(value, Tensor) else bytes(value):
                yield raw


def _check(path: Path, raw: bytes) -> None:
    try:
        for name in sorted(names_in(raw)):
            if not _HARMLESS.fullmatch(name):
                raise NotDataError(f"it names {name}"[:200])
    except NotDataError as error:
        raise ValueError(f"{path} holds more than data and was not loaded: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
