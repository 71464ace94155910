"""How every entry script begins and ends: one sentence for a mistake, an exit status, signals that clean up first."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from megatron.pruning.storage.processes import World, count, is_first, rank

RANK_0_SPEAKS = 10.0  # seconds that the other ranks give it
ENDING = (signal.SIGTERM, signal.SIGHUP)


def run(main: Callable[[Sequence[str]], None], left: str = "nothing was left behind") -> None:
    """Call `main` with the command line; a mistake of the user ends in one `error:` line and status 1.

    A signal to end lets what was begun be cleaned up first, and ends in a line that says what is `left`.
    """
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, _end_by_signal)
    try:
        main(sys.argv[1:])
    except ValueError as error:
        if count() > 1 and not is_first() and not World.joined:
            _let_rank_0_speak()
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


def _let_rank_0_speak() -> None:
    """Wait: where every process of a torchrun has met the same mistake, rank 0 says it and torchrun ends this one."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(RANK_0_SPEAKS)


def _end(message: str, status: int) -> NoReturn:
    where = f"[rank {rank()}] " if count() > 1 else ""
    one_line = " ".join(line.strip() for line in message[:2000].splitlines())
    # A name out of a broken file may hold anything, also what commands a terminal.
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in one_line)
    print(f"{where}error: {plain}", file=sys.stderr, flush=True)
    sys.exit(status)
