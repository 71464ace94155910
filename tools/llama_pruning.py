"""Prune, reconstruct, convert, score, evaluate and try out Llama checkpoints: one command for all tools.

llama-pruning prune --help
llama-pruning completion bash >~/.local/share/bash-completion/completions/llama-pruning
"""

import argparse
import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from megatron.pruning.cli.entry import run
from megatron.pruning.cli.flags import new_parser
from megatron.pruning.cli.speech import add_version_flag

NAME = "llama-pruning"  # of the installed command
TOOLS = {
    "prune": "prune_llama",
    "reconstruct": f"{__package__}.reconstruct",
    "convert": f"{__package__}.checkpoint_conversion.convert",
    "show": f"{__package__}.show_checkpoint",
    "score": f"{__package__}.score_importance",
    "evaluate": f"{__package__}.evaluate",
    "generate": f"{__package__}.generate",
    "preprocess": f"{__package__}.preprocess_data",
}  # each has a parser() and a command(), and begins its docstring with a sentence
SHELLS = ("bash", "zsh", "fish")


def parser(flags_of: Callable[[str], argparse.ArgumentParser] | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line, with the tools' flags where `flags_of` has them by a tool's name."""
    parser = new_parser(__doc__)
    parser.prog = NAME
    add_version_flag(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in TOOLS.items():
        commands.add_parser(name, help=summary(module), parents=[flags_of(name)] if flags_of else [], add_help=False)
    said = f"Print what lets a shell complete commands and flags: {', '.join(SHELLS)}."
    commands.add_parser("completion", help=said, description=said).add_argument("shell", choices=SHELLS)
    return parser


def summary(module: str) -> str:
    """Return the sentence that a tool's docstring begins with, without importing the tool."""
    found = importlib.util.find_spec(module)
    assert found and found.origin
    docstring = ast.get_docstring(ast.parse(Path(found.origin).read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]


def imported(name: str) -> ModuleType:
    """Import a tool, whose help then has its examples as they are typed with this command."""
    tool = importlib.import_module(TOOLS[name])
    tool.__doc__ = as_installed(tool.__doc__ or "")
    return tool


def as_installed(text: str) -> str:
    """Return a text in which this command stands wherever a file of the repository did, such as tools/evaluate.py."""
    names = {module.rpartition(".")[2]: name for name, module in TOOLS.items()}
    script = re.compile(
        rf"(python |torchrun [^\n]*?)?\b(?:tools/(?:checkpoint_conversion/)?)?({'|'.join(names)})\.py\b"
    )

    def typed(found: re.Match[str]) -> str:
        launcher = f"{found[1]}--no-python " if (found[1] or "").startswith("torchrun") else ""
        return f"{launcher}{NAME} {names[found[2]]}"

    return script.sub(typed, text)


def main(argv: Sequence[str]) -> None:
    """Print help, or what completes this command in a shell. Raises ValueError where shtab is not installed."""
    args = parser().parse_args(argv)
    if not importlib.util.find_spec("shtab"):
        raise ValueError("what completes commands is made by shtab, which is not installed: pip install shtab")
    import shtab

    def flags_of(name: str) -> argparse.ArgumentParser:
        flags: argparse.ArgumentParser = imported(name).parser()
        for action in flags._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        return flags

    print(shtab.complete(parser(flags_of), args.shell))


def command() -> None:
    """Run as the installed command does."""
    if (name := next(iter(sys.argv[1:]), None)) in TOOLS:
        sys.argv[:2] = [f"{NAME} {name}"]
        imported(name).command()
    else:
        run(main)
