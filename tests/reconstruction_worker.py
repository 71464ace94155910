"""Reconstruct in float64, which no checkpoint holds, and save what comes out; stock_worker.py runs it.

The command line is the name of a JSON file: {"load", "plan", "text", "length", "sequences", "ridge", "rotate", "untie",
"save"}. SAVE gets the weights by Hugging Face key, the sums of squares of every fit, and for each product of a weight
whether its inputs lay in memory one behind the other.

Or it is `--die-after N` and the command line of tools/reconstruct.py, which then ends as by kill -9 after N layers;
`--hold N` does so too, with hidden states in memory as on a GPU, of which only those after layer 1 are kept in files.
`--behind` runs the tool where the second process does not see how far an earlier run came.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.plan.plan import Plan
from megatron.pruning.training import reconstruct_checkpoint
from megatron.pruning.training.calibration import calibration
from megatron.pruning.training.layerwise import ROW, States
from megatron.pruning.training.reconstruct import Options, Reconstruction, Text
from megatron.pruning.training.reconstruct_checkpoint import Job
from megatron.pruning.training.stock_model import join


def main(argv: Sequence[str]) -> None:
    """Do the job that the file describes, or die in one."""
    if argv[0] in ("--die-after", "--hold"):
        return die_after(int(argv[1]), argv[2:], argv[0] == "--hold")
    if argv[0] == "--behind":
        return run_behind(argv[1:])
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
        in_a_row: list[bool] = []
        for module in work.pruned_layer.layer.modules():
            if module.__class__.__name__.endswith("ParallelLinear"):
                module.register_forward_pre_hook(lambda module, args: in_a_row.append(args[0].is_contiguous()))
        found, fits = {None: work.start()}, {}
        for layer in range(len(plan.layers)):
            found[layer] = work.layer(layer)
            fits |= {f"{name} {layer}": fit for name, fit in work.fits.items()}
        found[None] |= work.finish()
        fits |= work.fits
    weights = {ROW[name].hf_key(layer): weight for layer, rows in found.items() for name, weight in rows.items()}
    sums = {name: (fit.wanted, fit.before, fit.after) for name, fit in fits.items()}
    torch.save({"weights": weights, "fits": sums, "in a row": in_a_row}, job["save"])


def run_behind(words: Sequence[str]) -> None:
    """Run the tool, in the second process without the report that lies there."""
    import reconstruct

    if os.environ["RANK"] == "1":
        reconstruct_checkpoint.REPORT_FILE = "unseen"
    reconstruct.main(words)


def die_after(layers: int, words: Sequence[str], hold: bool) -> None:
    """Run the tool up to where so many layers are done."""
    import reconstruct

    step = "_add" if hold else "_commit"
    take = getattr(Job, step)

    def last(self: Job, *args: Any) -> None:
        take(self, *args)
        if self.report.layers_done == layers:
            os._exit(9)

    setattr(Job, step, last)
    if hold:
        Job._holder = lambda self: torch.device("cpu")
        Job._is_time = lambda self, since: self.report.layers_done == 1
    reconstruct.main(words)
