"""Load Megatron checkpoints into stock GPTModels and compare their logits with saved ones; stock_worker.py runs it.

The command line is the name of a JSON file of jobs. A job is {"checkpoint": DIR, "tensor": T, "pipeline": P,
"logits": FILE}; FILE is {"tokens", "logits"} of torch.save. Loading is strict; every key and shape of a rank file
must be the model's. The jobs' largest differences go to JOBS.results.
"""
# ruff: noqa: E402 - the stand-in for the device must be in place before Megatron is imported

from megatron.pruning.training import cpu_device

cpu_device.install()

import contextlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.models.gpt import GPTModelBuilder
from torch.distributed.rendezvous import rendezvous

CPU_FLAGS = """--transformer-impl local --attention-backend unfused --use-cpu-initialization
    --no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --micro-batch-size 1 --train-iters 1 --lr 1e-4
    --distributed-backend gloo""".split()


os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it whenever there is tensor parallelism


def build(checkpoint: Path) -> torch.nn.Module:
    """Build this rank's stage of the model that `megatron_args.txt` describes, on the stock local layer spec."""
    flags = (checkpoint / "megatron_args.txt").read_text().split()
    seq = flags[flags.index("--max-position-embeddings") + 1]
    sys.argv = [sys.argv[0], *flags, *CPU_FLAGS, "--seq-length", seq]
    args = parse_args()
    with contextlib.redirect_stdout(None):  # it prints some 800 arguments
        validate_args(args)
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor
    config.parallel_output = False
    model_parallel_cuda_manual_seed(1)
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()


def rank_file(checkpoint: Path, pipeline: int) -> Path:
    """Return this rank's file."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if pipeline > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    return checkpoint / "release" / name / "model_optim_rng.pt"


def run_job(job: dict[str, Any]) -> float:
    """Return the largest difference between the job's logits and the Megatron model's; loading is strict."""
    checkpoint = Path(job["checkpoint"])
    model = build(checkpoint)
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(rank_file(checkpoint, job["pipeline"]), weights_only=True)["model"]
    model.load_state_dict(state, strict=True)
    wanted = {name: value.shape for name, value in model.state_dict().items() if value is not None}
    assert wanted == {name: value.shape for name, value in state.items()}
    saved = torch.load(job["logits"], weights_only=True)
    tokens = saved["tokens"]
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    first = parallel_state.is_pipeline_first_stage()
    last = parallel_state.is_pipeline_last_stage()
    with torch.no_grad():
        if not first:
            hidden = torch.empty(tokens.shape[1], tokens.shape[0], model.config.hidden_size)
            torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output = model(tokens if first else None, positions, mask)
        if not last:
            torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            difference = 0.0
        else:
            logits = output[..., : saved["logits"].shape[-1]]
            difference = float((logits - saved["logits"]).abs().max())
    worst = torch.tensor([difference])
    torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    return float(worst)


def main(argv: Sequence[str]) -> None:
    """Run every job, on as many processes as its layout has, those of one layout after each other.

    Each process group of gloo has threads that end with it, and Megatron makes dozens: no more than one layout's may
    be there at a time.
    """
    store, rank, _ = next(rendezvous("env://"))
    path = Path(argv[0])
    jobs, results = json.loads(path.read_text()), {}
    for tensor, pipeline in sorted({(job["tensor"], job["pipeline"]) for job in jobs}):
        if rank >= tensor * pipeline:
            continue  # they would only be copies
        own = torch.distributed.PrefixStore(f"{tensor} {pipeline}", store)
        torch.distributed.init_process_group("gloo", store=own, rank=rank, world_size=tensor * pipeline)
        parallel_state.initialize_model_parallel(tensor, pipeline)
        for number, job in enumerate(jobs):
            if (job["tensor"], job["pipeline"]) == (tensor, pipeline):
                results[number] = run_job(job)
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    if rank == 0:
        path.with_suffix(".results").write_text(json.dumps([results[number] for number in range(len(jobs))]))
