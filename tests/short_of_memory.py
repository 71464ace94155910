"""Run a program as where no model has room; stock_worker.py starts it, by the name of the program and its flags."""

import importlib
from collections.abc import Sequence

from commands import replace

from megatron.pruning.training import room


def main(argv: Sequence[str]) -> None:
    """Leave no memory free, and run the program."""
    name, *flags = argv
    for kind in ("free_memory", "free_on_gpu"):
        replace(room, kind, lambda: 1)
    importlib.import_module(name).main(flags)
