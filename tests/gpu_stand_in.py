"""Programs as on a machine with GPUs, computed on the CPU: what they ask for there is what is tested.

    python tests/gpu_stand_in.py SCRIPT FLAGS

The project's own stand-in for the device stays underneath, but says that it is not there: the defaults of a GPU apply,
bf16 and nccl among them (gloo takes nccl's place), and nothing is refused for want of a GPU.
"""

import contextlib
import functools
import runpy
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron.pruning.training import cpu_device


def install() -> None:
    """Let this process take itself for one with a GPU; before Megatron is imported or after, before it joins others."""
    keep_transformer_engine()
    cpu_device.install()
    cpu_device.install = cpu_device.is_installed = lambda: False
    for name in ("init_process_group", "new_group"):
        stand_in = _with_gloo(getattr(dist, name))
        setattr(dist, name, stand_in)
        setattr(distributed_c10d, name, stand_in)


def keep_transformer_engine() -> None:
    """Import it, or the stand-in for it, where there is one: without a GPU it would be hidden from Megatron."""
    with contextlib.suppress(ImportError):
        import transformer_engine  # noqa: F401


def _with_gloo(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [_gloo(arg) for arg in args]
        named = {name: _gloo(value) for name, value in kwargs.items() if name not in ("device_id", "pg_options")}
        return function(*given, **named)

    return call


def _gloo(value: Any) -> Any:
    return "gloo" if isinstance(value, str) and value == "nccl" else value


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
