"""How every entry script begins and ends: one sentence for a mistake, an exit status, signals that clean up first."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from megatron.pruning.storage.processes import World, rank


def run(main: Callable[[Sequence[str]], None], left: str = "nothing was left behind") -> None:
    """Call `main` with the command line; a mistake of the user ends in one `error:` line and status 1.

    A signal to end lets what was begun be cleaned up first, and ends in a line that says what is `left`.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _end_by_signal)
    try:
        main(sys.argv[1:])
    except ValueError as error:
        if rank() > 0 and not World.joined:  # every process of a torchrun meets the same mistake: say it once
            sys.exit(1)
        _end(str(error), 1)
    except OSError as error:
        _end(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "), 1)
    except _EndedError as ended:
        _end(f"ended by {signal.Signals(ended.number).name}; {left}", 128 + ended.number)
    except KeyboardInterrupt:
        _end(f"interrupted; {left}", 130)


class _EndedError(BaseException):
    """A signal told this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _end_by_signal(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough: the second would interrupt the cleaning up
    raise _EndedError(number)


def _end(message: str, status: int) -> NoReturn:
    where = f"[rank {rank()}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    # A name out of a broken file may hold anything: line breaks, or what commands a terminal.
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message[:2000])
    print(f"{where}error: {plain}", file=sys.stderr)
    sys.exit(status)
