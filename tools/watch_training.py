"""Run a training, keep all that it prints in a log, and show of it what a person reads.

    python tools/watch_training.py --log SAVE/logs/node-0.log -- torchrun --nproc-per-node 8 pretrain_gpt.py ...

The training writes to the log itself, at whose end each run begins anew: nothing is lost where this program ends first.
Shown are a line for every step that the stock loop logs, the validation losses, where it saves, and every error in its
sentence; of a failure that has none, the end of its traceback. Signals go on to the training, whose exit status is that
of this program; it ends with this program.
"""

import argparse
import contextlib
import ctypes
import datetime
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from megatron.pruning.cli.entry import plain
from megatron.pruning.cli.flags import new_parser
from megatron.pruning.cli.stock_log import Step, read_step, read_validation

LOOK = 0.2  # seconds between two looks at the log
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PARENT_DIES = 1  # PR_SET_PDEATHSIG of Linux's prctl

# What is shown as it stands, and what is said shorter.
_SHOWN = re.compile(
    r"(\[rank \d+\] )?(error|note|warning): |no checkpoint in .* yet: |teacher: |recording |.*exiting program "
)
_LOADED = re.compile(r"\s*(?:successfully loaded checkpoint|weights loaded) from (.+?)(?: \[.*\])? at iteration (\d+)")
_SAVED = re.compile(r"\s*(?:\[.*?\] )?successfully saved checkpoint from iteration +(\d+) to (.+?)(?: \[.*)?$")
_ERROR = re.compile(r"(\[rank \d+\] )?error: ")
_TRACEBACK = "Traceback (most recent call last):"
_BY_RANK = re.compile(r"\[rank\d+\]: ?")  # which torch puts before each line
MOST_LINES = 15  # of a traceback, or of what was printed last


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--log", type=Path, required=True, metavar="FILE", help="what the training prints goes here")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what starts the training, after --")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the training and return its exit status, as a shell gives it."""
    args = parser().parse_args(argv)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("ab") as log:
        log.write(f"\n== {datetime.datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(args.command)}\n".encode())
        log.flush()
        begin = log.tell()
        child = start(args.command, log)
    show(f"log: {args.log} (VERBOSE=1 shows all of it here)")
    with args.log.open("rb") as log:
        log.seek(begin)
        told = follow(log, child, int(value_of("--seq-length", args.command) or 0))
    status = child.returncode if child.returncode >= 0 else 128 - child.returncode
    if status and not told:
        show("\n".join(end_of(args.log, begin)))
    if status:
        show(f"the training ended with status {status}: see {args.log}")
    return status


def start(command: Sequence[str], log: BinaryIO) -> "subprocess.Popen[bytes]":
    """Start the training, which prints to the log, gets the signals that this process gets, and ends with it.

    It is in a process group of its own: the terminal's Ctrl-C reaches it once, from here.
    """
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def end_with_parent() -> None:
        with contextlib.suppress(AttributeError):  # Linux alone has it
            libc.prctl(_PARENT_DIES, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        process_group=0,
        preexec_fn=end_with_parent,
    )

    def forward(number: int, _: FrameType | None) -> None:
        if child.poll() is None:
            child.send_signal(number)

    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, forward)
    return child


def value_of(flag: str, command: Sequence[str]) -> str | None:
    """Return the value that a flag has at last in a command."""
    found = None
    for word, after in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else after
    return found


def follow(log: BinaryIO, child: "subprocess.Popen[bytes]", sequence: int) -> bool:
    """Show what is to be read of the log until the training ends, and return whether an error was told.

    `sequence` is the number of tokens of a sample.
    """
    told = False
    for line in lines_until_end(log, child):
        told = told or bool(_ERROR.match(line))
        if (said := readable(line, sequence)) is not None:
            show(said)
    return told


def lines_until_end(log: BinaryIO, child: "subprocess.Popen[bytes]") -> Iterator[str]:
    """Yield the lines of the log as they are written, and after the last process that matters has ended, the rest."""
    begun = b""
    while True:
        ended = child.poll() is not None  # before the look: what comes after it is seen in the next one
        *whole, begun = (begun + log.read()).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
        if ended:
            break
        time.sleep(LOOK)
    if begun:
        yield begun.decode(errors="replace")


def readable(line: str, sequence: int) -> str | None:
    """Return what is shown of a line of the stock output, if anything is."""
    if (step := read_step(line)) is not None:
        return describe(step, sequence)
    if (validation := read_validation(line)) is not None:
        number, text, losses = validation
        lm = losses.pop("lm loss", math.nan)
        more = "".join(f"  {name} {loss:.4f}" for name, loss in losses.items())
        return f"validation loss after step {number}{text}: {lm:.4f}{more}"
    if loaded := _LOADED.match(line):
        return f"starts from {loaded[1]} at step {loaded[2]}"
    if saved := _SAVED.match(line):
        return f"saved after step {saved[1]}: {saved[2]}"
    return line if _SHOWN.match(line) else None


def describe(step: Step, sequence: int) -> str:
    """Return a step in one line: tokens, losses, learning rate, speed, and the time that is left at this speed."""
    seconds = step.value("elapsed time per iteration (ms)") / 1000
    tokens = step.value("consumed samples") * sequence
    parts = [f"step {step.number:>{len(str(step.last))}}/{step.last}", f"{tokens:,.0f} tokens"]
    parts += [f"{name} {loss:.4f}" for name, loss in step.losses.items()]
    parts.append(f"lr {step.value('learning rate'):.2e}")
    if seconds > 0:
        parts.append(f"{step.value('global batch size') * sequence / seconds:,.0f} tokens/s")
        parts.append(f"{datetime.timedelta(seconds=round((step.last - step.number) * seconds))} left")
    for name in ("number of skipped iterations", "number of nan iterations"):
        if (number := step.value(name)) > 0 and math.isfinite(number):
            parts.append(f"{name} {number:.0f}")
    return "  ".join(parts)


def end_of(log: Path, begin: int) -> list[str]:
    """Return the end of the first traceback that a run left in the log, or what it printed last.

    The first is that of the process that failed: after it come those of whoever waited for it. `begin` is where the
    run's output begins, in bytes.
    """
    with log.open("rb") as file:
        file.seek(begin)
        lines = [_BY_RANK.sub("", line) for line in file.read().decode(errors="replace").splitlines()]
    first = next((i for i, line in enumerate(lines) if _TRACEBACK in line), None)
    if first is None:
        return [line for line in lines if line.strip()][-MOST_LINES:]
    end = first + 1
    while end < len(lines) and (lines[end][:1] in ("", " ") or _goes_on(lines, end)):
        end += 1
    return lines[first : end + 1][-MOST_LINES:]


def _goes_on(lines: Sequence[str], at: int) -> bool:
    """Return whether the exception of this line led to another, whose traceback follows."""
    after = next((line for line in lines[at + 1 :] if line.strip()), "")
    words = ("During handling of", "The above exception was", _TRACEBACK)
    return lines[at].startswith(words) or after.startswith(words[:2])


def show(text: str) -> None:
    """Print to the terminal; the training goes on where nobody reads that any more."""
    try:
        print(plain(text), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
