"""The text that a reconstruction learns from: windows of several texts by weight, of which a tenth is held out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.training.tokens import Tokens, windows

HELD_OUT = 9  # sequences to learn from for each that is held out
STRETCH_TOKENS = 4096  # that go through a layer at once


@dataclass(frozen=True)
class Stretch:
    """Sequences that go through the model together, by number."""

    number: int
    sequences: tuple[int, ...]
    held_out: bool


@dataclass(frozen=True)
class Calibration:
    """Windows `[sequences, length + 1]`, which of them are held out, and the share of each text."""

    tokens: Tokens
    held_out: NDArray[np.bool_]
    shares: Mapping[str, float]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return int(self.tokens.shape[1]) - 1

    @property
    def stretches(self) -> list[Stretch]:
        """The sequences in handy portions, none of which is partly held out."""
        size, found = max(1, STRETCH_TOKENS // self.length), []
        for held_out in (False, True):
            which = np.flatnonzero(self.held_out == held_out).tolist()
            found += [(tuple(which[i : i + size]), held_out) for i in range(0, len(which), size)]
        return [Stretch(number, *portion) for number, portion in enumerate(found)]


def calibration(
    blend: Sequence[str], length: int, sequences: int, checkpoint: Checkpoint, flag: str = "--data"
) -> Calibration:
    """Return about `sequences` windows to learn from, of several texts by weight, and a ninth as many held out.

    `blend` is one text, several, or weights and texts in turns, as in `0.7 a 0.3 b`; a text is what `windows` takes.
    `flag` is the one that named them.

    Raises ValueError for a blend that cannot be meant, and for texts that `windows` refuses.
    """
    tokens, held_out, shares = [], [], parse_blend(blend, flag)
    for text, share in shares.items():
        wanted = max(1, round(sequences * share))
        found = windows(Path(text), length, wanted + -(-wanted // HELD_OUT), checkpoint, True, flag)
        if len(found) < 2:
            raise ValueError(f"{flag} {text} has one sequence of {length} tokens: two are needed, one held out")
        tokens.append(found)
        held_out.append(np.arange(len(found)) % (HELD_OUT + 1) == min(HELD_OUT, len(found) - 1))
    return Calibration(np.concatenate(tokens), np.concatenate(held_out), shares)


def parse_blend(blend: Sequence[str], flag: str) -> dict[str, float]:
    """Return the share of each text. Raises ValueError where it is not clear what is meant."""
    if len(blend) % 2 == 0 and all(_is_number(word) for word in blend[::2]):
        weights = dict(zip(blend[1::2], map(float, blend[::2]), strict=True))
        if len(weights) * 2 != len(blend) or not all(0 < weight < float("inf") for weight in weights.values()):
            raise ValueError(f"{flag} {' '.join(blend)}: each text once, with a weight above 0")
    elif len(set(blend)) == len(blend) and not any(_is_number(word) for word in blend):
        weights = dict.fromkeys(blend, 1.0)
    else:
        raise ValueError(f"{flag} {' '.join(blend)}: name texts, or weights and texts in turns: 0.7 a 0.3 b")
    return {text: weight / sum(weights.values()) for text, weight in weights.items()}


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
