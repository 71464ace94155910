"""Pickles read as data: a small reader of our own that knows no classes and calls nothing.

A pickle is a program, and Python's unpicklers run it: they look up classes and call them, and even a harmless one may
be made to fill the memory or to hash for ever. Here a class is its name, an object a `Record` of what the pickle says
of it, and only opcodes that data needs are known. Time and memory are linear in the bytes read.

Python's pickletools, which runs nothing either, takes the opcodes and their operands apart and has a text about each.
"""

import itertools
import pickletools
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# The modules of the classes that a checkpoint's plain values have. None is imported: any other name is a sign that
# the file wants to do something, which is said instead of ignored.
_MODULES = frozenset("_codecs _io argparse collections megatron numpy pathlib signal torch transformer_engine".split())
_PLAIN_BUILTINS = frozenset(("set", "frozenset", "bytearray", "complex", "slice", "range", "object"))
# Ten times what the largest Llama needs with its optimizer: half a GB if all of them make lists, which a byte can.
_MAX_OPCODES = 8_000_000


class Name(str):
    """The dotted name of a class or function that a pickle mentions."""


@dataclass(eq=False)
class Record:
    """An object of a pickle: the class or function that makes it, its arguments, and the state it is given."""

    name: str
    args: tuple[Any, ...]
    state: Any = None

    def __getitem__(self, field: str) -> Any:
        """Return a field of a state that is a dictionary; raises KeyError when there is none."""
        if not isinstance(self.state, dict):
            raise KeyError(field)
        return self.state[field]

    def __repr__(self) -> str:
        return f"<{self.name}>"


class _Reader:
    def __init__(
        self, raw: bytes, makers: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any] | None
    ) -> None:
        self.raw, self.at, self.makers, self.persistent = raw, 0, makers, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: set[str] = set()

    def load(self) -> Any:
        """Run the opcodes up to the final STOP, and return what is on the stack then."""
        try:
            for opcode, operand, place in itertools.islice(pickletools.genops(self.raw), _MAX_OPCODES):
                self.at = place or 0
                if opcode.name == "STOP":
                    return self.stack.pop()
                if opcode.name not in _OPCODES:
                    raise ValueError(f"its pickle has the opcode {opcode.name}, which no data needs")
                _OPCODES[opcode.name](self, operand)
        except (LookupError, TypeError, AttributeError, RecursionError, MemoryError) as error:
            raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error
        raise ValueError(f"its pickle has more than {_MAX_OPCODES:,} opcodes")

    def _text(self, text: str) -> None:
        text.encode()  # half a surrogate pair, which genops lets pass, is no text
        self.stack.append(text)

    def _global(self, words: str) -> None:
        # genops undoes escapes; what runs a pickle does not, and would look up another name.
        module, name = words.split(" ", 1)
        if not self.raw.startswith(f"{module}\n{name}\n".encode(), self.at + 1):
            raise ValueError("it names a class with an escape or a space")
        self._name(module, name)

    def _since_mark(self) -> list[Any]:
        return self._pop(len(self.stack) - self.marks.pop())

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("its stack is empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _name(self, module: Any, name: Any) -> None:
        if module.split(".")[0] not in _MODULES and not (
            module in ("builtins", "__builtin__") and name in _PLAIN_BUILTINS
        ):
            raise NotDataError(f"it names {module}.{name}"[:200])
        if len(module) + len(name) > 200:
            raise ValueError(f"it names a class with {len(module) + len(name)} letters")
        self.names.add(f"{module}.{name}")
        self.stack.append(Name(f"{module}.{name}"))

    def _make(self, name: Any, args: Any) -> None:
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise ValueError("it makes an object of what is not a class")
        self.stack.append(self.makers[name](*args) if name in self.makers else Record(name, args))

    def _build(self, state: Any) -> None:
        made = self.stack[-1]
        if isinstance(made, Record):
            made.state = state
        elif isinstance(made, Namespace) and isinstance(state, dict) and all(isinstance(name, str) for name in state):
            vars(made).update(state)
        elif not isinstance(made, dict):  # the attributes of a kind of dictionary are not wanted
            raise ValueError(f"it gives a state to {type(made).__name__}")

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Record):  # of a list of its own kind nothing is wanted
            raise ValueError(f"it appends to {type(target).__name__}")

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict | Record):
            raise ValueError(f"it sets an item of {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple of tuples of tuples ... can be made to hash for ever.
            parts = key if isinstance(key, tuple) else (key,)
            if any(isinstance(part, tuple | list | dict) for part in parts):
                raise ValueError("a key of it is not plain")
            if isinstance(target, dict):
                if key in target:
                    raise ValueError(f"it holds {str(key)[:100]!r} twice")
                target[key] = value


class NotDataError(ValueError):
    """A pickle names something that no data needs."""


_OPCODES: Mapping[str, Callable[[_Reader, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda r, _: None),  # say nothing that is needed
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), lambda r, value: r.stack.append(value)),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES"), lambda r, value: r.stack.append(value)),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), lambda r, value: r.stack.append(value.encode("latin-1"))),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), lambda r, value: r._text(value)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda r, number: r.memo.update({number: r.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda r, number: r.stack.append(r.memo[number])),
    "MEMOIZE": lambda r, _: r.memo.update({len(r.memo): r.stack[-1]}),
    "MARK": lambda r, _: r.marks.append(len(r.stack)),
    "POP": lambda r, _: r._pop(1),
    "POP_MARK": lambda r, _: r._since_mark(),
    "NONE": lambda r, _: r.stack.append(None),
    "NEWTRUE": lambda r, _: r.stack.append(True),
    "NEWFALSE": lambda r, _: r.stack.append(False),
    "EMPTY_TUPLE": lambda r, _: r.stack.append(()),
    "EMPTY_LIST": lambda r, _: r.stack.append([]),
    "EMPTY_DICT": lambda r, _: r.stack.append({}),
    "TUPLE": lambda r, _: r.stack.append(tuple(r._since_mark())),
    "TUPLE1": lambda r, _: r.stack.append(tuple(r._pop(1))),
    "TUPLE2": lambda r, _: r.stack.append(tuple(r._pop(2))),
    "TUPLE3": lambda r, _: r.stack.append(tuple(r._pop(3))),
    "APPEND": lambda r, _: r._extend(r._pop(1)),
    "APPENDS": lambda r, _: r._extend(r._since_mark()),
    "SETITEM": lambda r, _: r._set(r._pop(2)),
    "SETITEMS": lambda r, _: r._set(r._since_mark()),
    "GLOBAL": lambda r, words: r._global(words),
    "STACK_GLOBAL": lambda r, _: r._name(*r._pop(2)),
    "REDUCE": lambda r, _: r._make(*r._pop(2)),
    "NEWOBJ": lambda r, _: r._make(*r._pop(2)),
    "BUILD": lambda r, _: r._build(*r._pop(1)),
    "BINPERSID": lambda r, _: r.stack.append(r.persistent(*r._pop(1))) if r.persistent else r.marks.pop(),
}


def names_in(raw: bytes) -> set[str]:
    """Return the dotted names of all that a pickle names. Raises as `read_pickle` does."""
    reader = _Reader(raw, {}, lambda label: None)
    reader.load()
    return reader.names


def read_pickle(
    raw: bytes, makers: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Return what a pickle holds: plain values, and a `Record` for each object.

    `makers` make the few objects that are wanted as such, by the dotted name in the pickle; `persistent` makes one of
    a persistent id. Raises NotDataError, with the name, when the pickle names anything else than classes of data, and
    ValueError when it is damaged.
    """
    return _Reader(raw, makers, persistent).load()
