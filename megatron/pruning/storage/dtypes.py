"""The dtypes that a weight may have: the one place that says how each is called, and how many bytes it takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """A dtype: bytes of a value, and its names in torch, among torch's storages, and in safetensors."""

    bytes: int
    torch: str
    storage: str
    safetensors: str


# By the name that this project's flags and files use.
DTYPES = {
    "fp32": Dtype(4, "float32", "FloatStorage", "F32"),
    "fp16": Dtype(2, "float16", "HalfStorage", "F16"),
    "bf16": Dtype(2, "bfloat16", "BFloat16Storage", "BF16"),
}
BYTES = {name: dtype.bytes for name, dtype in DTYPES.items()}
TORCH_NAMES = {name: dtype.torch for name, dtype in DTYPES.items()}
# The other way: this project's name by torch's, by the class of a storage, and by safetensors'.
BY_TORCH_NAME = {f"torch.{dtype.torch}": name for name, dtype in DTYPES.items()}
BY_STORAGE = {f"torch.{dtype.storage}": name for name, dtype in DTYPES.items()}
BY_SAFETENSORS = {dtype.safetensors: name for name, dtype in DTYPES.items()}
