"""How every entry script begins and ends: one sentence for a mistake, an exit status, signals that clean up first."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from megatron.pruning.storage.processes import World, count, is_first_here, rank

ANOTHER_SPEAKS = 10.0  # seconds that the other processes of a machine give its first
ENDING = (signal.SIGTERM, signal.SIGHUP)
_EXTRA = ("torch", "transformers", "megatron", "sentencepiece", "psutil")  # of who does more than prune and convert


def run(main: Callable[[Sequence[str]], None], left: str = "nothing was left behind") -> None:
    """Call `main` with the command line; a mistake of the user ends in one `error:` line and status 1.

    A signal to end lets what was begun be cleaned up first, and ends in a line that says what is `left`.
    """
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, _end_by_signal)
    try:
        main(sys.argv[1:])
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name.partition(".")[0] not in _EXTRA or name.startswith("megatron.pruning"):
            raise
        _end(f'this needs {name}, which is not installed: bash scripts/setup.sh, or pip install ".[train]"', 1)
    except ValueError as error:
        if count() > 1 and not is_first_here() and not World.joined:
            _let_another_speak()
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


def _let_another_speak() -> None:
    """Wait: where every process has met the same mistake, the first of each machine says it and torchrun ends this."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(ANOTHER_SPEAKS)


def plain(text: str) -> str:
    """Return text that a terminal shows and does not obey: a name out of a file may hold anything."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _end(message: str, status: int) -> NoReturn:
    where = f"[rank {rank()}] " if count() > 1 else ""
    if World.current is not None:
        World.current.fail(message[:200])
    one_line = " ".join(line.strip() for line in message[:2000].splitlines())
    print(f"{where}error: {plain(one_line)}", file=sys.stderr, flush=True)
    sys.exit(status)
