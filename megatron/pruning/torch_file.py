"""Files of torch.save: read safely and lazily, and laid out first to be filled in place.

A checkpoint is data. Loading goes through torch's weights-only unpickler with an allow-list of the plain classes that
Megatron checkpoints hold; where a class belongs to megatron itself an inert stand-in takes its place, so megatron need
not be importable and nothing of it runs. Tensors load on the meta device, which reads no data but tells where it lies.
"""

import argparse
import io
import os
import pickle
import signal
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.pruning.output import OutputFile
from megatron.pruning.views import TORCH_NAMES, File, Stored, View

DTYPES = {getattr(torch, name): dtype for dtype, name in TORCH_NAMES.items()}


class _StandIn:
    """Takes the place of a class of megatron inside a checkpoint: holds what it is given and does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state


MEGATRON_CLASSES = (
    "megatron.core.enums.ModelType",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
)


def _stand_in(name: str) -> tuple[Any, str]:
    return type(name.rpartition(".")[2], (_StandIn,), {}), name


_NUMPY_RECONSTRUCT: Any = np.ndarray(0).__reduce__()[0]
PLAIN_CLASSES: list[Any] = [
    argparse.Namespace,
    signal.Signals,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *((_NUMPY_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
_ALLOWED = [*PLAIN_CLASSES, *(_stand_in(name) for name in MEGATRON_CLASSES)]


def load_torch(path: Path, part: io.RawIOBase | None = None) -> Any:
    """Load a file of torch.save with its tensors on the meta device; their data stays in the file (see `stored`).

    `part` is a file within `path` to load instead of the whole. Raises ValueError for what is not such a file, is cut
    short, or holds anything but data.
    """
    source: Any = path if part is None else part
    if not zipfile.is_zipfile(source):
        what = f"{path} ({path.stat().st_size} bytes)" if part is None else f"an entry of {path}"
        raise ValueError(f"{what} is not a complete file of torch.save")
    if part is not None:
        part.seek(0)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(source, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        reason = lines[0] if lines else "the pickle is not one of torch.save"
        raise ValueError(f"{path} holds more than data and was not loaded: {reason}") from error
    except Exception as error:  # whatever a damaged pickle runs into
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged: {reason}") from error


def data_offset(file: File, key: str, tensor: Any) -> int:
    """Return where the data of a tensor that `load_torch` left in `file`, or in a part of it, begins.

    Raises ValueError for what no Llama weight is.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{file.path}: {key} is {type(tensor).__name__}, not a tensor")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{file.path}: {key} has dtype {tensor.dtype}; only {', '.join(DTYPES.values())} are read")
    if not tensor.is_contiguous():
        raise ValueError(f"{file.path}: {key} is not contiguous (strides {tensor.stride()})")
    base: Any = tensor.untyped_storage()._checkpoint_offset
    return int(base) + int(tensor.storage_offset()) * tensor.element_size()


def stored(file: File, key: str, tensor: Any) -> Stored:
    """Return the view of a tensor that `load_torch` left in `file`. Raises ValueError for what no Llama weight is."""
    return Stored(file, data_offset(file, key, tensor), tuple(tensor.shape), DTYPES[tensor.dtype])


class TorchFile(OutputFile):
    """A Megatron rank file: `header` plus {"model": the views by key}."""

    def __init__(self, name: str, views: Mapping[str, View], header: Mapping[str, Any]) -> None:
        super().__init__(name, views)
        self.header = header

    def lay_out(self, path: Path) -> dict[str, int]:
        # Under skip_data the tensors' memory is never touched and the file gets a hole in place of each.
        dtypes = {key: getattr(torch, TORCH_NAMES[view.dtype]) for key, view in self.views.items()}
        model = {key: torch.empty(view.shape, dtype=dtypes[key]) for key, view in self.views.items()}
        try:
            with torch.serialization.skip_data():
                torch.save({**self.header, "model": model}, path)
        except RuntimeError:
            with path.open("r+b") as file:  # torch does not say what stopped it: a full disk, a size limit
                os.posix_fallocate(file.fileno(), 0, self.nbytes)
            raise
        del model
        written = File(path)
        return {key: stored(written, key, tensor).offset for key, tensor in load_torch(path)["model"].items()}
