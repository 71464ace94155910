"""What reconstruction is worth without a step of training, on a real model: perplexity on two texts, by arm.

    python benchmarks/reconstruction.py --work-dir runs/reconstruction      # up to twenty minutes an arm on a core

The model is SmolLM2-135M (real_model.py), learned from is English, and measured are English that was not seen and, as
another domain, Python code. An arm is one run of prune_llama.py and one of the evaluation; each is done once, and what
is done is kept, so that the benchmark may be stopped and goes on where it was. `--only WORD` does the arms that have it
in their names. Prints a table, and writes benchmarks/results/reconstruction.json, from which docs/tables.py makes the
tables of docs/en/reconstruct.md, and draws assets/reconstruction.png and assets/reconstruction_sizes.png.

The results are JSON: `benchmark`, `machine`, `model`, `length` (tokens of a sequence), `parent` and `arms`: of each its
`parameters`, perplexity on `english` and `code`, and the `cpu_seconds` and peak `megabytes` (of anonymous memory, the
pages of mapped files not counted) of prune_llama.py.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

from experiment import RESULTS, ROOT, Cost, command, machine, show, write_results
from real_model import real_model, texts

LENGTH, SEQUENCES, EVALUATED = 512, 48, 24  # tokens; sequences to learn from, and to evaluate on
WIDTH = ("--hidden-size-remain", 450, "--ffn-hidden-size-remain", 1152)
CONTRIBUTION = ("--criterion", "contribution")
REBUILT = (
    *CONTRIBUTION,
    "--reconstruct",
    "--data-path",
    "ENGLISH",
    "--sequences",
    SEQUENCES,
    "--sequence-length",
    LENGTH,
)
DEPTHS = (27, 24, 21, 15)  # layers, of 30
INFLUENCE = ("--layer-criterion", "block_influence", "--scores", "SCORES")
ROTATED = ("--rotate-hidden", "--untie")
FIXED = ("--ridge", 0.01)
MIXED = ("0.5", "ENGLISH", "0.5", "CODE")


def replaced(flags: tuple[object, ...], **values: object) -> tuple[object, ...]:
    """Return flags with the values after some of them replaced; `data_path` takes several."""
    found = list(flags)
    for name, value in values.items():
        at = found.index(f"--{name.replace('_', '-')}") + 1
        found[at : at + 1] = value if isinstance(value, tuple) else (value,)
    return tuple(found)


ARMS: dict[str, tuple[object, ...]] = {
    "random": (*WIDTH, "--criterion", "random"),
    "magnitude": (*WIDTH, "--criterion", "magnitude"),
    "activation": (*WIDTH, "--criterion", "activation", "--scores", "SCORES", "--no-correct-norms"),
    "activation, norms corrected": (*WIDTH, "--criterion", "activation", "--scores", "SCORES"),
    "contribution, norms corrected": (*WIDTH, *CONTRIBUTION, "--scores", "SCORES"),
    "reconstructed": (*WIDTH, *REBUILT),
    "rotated, reconstructed, untied": (*WIDTH, *REBUILT, *ROTATED),
    "reconstructed, ridge 0.01": (*WIDTH, *REBUILT, *FIXED),
    "rotated, reconstructed, untied, ridge 0.01": (*WIDTH, *REBUILT, *ROTATED, *FIXED),
    "rotated, untied": (*WIDTH, *REBUILT, *ROTATED, "--ridge", "inf"),
    "reconstructed, untied": (*WIDTH, *REBUILT, "--untie"),
    "reconstructed on both texts": replaced((*WIDTH, *REBUILT), data_path=MIXED),
    "rotated, reconstructed on both texts, untied": replaced((*WIDTH, *REBUILT, *ROTATED), data_path=MIXED),
    "reconstructed, 16 sequences": replaced((*WIDTH, *REBUILT), sequences=16),
    "reconstructed, 192 sequences": replaced((*WIDTH, *REBUILT), sequences=192),
    **{f"depth {depth} of 30, {how}": ("--num-layers-remain", depth, *flags)
       for depth in DEPTHS
       for how, flags in {"block influence": INFLUENCE, "reconstructed": REBUILT}.items()},
    "ffn 1152, contribution": ("--ffn-hidden-size-remain", 1152, *CONTRIBUTION, "--scores", "SCORES"),
    "ffn 1152, reconstructed": ("--ffn-hidden-size-remain", 1152, *REBUILT),
    "hidden 540, ffn 1440, reconstructed": ("--hidden-size-remain", 540, "--ffn-hidden-size-remain", 1440, *REBUILT),
    "hidden 540, ffn 1440, depth 27, reconstructed": (
        "--hidden-size-remain", 540, "--ffn-hidden-size-remain", 1440, "--num-layers-remain", 27, *REBUILT,
    ),
    "hidden 504, ffn 1344, reconstructed": ("--hidden-size-remain", 504, "--ffn-hidden-size-remain", 1344, *REBUILT),
    "hidden 396, ffn 960, reconstructed": ("--hidden-size-remain", 396, "--ffn-hidden-size-remain", 960, *REBUILT),
}  # fmt: skip


SERIES = {  # arms that differ in how much is left
    "width, reconstructed": (
        "hidden 540, ffn 1440, reconstructed", "hidden 504, ffn 1344, reconstructed", "reconstructed",
        "hidden 396, ffn 960, reconstructed",
    ),
    **{f"depth, {how}": tuple(f"depth {depth} of 30, {how}" for depth in DEPTHS)
       for how in ("reconstructed", "block influence")},
    "both, reconstructed": ("hidden 540, ffn 1440, depth 27, reconstructed",),
}  # fmt: skip
COSTS = {"cpu_seconds": "CPU seconds", "megabytes": "MB"}  # of prune_llama.py, where they were measured

OTHERS = ("nvidia-modelopt 0.47, activation", "SliceGPT with its matrices, ffn by contribution")  # of other_ways.py


class Bench:
    """The folder of the benchmark and what is known already."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.file = work, work / "results.json"
        self.results: dict[str, dict[str, float]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.parent = real_model(work)
        self.texts = texts(work, self.parent)

    def scores(self) -> Path:
        """Return the parent's scores on what is learned from."""
        file = self.work / "scores"
        if not file.exists():
            command(
                "tools/score_importance.py", "--load", self.parent, "--data", self.texts["english"][0], "--save", file,
                "--sequences", SEQUENCES, "--sequence-length", LENGTH,
            )  # fmt: skip
        return file

    def arm(self, name: str, flags: tuple[object, ...]) -> None:
        """Do an arm, unless it is done."""
        if name in self.results:
            return
        path = self.work / "arm"
        cost = self.prune(path, flags)
        self.keep(name, {**self.measure(path), "cpu_seconds": round(cost.cpu), "megabytes": round(cost.anonymous)})
        shutil.rmtree(path)

    def prune(self, path: Path, flags: tuple[object, ...]) -> Cost:
        """Prune the parent into a Hugging Face directory, and return what it took."""
        places = {name.upper(): prefixes[0] for name, prefixes in self.texts.items()}
        if "SCORES" in flags:
            places["SCORES"] = self.scores()
        words = [places.get(flag, flag) if isinstance(flag, str) else flag for flag in flags]
        return command(
            "prune_llama.py", "--load", self.parent, "--save", path, "--format", "hf", "--overwrite",
            "--min-scores-tokens", 1, *words,
        )  # fmt: skip

    def other(self, name: str, packages: Path | None) -> None:
        """Do an arm of another way, unless it is done."""
        if name in self.results:
            return
        found, path, ffn = self.work / "other.json", self.work / "arm", WIDTH[-1]
        if name == OTHERS[0]:
            way = ("minitron", "--load", self.parent, "--ffn-hidden-size", ffn, "--packages", packages)
        else:
            self.prune(path, ARMS[f"ffn {ffn}, contribution"])
            way = ("slicegpt", "--load", path)
        valid = [f"{text}={prefix}" for text, (_, prefix) in self.texts.items()]
        command(
            "benchmarks/other_ways.py", *way, "--hidden-size", WIDTH[1], "--data", self.texts["english"][0],
            "--sequences", SEQUENCES, "--sequence-length", LENGTH, "--valid", *valid, "--valid-sequences", EVALUATED,
            "--json", found,
        )  # fmt: skip
        self.keep(name, json.loads(found.read_text()))
        shutil.rmtree(path, ignore_errors=True)

    def measure(self, path: Path) -> dict[str, float]:
        """Return a model's parameters and its perplexity on each text."""
        from megatron.pruning.formats import open_checkpoint
        from megatron.pruning.storage.processes import World
        from megatron.pruning.training.evaluation import Evaluation
        from megatron.pruning.training.tokens import windows

        opened = open_checkpoint(path)
        reader, found = Evaluation(World(), False, "fp32", "cpu", 4), {"parameters": opened.config.parameters}
        model = reader.model(opened)
        for name, (_, valid) in self.texts.items():
            data = windows(valid, LENGTH, EVALUATED, opened, spread=True)
            found[name] = round(math.exp(reader.loss(opened, model, data)), 2)
        return found

    def keep(self, name: str, result: dict[str, float]) -> None:
        """Write a result down."""
        self.results[name] = result
        aside = self.file.with_suffix(".new")
        aside.write_text(json.dumps(self.results, indent=1) + "\n")
        aside.replace(self.file)
        print(f"{name}: {result}", flush=True)


def draw_sizes(file: Path, parent: dict[str, float], arms: dict[str, dict[str, float]]) -> None:
    """Draw the perplexity by what share of the parameters is left, for each of SERIES."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, both = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharex=True)
    for axes, text, label in zip(both, ("english", "code"), ("English text", "Python code"), strict=True):
        for (name, members), style in zip(SERIES.items(), ("C0o-", "C1s-", "C1s:", "C2^-"), strict=True):
            points = {100 * arms[arm]["parameters"] / parent["parameters"]: arms[arm][text] for arm in members}
            axes.plot([100, *points], [parent[text], *points.values()], style, label=name)
        rebuilt = (arm for name, members in SERIES.items() for arm in members if "reconstructed" in name)
        axes.set(xlabel="parameters left (%)", ylabel="perplexity", title=label, yscale="log")
        axes.set_ylim(top=2 * max(arms[arm][text] for arm in rebuilt))  # what is only cut leaves the picture
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    both[0].invert_xaxis()
    both[0].legend(fontsize=9)
    figure.savefig(file, dpi=100)
    print(f"figure: {file}")


def draw(file: Path, parent: dict[str, float], arms: dict[str, dict[str, float]]) -> None:
    """Draw the perplexity of each arm on both texts; the parent's are lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.45 * len(arms)), layout="constrained")
    for offset, text, label, color in (
        (-0.2, "english", "English text", "tab:blue"), (0.2, "code", "Python code", "tab:orange"),
    ):  # fmt: skip
        places = [number + offset for number in range(len(arms))]
        bars = axes.barh(places, [arm[text] for arm in arms.values()], 0.38, color=color, label=label)
        axes.bar_label(bars, [f"{arm[text]:,.0f}" for arm in arms.values()], padding=3, fontsize=9)
        axes.axvline(parent[text], color=color, linestyle="--", label=f"the parent: {parent[text]:.1f}")
    axes.set_yticks(range(len(arms)), list(arms))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=8 * max(arm[text] for arm in arms.values() for text in ("english", "code")))
    axes.set_xlabel("perplexity, without a step of training")
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(file, dpi=100)
    print(f"figure: {file}")


def main() -> None:
    """Do what is left of the benchmark, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "reconstruction", metavar="DIR")
    parser.add_argument("--only", default="", metavar="WORD", help="do the arms that have this in their names")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="with nvidia-modelopt: other_ways.py says how")
    parser.add_argument("--json", type=Path, default=RESULTS / "reconstruction.json", metavar="FILE")
    parser.add_argument("--figure", type=Path, default=ROOT / "assets" / "reconstruction.png", metavar="PNG")
    args = parser.parse_args()
    bench = Bench(args.work_dir)
    if "parent" not in bench.results:
        bench.keep("parent", bench.measure(bench.parent))
    for name, flags in ARMS.items():
        if args.only in name:
            bench.arm(name, flags)
    for name in OTHERS:
        if args.only in name and (args.packages or name != OTHERS[0]):
            bench.other(name, args.packages)
    done = {name: bench.results[name] for name in (*OTHERS, *ARMS) if name in bench.results}
    rows = [["arm", "parameters", "english", "code", *COSTS.values()]]
    for name, one in {"parent": bench.results["parent"], **done}.items():
        rows.append([name, f"{one['parameters']:,}", *(f"{one[text]:.1f}" for text in ("english", "code")),
                     *(f"{one[cost]:,}" if cost in one else "" for cost in COSTS)])  # fmt: skip
    show(rows)
    of_one_shape = {name: one for name, one in done.items() if not name.startswith(("depth", "ffn", "hidden"))}
    draw(args.figure, bench.results["parent"], of_one_shape)
    if all(arm in done for members in SERIES.values() for arm in members):
        draw_sizes(args.figure.with_stem(f"{args.figure.stem}_sizes"), bench.results["parent"], done)
    write_results(
        args.json,
        {
            "benchmark": "reconstruction",
            "machine": machine(),
            "model": "SmolLM2-135M",
            "length": LENGTH,
            "sequences": SEQUENCES,
            "parent": bench.results["parent"],
            "arms": done,
        },
    )


if __name__ == "__main__":
    main()
