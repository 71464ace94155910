"""Score importance on text: sequence by sequence, saving on the way, and going on where a run was ended."""

import hashlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron.pruning.model.axes import PRUNABLE
from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.plan.report import by_layer
from megatron.pruning.plan.scores import Facts, Scores, read, shapes, write
from megatron.pruning.storage.processes import is_first
from megatron.pruning.storage.progress import Progress
from megatron.pruning.training.tokens import Tokens

if TYPE_CHECKING:  # Megatron takes seconds, and adding up needs none
    from megatron.pruning.training.record_scores import Recorder

SAVE_SECONDS = 30.0  # about so much work is lost by an interruption


def nothing_yet(checkpoint: Checkpoint, text: Tokens, loss_sequences: int, dtype: str) -> Scores:
    """Return the sums over no sequence of `text` at all."""
    from megatron.pruning.training.record_scores import POSITIONS

    sizes, length = {axis: checkpoint.config.sizes[axis] for axis in PRUNABLE}, text.shape[1] - 1
    facts = Facts(
        parent=fingerprint(checkpoint) if is_first() else "",
        text=hashlib.sha256(np.ascontiguousarray(text)).hexdigest()[:16],
        dtype=dtype,
        sizes=sizes,
        sequences=0,
        sequences_wanted=len(text),
        sequence_length=length,
        loss_sequences=min(loss_sequences, len(text)),
        positions=min(length, POSITIONS),
        loss=0.0,
    )
    return Scores(facts, {name: np.zeros(shape) for name, shape in shapes(sizes).items()})


def score(save: Path, empty: Scores, recorder: "Recorder", text: Tokens, copies: int, copy: int) -> None:
    """Go through the text, saving on the way; the sums so far lie beside `save` until all are in."""
    partial = save.with_name(f".{save.name}.partial")
    so_far = resume(partial, empty) if is_first() else empty
    start = int(from_first(so_far.facts.sequences))
    progress = Progress("scoring", empty.facts.sequences_wanted, is_first(), unit="sequences", before=start)
    recorder.done = lambda read: progress.advance(min(read * copies, len(text) - progress.done))
    # Rounds, one sequence for each copy, from one saving to the next.
    began, every = time.monotonic(), recorder.at_once
    rounds = range(start, len(text), copies)
    for number, first in enumerate(rounds, start=1):
        if first + copy < len(text):
            recorder.sequence(text[first + copy], first + copy < empty.facts.loss_sequences)
        if number % every == 0 or first == rounds[-1]:
            sums = recorder.collect()
            problem: Exception | None = None
            try:
                if sums is not None:
                    so_far = add(so_far, dict(sums), min(first + copies, len(text)))
                    write(partial, so_far)
            except (ValueError, OSError) as error:
                problem = error
            pace = from_first(-1.0 if problem else SAVE_SECONDS * number / (time.monotonic() - began))
            if pace < 0:
                raise problem or SystemExit(1)  # rank 0 says why
            every = max(1, int(pace) // recorder.at_once) * recorder.at_once
    progress.close()
    if is_first():
        partial.replace(save)
        print(f"loss of the model on this text: {so_far.facts.loss:.4f} nats a token, over {so_far.tokens:,} tokens")
        print(by_layer("block influence", so_far.block_influence.tolist()))
        if so_far.facts.loss_sequences:
            print(by_layer("rise of the loss without the layer", so_far.loss_rise.tolist()))
        print(f"saved: {save}")


def add(so_far: Scores, sums: dict[str, np.ndarray], sequences: int) -> Scores:
    """Return `so_far` with the sums since, up to the first `sequences`. ValueError: they hold NaN or infinities."""
    more = sequences - so_far.facts.sequences
    loss = float(sums.pop("loss")[0]) / (more * so_far.facts.sequence_length)
    if not all(np.isfinite(array).all() for array in (*sums.values(), np.array(loss))):
        raise ValueError("the model gives NaN or infinite numbers on this text: its weights, or --dtype, do not do")
    return so_far.plus(sums, more, loss)


def resume(partial: Path, empty: Scores) -> Scores:
    """Return the sums that an interrupted run left at `partial`, or `empty` if there are none of this job."""
    if not partial.exists():
        return empty
    try:
        found = read(partial)
    except ValueError as error:
        print(f"note: starting over: {error}", file=sys.stderr)
        return empty
    if not found.same_job(empty):
        print(f"note: starting over: {partial} is of another model, text or number of sequences", file=sys.stderr)
        return empty
    print(
        f"going on after {found.facts.sequences} of {found.facts.sequences_wanted} sequences, from {partial}",
        flush=True,
    )
    return found


def from_first(value: float) -> float:
    """Return what rank 0 has."""
    told = torch.tensor([value], dtype=torch.float64, device="cuda")
    torch.distributed.broadcast(told, 0)
    return float(told)
