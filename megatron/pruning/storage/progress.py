"""How far long work has come: a bar on a terminal, plain lines in a log."""

import sys
import threading
import time


class Progress:
    """One bar with rate and ETA on a terminal, a plain line every ten seconds in a log; quiet unless `show`."""

    quiet = False  # a run that is to print nothing shows none

    def __init__(self, what: str, total: int, show: bool, unit: str = "B", before: int = 0) -> None:
        """`before` of the `total` units were done by an earlier run."""
        self.what, self.total, self.unit, self.before = what, total, unit, before
        self.done: float = before
        self.show = show and not self.quiet
        self.start = self.last_line = time.monotonic()
        self.bar = None
        self.lock = threading.Lock()
        if self.show and sys.stderr.isatty():
            from tqdm import tqdm  # a tenth of a second that --help and logs do without

            self.bar = tqdm(total=total, desc=what, unit=unit, initial=before, unit_scale=True, leave=False)

    def advance(self, count: float) -> None:
        """Count `count` more units, bytes unless told otherwise, as done."""
        with self.lock:
            self.done += count
            if self.bar is not None:
                self.bar.update(count)
            elif self.show and time.monotonic() - self.last_line > 10:
                self.last_line = time.monotonic()
                rate = (self.done - self.before) / (self.last_line - self.start)
                left = (self.total - self.done) / rate
                speed = f"{rate / 1e6:.1f} MB/s" if self.unit == "B" else f"{rate:.2f} {self.unit}/s"
                print(f"{self.what}: {self.done / self.total:.0%}, {speed}, {left:.0f} s left", flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
