"""A reconstruction as a job on disk: what is done lies in a working directory, and an interrupted run goes on there."""

import hashlib
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron.pruning.model.checkpoint import Checkpoint, fingerprint
from megatron.pruning.model.weights import READERS, WRITERS
from megatron.pruning.plan.plan import Plan
from megatron.pruning.plan.pruned import Pruned
from megatron.pruning.plan.reconstructed import REPORT_FILE, Losses, Reconstructed, Report, WeightReport, plan_digest
from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.storage.processes import World
from megatron.pruning.storage.progress import Progress
from megatron.pruning.storage.safetensors_file import read_safetensors
from megatron.pruning.storage.small_files import new_file_beside, read_small, replace_durably
from megatron.pruning.storage.views import View
from megatron.pruning.training import cpu_device
from megatron.pruning.training.basis import NORM_OF
from megatron.pruning.training.layerwise import ROW, States, Weights
from megatron.pruning.training.least_squares import Fit, tensor_cores
from megatron.pruning.training.reconstruct import Options, Reconstruction, Text, loss_of
from megatron.pruning.training.room import free_memory, free_on_gpu, processes_here

# Where states are in memory: seconds between the layers that an interrupted run can go on from, at least, and the most
# of the time that may be spent on having it so.
COMMIT_SECONDS, COMMIT_SHARE = 60.0, 0.05
_BASIS = "basis.safetensors"
_TOUCHED = {"embed", *READERS, *NORM_OF, *WRITERS}  # rows of a layer that a smaller hidden size or a refit changes


class Job:
    """A reconstruction of `parent` pruned by `plan`, in the directory `folder`, which all processes see.

    `dtype` is that of the weights to come; None: every weight keeps the parent's.
    """

    def __init__(
        self,
        parent: Checkpoint,
        plan: Plan,
        text: Text,
        options: Options,
        dtype: str | None,
        folder: Path,
        world: World,
    ) -> None:
        self.parent, self.plan, self.text, self.options, self.dtype = parent, plan, text, options, dtype
        self.folder, self.world = folder, world
        numbers = [stretch.number for stretch in text.stretches()]
        self.states = States(folder / "states", torch.float32, text.device, numbers, self._holder())
        self.report = self._go_on(self._empty_report())

    def run(self) -> tuple[Reconstructed, Report]:
        """Do what is left to do; return the model, whose weights lie in the working directory, and the report."""
        done, layers = self.report.layers_done, len(self.plan.layers)
        self._check_disk()
        progress = Progress("reconstructing", layers + 1, self.world.rank == 0, unit="layers", before=done)
        with torch.no_grad(), tensor_cores(self.text.device, self._stored_dtype("embed", None)):
            if done <= layers:
                self._refit(done, progress)
            progress.close()
            model = Reconstructed(self.parent, self.plan, self._weights())
            if self.report.losses is None:
                compared = (self.parent, Pruned(self.parent, self.plan), model)
                layers = sum(one.config.num_layers for one in compared)
                progress = Progress("losses on held-out text", layers, self.world.rank == 0, unit="layers")
                losses = Losses(*(loss_of(one, self.text, self.states, progress) for one in compared))
                progress.close()
                self.report = msgspec.structs.replace(self.report, losses=losses)
                self._commit()
            model.refit = self.report.refit
        return model, self.report

    def _refit(self, done: int, progress: Progress) -> None:
        layers = len(self.plan.layers)
        work = Reconstruction(self.parent, self.plan, self.text, self.options, self.states, self._as_stored)
        if done == 0:
            first = work.start()
            if self.world.rank == 0:
                self._write("first", None, first)
                if work.basis.matrix is not None:
                    _save({"basis": work.basis.matrix}, self.folder / _BASIS)
        elif self.options.rotate:
            work.set_basis(load_file(self.folder / _BASIS)["basis"])
        committed, at, took = done, time.monotonic(), 0.0
        for layer in range(done, layers):
            self._write(f"layer-{layer:05d}", layer, work.layer(layer))
            self._add(layer + 1, layer, work.fits)
            if self._is_time(at + took / COMMIT_SHARE):
                began = time.monotonic()
                self.states.make_durable(f"parent.{layer + 1}", f"pruned.{layer + 1}")
                self._commit()
                self.states.drop(f"parent.{committed}", f"pruned.{committed}")
                committed, at = layer + 1, time.monotonic()
                took = at - began
            self.states.free(f"parent.{layer}", f"pruned.{layer}")
            progress.advance(1)
        self._write("last", None, work.finish())
        self._add(layers + 1, None, work.fits)
        self._commit()
        for number in {committed, layers}:
            self.states.drop(f"parent.{number}", f"pruned.{number}")
        progress.advance(1)

    def _is_time(self, since: float) -> bool:
        """Tell whether an interrupted run is to go on from here: with states in memory that costs a copy to disk."""
        if self.states.holder is None:
            return True
        votes = torch.tensor(float(time.monotonic() - since > COMMIT_SECONDS), device=self.text.device)
        self.text.add_up(votes)  # all ranks must do the same
        return float(votes) > 0

    def _as_stored(self, name: str, layer: int | None, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight in the dtype in which it will be written. Raises ValueError where it does not fit that."""
        dtype = self._stored_dtype(name, layer)
        rounded = weight.to(getattr(torch, TORCH_NAMES[dtype]))
        if not torch.isfinite(rounded).all():
            where = f"the reconstructed {name}" + ("" if layer is None else f" of layer {layer}")
            if torch.isfinite(weight).all():
                raise ValueError(f"{where} does not fit {dtype}: choose bf16 or fp32")
            raise ValueError(f"{where} has NaN or infinities, as has {self.parent.path}")
        return rounded

    def _stored_dtype(self, name: str, layer: int | None) -> str:
        if self.dtype is not None:
            return self.dtype
        row = ROW["embed" if name == "lm_head" and self.parent.config.tied else name]
        return self.parent.weight(row, int(self.plan.layers[layer or 0]) if row.per_layer else None).dtype

    def _write(self, name: str, layer: int | None, weights: Weights) -> None:
        if self.world.rank == 0:
            tensors = {
                ROW[row].hf_key(layer): self._as_stored(row, layer, weight)
                for row, weight in weights.items()
                if row in _TOUCHED
            }
            _save(tensors, self.folder / f"{name}.safetensors")

    def _weights(self) -> dict[str, View]:
        self.world.barrier()
        names = ["first", *(f"layer-{layer:05d}" for layer in range(len(self.plan.layers))), "last"]
        found: dict[str, View] = {}
        for name in names:
            found |= read_safetensors(self.folder / f"{name}.safetensors")
        return found

    def _add(self, done: int, layer: int | None, fits: Mapping[str, Fit]) -> None:
        """Take what was fitted into the report."""
        rows = [
            WeightReport(
                name=name,
                layer=layer,
                ridge=_number(fit.ridge),
                wanted=fit.wanted,
                before=fit.before,
                after=fit.after,
            )
            for name, fit in fits.items()
        ]
        self.report = msgspec.structs.replace(self.report, layers_done=done, weights=[*self.report.weights, *rows])

    def _commit(self) -> None:
        """Let the files so far count, on every process."""
        self.world.barrier()
        if self.world.rank == 0:
            replace_durably(self.folder / REPORT_FILE, self.report.to_json())
        self.world.barrier()

    def _empty_report(self) -> Report:
        text = self.text.calibration
        return Report(
            parent=fingerprint(self.parent),
            plan=plan_digest(self.plan),
            tokens=hashlib.sha256(np.ascontiguousarray(text.tokens)).hexdigest()[:16],
            text=dict(text.shares),
            sequences=int((~text.held_out).sum()),
            held_out_sequences=int(text.held_out.sum()),
            sequence_length=text.length,
            ridge=self.options.ridge if self.options.refits else None,
            rotated=self.options.rotate,
            untied=self.options.untie,
            dtype=self.dtype,
        )

    def _go_on(self, empty: Report) -> Report:
        """Return how far an interrupted run of the same job came; whatever else is in its directory is of no use."""
        path = self.folder / REPORT_FILE
        found = empty
        if path.is_file():
            try:
                found = Report.from_json(read_small(path), str(path))
                if not found.same_job(empty):
                    raise ValueError(f"{self.folder} is of another model, plan, text or other flags")
                if self.world.rank == 0:
                    print(f"going on after layer {found.layers_done} of {len(self.plan.layers)}, from {self.folder}")
            except ValueError as error:
                found = empty
                if self.world.rank == 0:
                    print(f"note: starting over: {error}", file=sys.stderr)
        state = hashlib.sha256(found.to_json()).hexdigest()[:16]
        differs = torch.tensor(float(self.world.share(state) != state), device=self.text.device)
        self.text.add_up(differs)
        if differs:  # a network's file system may show what is no more, and sums of different layers would be mixed
            raise ValueError(f"{path} is not the same file for all processes: start again, or delete {self.folder}")
        self.folder.mkdir(exist_ok=True)
        return found

    def _check_disk(self) -> None:
        """Say what the hidden states take. Raises ValueError when there is no room for them."""
        need, free = self._bytes_on_disk(), shutil.disk_usage(self.folder).free
        if need > free:
            raise ValueError(
                f"{self.folder} has {free / 1e9:.1f} GB free, but the hidden states of the text take "
                f"{need / 1e9:.1f} GB: take fewer --sequences, or a --save on a larger disk"
            )

    def _bytes_on_disk(self) -> int:
        """Return what of them lies in files: what a layer begins with, twice, where memory has room for the others."""
        if self.states.holder is None:
            return self._bytes_of_states()
        widths = 2 * (self.parent.config.hidden_size + self.plan.sizes["hidden"])
        return int(self.text.calibration.tokens.size) * widths * 4

    def _bytes_of_states(self) -> int:
        """Return what the hidden states of the whole text take, on all ranks together."""
        parent, pruned = self.parent.config, self.plan.sizes
        widths = 3 * parent.hidden_size + 3 * pruned["hidden"] + pruned["heads"] * pruned["head_dim"]
        return int(self.text.calibration.tokens.size) * widths * 4

    def _bytes_of_work(self) -> int:
        """Return what a rank takes beside the states: layers in fp32, sums and what is solved for in fp64."""
        parent, ffn, kept = self.parent.config, self.plan.sizes["ffn"], self.plan.sizes["hidden"]
        layers = 3 * parent.parameters // parent.num_layers  # the parent's; what is aimed at; the pruned one, twice
        return 4 * layers + 8 * (4 * ffn * ffn + 6 * ffn * kept + 2 * kept * kept)

    def _holder(self) -> torch.device | None:
        """Return what holds the hidden states: the GPUs, where each has room for a rank's, or the hosts; or files."""
        if self.text.device.type != "cuda" or cpu_device.is_installed():
            return None
        mine, free = self._bytes_of_states() / self.text.ranks, free_on_gpu()  # the model that was scored has gone
        rooms = min(free / 2, free - self._bytes_of_work()), free_memory() / 2 / processes_here()
        without = torch.tensor([float(mine >= room) for room in rooms], device=self.text.device)
        self.text.add_up(without)  # all ranks must do the same
        for lacks, device in zip(without.tolist(), (self.text.device, torch.device("cpu")), strict=True):
            if not lacks:
                return device
        return None


def _number(ridge: float) -> float | None:
    """Return a ridge as JSON can hold it."""
    return ridge if math.isfinite(ridge) else None


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a file of safetensors, whole or not at all."""
    aside = new_file_beside(path)
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
