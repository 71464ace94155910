"""The lines of the stock training loop's log that have numbers in them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_STEP = re.compile(r"\biteration +(\d+)/ *(\d+) \|(.*)")
# Of several texts, by --multiple-validation-sets, each has its number.
_VALIDATION = re.compile(r"validation(?:-(\d+))? loss at iteration (\d+)( on \w+ set)? .*?\b\w+ loss value: ")
_LOSS = re.compile(r"\b(\w+ loss) value: (\S+)")


@dataclass(frozen=True)
class Step:
    """A line of the training: the step, of how many, and its fields by name, as Megatron spells both."""

    number: int
    last: int
    fields: Mapping[str, str]

    @property
    def losses(self) -> dict[str, float]:
        """The losses in nats a token: the language model's, and the others that are trained on."""
        return {name: self.value(name) for name in self.fields if name.endswith(" loss")}

    def value(self, name: str) -> float:
        """Return a number of the line; NaN where it has none of this name."""
        try:
            return float(self.fields.get(name, "nan"))
        except ValueError:
            return float("nan")


def read_step(line: str) -> Step | None:
    """Return what a line says of a step, if it is about one."""
    if not (found := _STEP.search(line)):
        return None
    pairs = (field.rpartition(":") for field in found[3].split("|"))
    return Step(int(found[1]), int(found[2]), {name.strip(): value.strip() for name, _, value in pairs})


def read_validation(line: str) -> tuple[int, str, dict[str, float]] | None:
    """Return the step of a line that says losses on text that is not trained on, which text, and the losses by name.

    The text is "" where it is the one that is validated on, or the first of several.
    """
    if not (found := _VALIDATION.search(line)):
        return None
    text = f" on text {found[1]}" if found[1] not in (None, "0") else ""
    return int(found[2]), text + (found[3] or ""), {name: float(value) for name, value in _LOSS.findall(line)}
