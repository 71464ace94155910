"""Stand the CPU in for the CUDA device, so that the stock Megatron training loop runs without a GPU.

Megatron names the device in four ways: `device="cuda"` given to torch's factories, `.cuda()` on tensors and modules,
the bookkeeping of `torch.cuda` (streams, events, memory, random state), and the names of tensor types. `install()`
answers each of them with the CPU, and hides the libraries whose kernels Megatron takes wherever they are installed, on
a cluster's login node, too. It does nothing where torch sees a GPU. It is called once, when the entry script is
imported and before `megatron.training` is (Megatron binds some of these names at import, and the writer of --async-save
spawns children that import the entry script again), and is never undone.

    from megatron.pruning.training import cpu_device
    cpu_device.install()

`add_defaults` and `refuse` are its other half: what the stock command line must say on a CPU, said for the user, and
one clear sentence for what cannot work there.
"""

import argparse
import contextlib
import functools
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CPU = torch.device("cpu")
DEVICES = Path("/dev")  # where a machine's GPUs have files

# Stock flags (argparse destinations) as a CPU needs them. They are defaults: what the user types wins, and `refuse`
# says what cannot work. Fusions are CUDA kernels; gloo is the only backend; the data loader's worker processes would
# compete with the ranks for the same cores.
CPU_DEFAULTS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "disable_jit_fuser": True,
    "attention_backend": "unfused",
    "num_workers": 0,
}

FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace logspace ones ones_like rand "
    "rand_like randint randint_like randn randn_like randperm scalar_tensor tensor zeros zeros_like"
).split()
NEW_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def count_gpus() -> int:
    """Return how many GPUs torch can use. Say on standard error why it can use none, where the machine has some."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return torch.cuda.device_count()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not hidden and any(DEVICES.glob("nvidia[0-9]*")) and os.environ.get("RANK", "0") == "0":
        reasons = [str(warning.message).split(". ")[0] for warning in said]
        if torch.version.cuda is None:
            reasons = [f"torch {torch.__version__} is built without CUDA"]
        why = f": {reasons[0]}" if reasons else ""
        print(f"note: this machine has GPUs that torch cannot use{why}; the CPU computes", file=sys.stderr)
    return 0


def install() -> bool:
    """Answer every use of the CUDA device with the CPU, unless there is one.

    Return whether the stand-in is in place, from this call or an earlier one: not where torch can use a GPU.
    """
    if is_installed():
        return True
    if count_gpus():
        return False
    _set_environment()
    _hide_kernels()
    _redirect_factories()
    _redirect_moves()
    _replace_bookkeeping()
    _replace_random_state()
    torch.cuda._stands_for_cpu = True  # type: ignore[attr-defined]
    return True


def is_installed() -> bool:
    """Tell whether `install` has put the CPU in the place of the CUDA device in this process."""
    return getattr(torch.cuda, "_stands_for_cpu", False)


def add_defaults(parser: argparse.ArgumentParser) -> None:
    """Give the stock parser, which holds all of Megatron's arguments, the defaults that a CPU needs."""
    from megatron.core.transformer.enums import AttnBackend

    known = {action.dest for action in parser._actions}
    defaults = {name: value for name, value in CPU_DEFAULTS.items() if name in known}
    parser.set_defaults(**defaults | {"attention_backend": AttnBackend[CPU_DEFAULTS["attention_backend"]]})


def refuse(args: argparse.Namespace) -> None:
    """Check that the parsed flags can work on a CPU.

    Raises ValueError with one sentence that names the flag, why it cannot work without a GPU and what to do instead.
    """
    needs_gpu = {
        "--distributed-backend nccl": args.distributed_backend == "nccl",
        "--transformer-impl transformer_engine": args.transformer_impl == "transformer_engine",
        "--transformer-impl inference_optimized": args.transformer_impl == "inference_optimized",
        "--fp8-format": bool(args.fp8),
        "--fp4-format": bool(getattr(args, "fp4", None)),
        "--fp16": args.fp16,
        "--cuda-graph-impl": args.cuda_graph_impl != "none",
        "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--use-torch-fsdp2": args.use_torch_fsdp2,
        "--tp-comm-overlap": args.tp_comm_overlap,
        "--use-persistent-ckpt-worker": args.use_persistent_ckpt_worker,
        "--cp-comm-type with --context-parallel-size above 1": args.context_parallel_size > 1,
        "--attention-backend": args.attention_backend.name in ("flash", "fused"),
    }
    asked = [flag for flag, given in needs_gpu.items() if given]
    if asked:
        raise ValueError(
            f"{' and '.join(asked)} needs a GPU and torch sees none here: leave it out to train on the CPU"
        )


def _set_environment() -> None:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # torch.compile would want a compiler and minutes for tiny models
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it where it is parallel
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # one machine
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve would stop gloo
    # The stock data loader asks for pinned memory, which torch then explains it will not use.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _hide_kernels() -> None:
    """Let no import find these, unless one has already: their Adam and norms, which Megatron prefers, are CUDA's."""
    for name in ("transformer_engine", "apex"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _to_cpu(device: Any) -> Any:
    """Return the CPU where `device` names a CUDA device (`"cuda:1"`, an index, a torch.device), else `device`."""
    is_index = isinstance(device, int) and not isinstance(device, bool)
    is_cuda = isinstance(device, str | torch.device) and str(device).startswith("cuda")
    return CPU if is_index or is_cuda else device


def _on_cpu(function: Callable[..., Any], keyword: str = "device", place: int | None = None) -> Callable[..., Any]:
    """Return `function` with the device redirected that is given as `keyword`, or at `place` among the others."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if keyword in kwargs:
            kwargs[keyword] = _to_cpu(kwargs[keyword])
        return function(*(_to_cpu(arg) if i == place else arg for i, arg in enumerate(args)), **kwargs)

    return call


def _redirect_factories() -> None:
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in NEW_METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    torch.load = _on_cpu(torch.load, "map_location")


def _redirect_moves() -> None:
    tensor_type = torch.Tensor.type

    def type_of(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizer sorts parameters by the name of their type and accepts torch.cuda.* only.
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return tensor_type(self, dtype, *args, **kwargs)

    def itself(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    torch.Tensor.to = _on_cpu(torch.Tensor.to, place=1)  # type: ignore[method-assign]
    torch.nn.Module.to = _on_cpu(torch.nn.Module.to, place=1)  # type: ignore[method-assign]
    torch.Tensor.type = type_of  # type: ignore[method-assign,assignment]
    for name in ("cuda", "pin_memory"):
        setattr(torch.Tensor, name, itself)
    torch.nn.Module.cuda = itself  # type: ignore[method-assign]


class _Stream:
    """A CUDA stream or event on a device that runs everything in order: nothing to wait for."""

    device = CPU
    stream_id = device_index = cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def elapsed_time(self, end: "_Stream") -> float:
        """Return the milliseconds between two events, which are not timed here."""
        return 0.0

    def query(self) -> bool:
        """Tell whether all work is done: it always is."""
        return True

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        """Return an event that has already happened."""
        return event or _Stream()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the least and the greatest priority."""
        return 0, 0

    def wait(self, *args: Any) -> None:
        """Return at once: there is nothing to wait for."""

    record = synchronize = wait_event = wait_stream = wait


def _replace_bookkeeping() -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = types.SimpleNamespace(
        name="CPU", major=8, minor=0, multi_processor_count=os.cpu_count(), total_memory=memory, uuid="cpu"
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": 0,
        "get_device_name": "CPU",
        "get_device_capability": (8, 0),
        "get_device_properties": properties,
        "mem_get_info": (memory, memory),
        "memory_stats": {},
        "current_stream": _Stream(),
        "default_stream": _Stream(),
    }
    zero = "memory_allocated memory_reserved max_memory_allocated max_memory_reserved device_memory_used utilization"
    nothing = (
        "_lazy_init init synchronize set_device set_stream empty_cache reset_peak_memory_stats ipc_collect "
        "reset_max_memory_allocated check_error"
    )
    answers |= dict.fromkeys(zero.split(), 0) | dict.fromkeys(nothing.split())
    for name, answer in answers.items():
        setattr(torch.cuda, name, functools.partial(lambda answer, *args, **kwargs: answer, answer))
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.ExternalStream = _Stream  # type: ignore[misc,assignment]
    torch.cuda.stream = torch.cuda.device = contextlib.nullcontext  # type: ignore[misc,assignment]
    torch.cuda._lazy_call = lambda call, **kwargs: call()
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *args, **kwargs: 0)
    # torch's own libraries ask for the accelerator by another way and must keep hearing that there is none.
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_accelerator = lambda *args, **kwargs: None
    torch.accelerator.device_count = lambda: 0


def _replace_random_state() -> None:
    """Make the CUDA generator the CPU's: one stream of numbers, saved and restored under both names."""
    cpu_state = {
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda new_state, *args, **kwargs: torch.set_rng_state(new_state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: None,  # torch.manual_seed calls it after seeding the CPU
        "initial_seed": torch.initial_seed,
    }
    for name, function in cpu_state.items():
        setattr(torch.cuda, name, function)
        setattr(torch.cuda.random, name, function)
    torch.cuda.default_generators = (torch.default_generator,)
