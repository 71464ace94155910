"""Tables of the pages in docs/en and docs/zh: flags as argparse has them, results as the benchmarks wrote them.

The pages call these functions in comments that cog runs; what a function prints stands between the comment and the
`[[[end]]]` after it. From the top of the repository, to make all tables again, and to check that none is out of date:

    cog -P -I docs -I . -r docs/en/*.md docs/zh/*.md
    cog -P -I docs -I . --check docs/en/*.md docs/zh/*.md

A page in docs/zh gets the words of docs/zh/flags.json and docs/zh/words.json. A flag, a heading or a name without a
translation ends the run with a sentence, and so does a translation of a flag that there is no more.
"""

import argparse
import importlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"
FLAG_WORDS, OTHER_WORDS = DOCS / "zh" / "flags.json", DOCS / "zh" / "words.json"
SCRIPTS = (ROOT, ROOT / "tools", ROOT / "tools" / "checkpoint_conversion")


# Languages ------------------------------------------------------------------------------------------------------------


def is_chinese() -> bool:
    """Return whether the page that cog is at lies in docs/zh."""
    import cog  # cog makes this module while it runs

    return "zh" in Path(cog.inFile).parts


def said(text: str, *values: object) -> str:
    """Return `text` in the language of the page, with `values` in the places of its {}.

    Raises ValueError where docs/zh/words.json has no Chinese for it.
    """
    if text and is_chinese():
        words: Mapping[str, str] = _read(OTHER_WORDS)
        if text not in words:
            raise ValueError(f"{OTHER_WORDS} has no Chinese for {text!r}: add it")
        text = words[text]
    return text.format(*values)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table; the first row is its heading."""
    first, *others = rows
    print(f"\n| {' | '.join(first)} |")
    print("|---" * len(first) + "|")
    for row in others:
        print(f"| {' | '.join(row)} |")


# Code -----------------------------------------------------------------------------------------------------------------


def source(file: str, part: str) -> None:
    """Print the lines of a Python file between the comments `part: begin` and `part: end`."""
    text = (ROOT / file).read_text(encoding="utf-8")
    _, begin, rest = text.partition(f"# {part}: begin\n")
    code, end, _ = rest.partition(f"# {part}: end\n")
    if not begin or not end:
        raise ValueError(f"{file} has no part between '# {part}: begin' and '# {part}: end'")
    print(f"\n```python\n{code.strip()}\n```\n")


# Flags ----------------------------------------------------------------------------------------------------------------


def flags(script: str) -> None:
    """Print a table of the flags of a script for each group of its parser, named `prune_llama`, `convert` and so on.

    Of `pretrain_gpt` these are the flags that this project adds to Megatron's. Raises ValueError as `meanings` does.
    """
    parser = parser_of(script)
    translated = meanings(script, parser, _read(FLAG_WORDS)) if is_chinese() else {}
    for title, actions in groups_of(parser).items():
        if title:
            print(f"\n**{translated.get(title, title)}**")
        rows: list[Sequence[str]] = [(said("flag"), said("meaning"))]
        for action in actions:
            english = (action.help or "") % {**vars(action), "prog": parser.prog}
            text = translated.get(_name(action), english).replace("|", "\\|")
            rows.append((f"`{_form(action)}`", re.sub(r"--[a-z][a-z-]*[a-z]", r"`\g<0>`", text)))
        show(rows)
    print()


def parser_of(script: str) -> argparse.ArgumentParser:
    """Return the parser of a script, without running it."""
    sys.path[:0] = [str(folder) for folder in SCRIPTS if str(folder) not in sys.path]  # cog resets it for each page
    if script == "pretrain_gpt":
        from megatron.pruning.training.quiet import quiet_imports

        with quiet_imports():
            from megatron.pruning.training.flags import add_defaults
        return add_defaults(argparse.ArgumentParser())
    parser: argparse.ArgumentParser = importlib.import_module(script).parser()
    return parser


def meanings(
    script: str, parser: argparse.ArgumentParser, sections: Mapping[str, Mapping[str, str]]
) -> Mapping[str, str]:
    """Return the Chinese meaning of each flag and the Chinese title of each group of a parser.

    `sections` are those of docs/zh/flags.json; the name of a section lists the scripts that it is for. Raises
    ValueError, naming them, when a flag or a title has no translation, and when a translation has none of them.
    """
    found: dict[str, str] = {}
    for name, section in sections.items():
        if script in name.split(", "):
            found |= section
    groups = groups_of(parser)
    wanted = {_name(action) for actions in groups.values() for action in actions} | {title for title in groups if title}
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"{FLAG_WORDS} has no Chinese for these of {script}: {', '.join(missing)}")
    if strange := sorted(found.keys() - wanted):
        raise ValueError(f"{FLAG_WORDS} translates what {script} has not, or has no more: {', '.join(strange)}")
    return found


def groups_of(parser: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
    """Return the arguments that help lists by the title of their group; "" is that of the groups every parser has."""
    found: dict[str, list[argparse.Action]] = {}
    for group in parser._action_groups:
        title = "" if group.title in ("options", "positional arguments") else str(group.title)
        title += f" ({group.description})" if group.description else ""
        for action in group._group_actions:
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
                found.setdefault(title, []).append(action)
    return found


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _form(action: argparse.Action) -> str:
    """Return a flag with its values, as it is typed."""
    if action.nargs == 0:
        return "`, `".join(action.option_strings)
    if not action.option_strings:
        return str(action.metavar or action.dest)
    value = action.metavar or ("\\|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    values = " ".join(value) if isinstance(value, tuple) else value
    return f"{_name(action)} {values}" + (" ..." if action.nargs in ("+", "*") else "")


# Results --------------------------------------------------------------------------------------------------------------


def criteria() -> None:
    """Print the table of benchmarks/criteria.py."""
    found = _read(RESULTS / "criteria.json")
    steps = list(next(iter(found["arms"].values()))["loss"])
    marks = [said("right after") if step == "0" else said("{} steps", step) for step in steps]
    rows = [["", *marks, said("learning rate")]]
    for name, arm in found["arms"].items():
        rows.append([said(name), *(_spread(arm["loss"][step]) for step in steps), f"{arm['learning_rate']:g}"])
    show(rows)
    _caption(said(found["machine"]), _seeds(found), said("parent {}", f"{found['parent']:.3f}"))
    print()


def recovery(family: str = "tiny") -> None:
    """Print the table of benchmarks/recovery.py."""
    found = _read(RESULTS / f"recovery-{family}.json")
    marks = sorted({int(tokens) for arm in found["arms"].values() for tokens in arm["loss"]})
    counts = (f"{tokens / 1e6:.2f}M" if tokens else "0" for tokens in marks)
    rows = [[said("tokens"), *counts, said("learning rate"), said("worth from scratch")]]
    for name, arm in found["arms"].items():
        cells = [_spread(arm["loss"][str(tokens)]) if str(tokens) in arm["loss"] else "" for tokens in marks]
        worth = said(f"{arm['worth']['is']} {{}}", f"{arm['worth']['tokens'] / 1e6:.1f}M") if "worth" in arm else ""
        rows.append([said(name), *cells, f"{arm['learning_rate']:g}", worth])
    show(rows)
    _caption(said(found["machine"]), _seeds(found), said("{} tokens a step", f"{found['step_tokens']:,}"))
    print()


# Arms of benchmarks/reconstruction.py that cut the same shape and differ in what is kept, and the one to compare with.
CHOICES = (
    "random",
    "magnitude",
    "activation",
    "activation, norms corrected",
    "contribution, norms corrected",
    "reconstructed",
)


OTHER_SIZES = ("depth", "ffn", "hidden")  # with which arms of benchmarks/reconstruction.py begin


def reconstruction(names: Sequence[str] = (), of_other_sizes: bool = False) -> None:
    """Print the table of benchmarks/reconstruction.py: of arms that are named, of one shape, or of other sizes."""
    found = _read(RESULTS / "reconstruction.json")
    wanted = names or [name for name in found["arms"] if name.startswith(OTHER_SIZES) == of_other_sizes]
    arms = {name: found["arms"][name] for name in wanted}
    rows = [["", *(said(word) for word in ("parameters", "English text", "Python code"))]]
    for name, arm in {"the parent": found["parent"], **arms}.items():
        perplexity = (f"{arm[text]:,.1f}" for text in ("english", "code"))
        rows.append([said(name), f"{arm['parameters'] / 1e6:.1f}M", *perplexity])
    show(rows)
    _caption(said(found["machine"]), found["model"])
    print()


def above_the_parent() -> None:
    """Print what is left above the parent's loss: of the reference's runs, and of the best here."""
    heading = ("", "tokens of recovery", "parent", "recovered", "above the parent")
    rows = [[said(word) for word in heading]]
    for name, run in _read(RESULTS / "reference.json")["runs"].items():
        tokens, loss = list(run["loss"].items())[-1]
        rows.append(
            [name, f"{int(tokens) / 1e9:.0f}B", f"{run['parent']:.2f}", f"{loss:.3f}", f"{loss - run['parent']:.2f}"]
        )
    found = _read(RESULTS / "recovery-tiny.json")
    parent, ends = found["parent"], []
    for arm in found["arms"].values():
        if "deviation" in (last := list(arm["loss"].items())[-1])[1] and "worth" in arm:
            ends.append((last[1]["mean"], int(last[0])))
    loss, tokens = min(ends)
    sizes = " -> ".join(f"{found['parameters'][name] / 1e6:.1f}M" for name in ("parent", "pruned"))
    rows.append([sizes, f"{tokens / 1e6:.1f}M", f"{parent:.3f}", f"{loss:.3f}", f"{loss - parent:.2f}"])
    show(rows)
    print()


def reference() -> None:
    """Print the losses that the reference published, by tokens."""
    runs = _read(RESULTS / "reference.json")["runs"]
    marks = sorted({int(tokens) for run in runs.values() for tokens in run["loss"]})
    rows = [[said("tokens"), *(f"{tokens / 1e9:.0f}B" for tokens in marks), said("parent")]]
    for name, run in runs.items():
        losses = (f"{run['loss'][str(tokens)]:.3f}" if str(tokens) in run["loss"] else "" for tokens in marks)
        rows.append([name, *losses, f"{run['parent']:.2f}"])
    show(rows)
    print()


# Name in the results of benchmarks/streaming.py -> heading and format.
STREAMING = {
    "output_gigabytes": ("output GB", ".1f"),
    "seconds": ("seconds", ".2f"),
    "of_copy": ("of `cp`", ".2f"),
    "of_durable_copy": ("of `cp` and fsync", ".2f"),
    "anonymous_megabytes": ("anonymous MB", ".0f"),
    "by_hand_seconds": ("by hand, seconds", ".1f"),
    "times_faster": ("faster than by hand", ".1f"),
    "by_hand_megabytes": ("by hand, MB", ".0f"),
    "rounds": ("rounds", "d"),
}


def streaming(model: str, *figures: str) -> None:
    """Print these figures, by the names of STREAMING, of every case of benchmarks/streaming.py with a model."""
    found = _read(RESULTS / f"streaming-{model}.json")
    rows = [[f"{model.upper()}, bf16", *(said(STREAMING[name][0]) for name in figures)]]
    for case, measured in found["cases"].items():
        cells = (format(measured[name], STREAMING[name][1]) if name in measured else "" for name in figures)
        rows.append([said(case), *cells])
    show(rows)
    _caption(said(found["machine"]), said("medians over the rounds"))
    print()


def training(*models: str) -> None:
    """Print the speeds of benchmarks/training.py, the models side by side."""
    found = [_read(RESULTS / f"training-{model}.json") for model in models]
    headings = [text for model in models for text in (said("{}, tokens a second", model), said("to the Trainer"))]
    rows = [["", *headings]]
    for arm in found[0]["arms"]:
        cells = [result["arms"][arm] for result in found]
        rows.append(
            [said(arm), *(c for a in cells for c in (f"{a['tokens_per_second']:,.0f}", f"{a['to_the_trainer']:.2f}"))]
        )
    show(rows)
    for result in found:
        _batch_caption(result)
    print()


def training_on_gpu(model: str) -> None:
    """Print the speeds of benchmarks/training.py on a GPU, with what they take of it."""
    result = _read(RESULTS / f"training-{model}.json")
    columns = {"tokens_per_second": ",.0f", "to_the_trainer": ".2f", "utilisation": ".1%", "memory_gigabytes": ".1f"}
    headings = ("tokens a second", "to the Trainer", "model FLOP utilisation", "memory, GB")
    rows = [["", *map(said, headings)]]
    for arm, found in result["arms"].items():
        rows.append([said(arm), *(format(found[name], form) for name, form in columns.items())])
    show(rows)
    _batch_caption(result)
    print()


def recorded_teacher() -> None:
    """Print both tables of benchmarks/teacher.py: the losses by what is learned from, and the speeds by model."""
    found = _read(RESULTS / "teacher.json")
    marks = list(next(iter(found["loss"].values())))
    rows = [[said("tokens"), *(f"{int(tokens) / 1e6:.2f}M" for tokens in marks)]]
    rows += [[said(arm), *(_spread(losses[tokens]) for tokens in marks)] for arm, losses in found["loss"].items()]
    show(rows)
    _caption(said(found["machine"]), _seeds(found))
    models = found["speed"]
    headings = [text for model in models for text in (said("{}, tokens a second", model), said("to the LM loss"))]
    rows = [["", *headings]]
    for arm in next(iter(models.values())):
        cells = [speeds[arm] for speeds in models.values()]
        rows.append([said(arm), *(c for a in cells for c in (f"{a['tokens_per_second']:,.0f}", f"{a['to_lm']:.2f}"))])
    show(rows)
    _caption(said(found["machine"]), said("{} rounds", found["rounds"]))
    print()


def rounds() -> None:
    """Print the table of benchmarks/rounds.py: the losses by the number of rounds."""
    found = _read(RESULTS / "rounds.json")
    rows = [["", said("parent"), *(said("{} round" if n == "1" else "{} rounds", n) for n in found["rounds"])]]
    rows.append([said("loss"), f"{found['parent']:.3f}", *(_spread(loss) for loss in found["rounds"].values())])
    show(rows)
    _caption(said(found["machine"]), _seeds(found), said("{} tokens in all", f"{found['tokens'] / 1e6:.2f}M"))
    print()


def shapes_trained() -> None:
    """Print the other table of benchmarks/rounds.py: shapes, as they are at once and as training leaves them."""
    found = _read(RESULTS / "rounds.json")
    rows = [[said("shape"), *_AXES, said("at once"), said("trained")]]
    for number, shape in enumerate(found["shapes"], start=1):
        rows.append([f"{number}", *_sizes(shape), f"{shape['at_once']:.3f}", f"{shape['trained']:.3f}"])
    show(rows)
    trained = said("trained on {} tokens", f"{found['trained_tokens'] / 1e6:.2f}M")
    _caption(said(found["machine"]), trained, said("Spearman's rank correlation {}", f"{found['spearman']:.2f}"))
    print()


def shapes_measured() -> None:
    """Print the table of benchmarks/shapes.py: the shapes of a size, the best first."""
    found = _read(RESULTS / "shapes.json")
    rows = [["", *_AXES, said("parameters"), said("perplexity")]]
    ranked = {f"{number}": found["shapes"][number - 1] for number in found["best_first"]}
    alone = {said(f"{axis} alone"): shape for axis, shape in found["alone"].items()}
    for name, shape in {**ranked, **alone, said("the parent"): found["parent"]}.items():
        parameters, loss = f"{shape['parameters'] / 1e6:.1f}M", math.exp(shape["losses"]["0"])
        rows.append([name, *_sizes(shape), parameters, f"{loss:.1f}"])
    show(rows)
    _caption(said(found["machine"]), found["model"])
    print()


_AXES = ("layers", "hidden", "ffn", "heads")


def _sizes(shape: Mapping[str, Any]) -> list[str]:
    return [f"{shape['sizes'][axis]:,}" for axis in _AXES]


def _batch_caption(result: Mapping[str, Any]) -> None:
    batch = said("{} tokens a step", f"{result['global_batch_size']} x {result['sequence_length']}")
    rounds = said("{} round" if result["rounds"] == 1 else "{} rounds", result["rounds"])
    _caption(result["model"], said(result["machine"]), result["dtype"], rounds, batch)


def _spread(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.3f}" + (f" ± {found['deviation']:.3f}" if "deviation" in found else "")


def _seeds(found: Mapping[str, Any]) -> str:
    return said("{} seeds, mean ± standard deviation", found["seeds"]) if found["seeds"] > 1 else said("one seed")


def _caption(*facts: str) -> None:
    """Print under a table what was measured on, and how."""
    print("\n" + said("({})", said(", ").join(facts)))
