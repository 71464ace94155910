"""Run a program as where no model has room; stock_worker.py starts it, by the name of the program and its flags."""

import importlib
from collections.abc import Sequence

from megatron.pruning.training import room


def main(argv: Sequence[str]) -> None:
    """Leave no memory free, and run the program."""
    name, *flags = argv
    room.free_memory = room.free_on_gpu = lambda: 1
    importlib.import_module(name).main(flags)
