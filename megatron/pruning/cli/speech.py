"""How a run speaks: to a person who watches, to nobody, or in one JSON object to a program."""

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.pruning import __version__
from megatron.pruning.storage.processes import is_first
from megatron.pruning.storage.progress import Progress

Result = Mapping[str, Any] | Sequence[Any]  # as JSON can hold it
Answer = Callable[[Callable[[], Result]], None]


def add_speech_flags(parser: argparse.ArgumentParser, into_file: bool = False) -> None:
    """Add the flags that say how a run speaks; with `into_file`, --json may name a file that the caller writes."""
    group = parser.add_argument_group("output")
    group.add_argument("-q", "--quiet", action="store_true", help="print only warnings and errors")
    group.add_argument("-v", "--verbose", action="store_true", help="print where in the program a mistake was noticed")
    said = "print the result as JSON, and everything else to stderr"
    if into_file:
        group.add_argument(
            "--json", nargs="?", const=True, type=Path, metavar="FILE", help=f"{said}; or write it to FILE, too"
        )
    else:
        group.add_argument("--json", action="store_true", help=said)
    add_version_flag(group)


def add_version_flag(parser: argparse._ActionsContainer) -> None:
    """Add --version to a parser or a group of one."""
    parser.add_argument(
        "--version",
        action="version",
        version=f"megatron-llama-pruning {__version__}",
        help="print the version, and stop",
    )


@contextlib.contextmanager
def speaking(args: argparse.Namespace) -> Iterator[Answer]:
    """Have what is printed go where the flags of `add_speech_flags` want it; give a function that prints a result.

    That one calls what it is given for the result only where somebody asked for it.
    """
    printed = sys.stdout

    def answer(result: Callable[[], Result]) -> None:
        if args.json is True and is_first():
            print(json.dumps(result(), indent=1), file=printed, flush=True)

    Progress.quiet = args.quiet
    with contextlib.ExitStack() as stack:
        if args.quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))  # noqa: PTH123
        elif args.json is True:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield answer
        except (ValueError, OSError):
            if args.verbose:
                traceback.print_exc()
            raise
        finally:
            Progress.quiet = False
