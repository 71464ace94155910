"""Reconstruct in float64, which no checkpoint holds, and save what comes out; stock_worker.py runs it.

The command line is the name of a JSON file: {"load", "plan", "text", "length", "sequences", "ridge", "rotate", "untie",
"save"}. SAVE gets the weights by Hugging Face key, and the sums of squares of every fit.

Or it is `--die-after N` and the command line of tools/reconstruct.py, which then ends as by kill -9 after N layers.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.plan import Plan
from megatron.pruning.plan.reconstructed import Report
from megatron.pruning.training.calibration import calibration
from megatron.pruning.training.layerwise import ROW, States
from megatron.pruning.training.reconstruct import Options, Reconstruction, Text
from megatron.pruning.training.reconstruct_checkpoint import Job
from megatron.pruning.training.stock_model import join


def main(argv: Sequence[str]) -> None:
    """Do the job that the file describes, or die in one."""
    if argv[0] == "--die-after":
        return die_after(int(argv[1]), argv[2:])
    job = json.loads(Path(argv[0]).read_text())
    join(Layout())
    parent = open_checkpoint(Path(job["load"]))
    plan = Plan.from_json(Path(job["plan"]).read_text(), job["plan"])
    text = Text(calibration([job["text"]], job["length"], job["sequences"], parent), torch.device("cpu"))
    options = Options(ridge=job["ridge"], rotate=job["rotate"], untie=job["untie"])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        numbers = [stretch.number for stretch in text.stretches()]
        states = States(Path(folder), torch.float64, text.device, numbers)
        work = Reconstruction(parent, plan, text, options, states)
        found, fits = {None: work.start()}, {}
        for layer in range(len(plan.layers)):
            found[layer] = work.layer(layer)
            fits |= {f"{name} {layer}": fit for name, fit in work.fits.items()}
        found[None] |= work.finish()
        fits |= work.fits
    weights = {ROW[name].hf_key(layer): weight for layer, rows in found.items() for name, weight in rows.items()}
    sums = {name: (fit.wanted, fit.before, fit.after) for name, fit in fits.items()}
    torch.save({"weights": weights, "fits": sums}, job["save"])


def die_after(layers: int, words: Sequence[str]) -> None:
    """Run the tool up to where so many layers are done."""
    import reconstruct

    commit = Job._commit

    def last_commit(self: Job, report: Report) -> None:
        commit(self, report)
        if report.layers_done == layers:
            os._exit(9)

    Job._commit = last_commit
    reconstruct.main(words)
