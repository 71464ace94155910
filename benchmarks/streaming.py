"""What moving a checkpoint costs: each operation against `cp` of its output, and against the obvious way.

    # 1.1B, about 7 GB of disk: a table, the results, and the picture of docs/en/performance.md
    python benchmarks/streaming.py --figure assets/streaming.png

    # that picture again, of results that are there
    python benchmarks/streaming.py --results benchmarks/results/streaming-1.1b.json --figure assets/streaming.png

    # Llama-2 7B, about 42 GB of disk; some operations only
    python benchmarks/streaming.py --size 7b --cases "prune hf" "reshard torch tp1 to tp4"

    # 70B, of which 8 layers remain, from a sparse file that holds no bytes: what it says is the memory, not the speed
    python benchmarks/streaming.py --size 70b

Checkpoints of random bits are made tensor by tensor and removed at the end. In every round each operation runs right
before `cp -r` of its own output, plain and with an fsync of every file, and the way one would write it by hand, all
from a warm page cache; what is shown are medians over the rounds, of times and of ratios within a round. Our times hold
the start of Python and the fsync of every file. Peak anonymous memory is sampled from /proc, child processes included:
the pages of mapped files, which the kernel may drop, are not counted.

The results are JSON: `benchmark`, `model` (a --size), `machine`, and `cases`, from the name of a case to its figures by
the names of FIGURES and the number of `rounds`. A figure that was not measured is left out.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from experiment import Cost, measure

from megatron.pruning.model.config import LlamaConfig
from megatron.pruning.model.hf_config import config_to_hf
from megatron.pruning.model.weights import all_weights, weight_shape
from megatron.pruning.plan.report import table
from megatron.pruning.storage.safetensors_file import SafetensorsFile
from megatron.pruning.storage.small_files import as_json, write_durably
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.views import Bits, Index, View

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).with_name("peers.py")
RESULTS = Path(__file__).with_name("results")
PRUNE, CONVERT = str(ROOT / "prune_llama.py"), str(ROOT / "tools/checkpoint_conversion/convert.py")


def llama(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> LlamaConfig:
    """Return a bf16 Llama's shape; its vocabulary is Llama-2's."""
    return LlamaConfig(layers, hidden, ffn, heads, groups, hidden // heads, 32000)


SIZES = {
    "1.1b": (llama(22, 2048, 5632, 32, 4), (1536, 4224, 24, 18)),
    "7b": (llama(32, 4096, 11008, 32, 32), (3072, 8192, 24, 28)),
    "70b": (llama(80, 8192, 28672, 64, 8), (6144, 20480, 48, 8)),
}


@dataclass(frozen=True)
class Case:
    """One operation: the format and the tensor-parallel size it reads and writes, and the peer that does the same."""

    name: str
    source: str
    target: str
    tensor: int = 1
    peer: str | None = None

    def command(self, source: Path, target: Path, remain: Sequence[int]) -> list[str]:
        """Return the command line."""
        flags = ["--load", str(source), "--save", str(target), "--format", self.target]
        flags += ["--tensor-model-parallel-size", str(self.tensor)]
        if not self.name.startswith("prune"):
            return [sys.executable, CONVERT, *flags]
        names = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_layers")
        flags += [word for name, n in zip(names, remain, strict=True) for word in (f"--{name}_remain", str(n))]
        return [sys.executable, PRUNE, *flags]


CASES = (
    Case("prune hf", "hf", "hf", peer="prune_hf"),
    Case("prune torch", "torch", "torch", peer="prune_torch"),
    Case("prune torch_dist", "torch_dist", "torch_dist"),
    Case("prune hf to torch tp4", "hf", "torch", 4),
    Case("convert hf to torch", "hf", "torch", peer="import_torch"),
    Case("convert hf to torch_dist", "hf", "torch_dist"),
    Case("reshard torch tp1 to tp4", "torch", "torch", 4),
    Case("export torch to hf", "torch", "hf", peer="export_hf"),
    Case("export torch_dist to hf", "torch_dist", "hf"),
)


@dataclass
class Result:
    """The rounds of one case."""

    case: Case
    gigabytes: float = 0.0
    ours: list[Cost] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    durable_copy: list[float] = field(default_factory=list)
    peer: list[Cost] = field(default_factory=list)


class Noise(View):
    """A weight of random bits, the same block over and over."""

    dtype = "bf16"
    block = np.random.default_rng(0).integers(-(2**15), 2**15, 1 << 21, np.int16)

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def sources(self) -> Iterator[File]:
        return iter(())

    def read_into(self, rows: Index, out: Bits) -> None:
        flat = out.reshape(-1)
        for start in range(0, flat.size, self.block.size):
            part = flat[start : start + self.block.size]
            part[:] = self.block[: part.size]


def make_hf(path: Path, config: LlamaConfig, sparse: bool) -> None:
    """Write a Hugging Face checkpoint of random bits, or of the zeros of a sparse file."""
    from megatron.pruning.storage.progress import Progress

    path.mkdir(parents=True)
    (path / "config.json").write_bytes(as_json(config_to_hf(config, "bf16")))
    rows = all_weights(config.num_layers, config.tied)
    views = {weight.hf_key(layer): Noise(weight_shape(weight, config.sizes)) for weight, layer in rows}
    file = SafetensorsFile("model.safetensors", views)
    if sparse:
        header, *_, last = file.segments({})
        assert isinstance(header.content, bytes)
        (path / file.name).write_bytes(header.content)
        os.truncate(path / file.name, last.stop)
    else:
        file.write(path, Progress("", file.nbytes, show=False))


def warm(path: Path) -> None:
    """Read all files of a directory, so that they lie in the page cache as far as it holds them."""
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                buffer = bytearray(1 << 22)
                while stream.readinto(buffer):
                    pass


def size(path: Path) -> int:
    """Return the bytes of all files of a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def copy_seconds(source: Path, target: Path, durable: bool) -> float:
    """Return how long `cp -r` takes, with an fsync of every file or without."""
    warm(source)
    command = f"cp -r '{source}' '{target}'" + (f" && find '{target}' -exec sync {{}} +" if durable else "")
    start = time.perf_counter()
    subprocess.run(command, shell=True, check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


class Bench:
    """The checkpoints of one size, made when they are wanted, under `top`."""

    def __init__(self, size: str, top: Path, repeat: int, peers: bool) -> None:
        self.config, self.remain = SIZES[size]
        self.sparse = size == "70b"
        self.top, self.repeat, self.peers = top, repeat, peers

    def source(self, format: str) -> Path:
        """Return the checkpoint in a format. Any other is removed, to spare the disk."""
        path = self.top / f"source-{format}"
        if not path.exists():
            for other in self.top.glob("source-*"):
                shutil.rmtree(other)
            hf = self.top / "source-hf"
            make_hf(hf, self.config, self.sparse)
            if format != "hf":
                measure(Case("make", "hf", format).command(hf, path, ()))
                shutil.rmtree(hf)
        return path

    def run(self, case: Case) -> Result:
        """Measure one case, in rounds of everything there is to compare."""
        source, result = self.source(case.source), Result(case)
        kept, target = self.top / "kept", self.top / "target"
        for _ in range(self.repeat):
            warm(source)
            result.ours.append(measure(case.command(source, kept, self.remain)))
            result.gigabytes = size(kept) / 1e9
            for seconds, durable in ((result.copy, False), (result.durable_copy, True)):
                seconds.append(copy_seconds(kept, target, durable))
            if case.peer and self.peers:
                warm(source)
                command = [sys.executable, str(PEERS), case.peer, str(source), str(kept), str(target)]
                result.peer.append(measure(command))
                shutil.rmtree(target)
            shutil.rmtree(kept)
        return result

    def run_sparse(self, case: Case) -> Result:
        """Run a case once, on input that takes no disk; there is nothing to compare it to."""
        source, target = self.source(case.source), self.top / "target"
        cost = measure(case.command(source, target, self.remain))
        result = Result(case, size(target) / 1e9, [cost])
        shutil.rmtree(target)
        return result


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Return the median over the rounds of ours by theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if theirs else None


# Name in the results -> heading on the terminal, format, and how it is computed; None where it was not measured.
FIGURES: dict[str, tuple[str, str, Callable[[Result], float | None]]] = {
    "output_gigabytes": ("output GB", ".1f", lambda r: r.gigabytes),
    "seconds": ("s", ".2f", lambda r: statistics.median(c.wall for c in r.ours)),
    "processor_seconds": ("processor s", ".2f", lambda r: statistics.median(c.cpu for c in r.ours)),
    "copy_seconds": ("cp s", ".2f", lambda r: statistics.median(r.copy) if r.copy else None),
    "durable_copy_seconds": (
        "cp + fsync s", ".2f", lambda r: statistics.median(r.durable_copy) if r.durable_copy else None,
    ),
    "of_copy": ("of cp", ".2f", lambda r: ratio([c.wall for c in r.ours], r.copy)),
    "of_durable_copy": ("of cp + fsync", ".2f", lambda r: ratio([c.wall for c in r.ours], r.durable_copy)),
    "anonymous_megabytes": ("anonymous MB", ".0f", lambda r: max(c.anonymous for c in r.ours)),
    "by_hand_seconds": ("by hand s", ".1f", lambda r: statistics.median(c.wall for c in r.peer) if r.peer else None),
    "times_faster": (
        "times faster", ".1f", lambda r: ratio([c.wall for c in r.peer], [c.wall for c in r.ours]) if r.peer else None,
    ),
    "by_hand_megabytes": ("by hand MB", ".0f", lambda r: max(c.anonymous for c in r.peer) if r.peer else None),
}  # fmt: skip


def figures(result: Result) -> dict[str, float]:
    """Return the figures of a case that were measured, by name."""
    found = {name: value(result) for name, (_, _, value) in FIGURES.items()}
    return {name: value for name, value in found.items() if value is not None}


def rows(results: Sequence[Result]) -> list[Sequence[str]]:
    """Return a table for the terminal: a heading, and a row for each case."""
    shown: list[Sequence[str]] = [("", *(heading for heading, _, _ in FIGURES.values()))]
    for result in results:
        found = figures(result)
        cells = [format(found[name], form) if name in found else "-" for name, (_, form, _) in FIGURES.items()]
        shown.append((result.case.name, *cells))
    return shown


BARS = {
    "seconds": "this project, with fsync",
    "copy_seconds": "cp of the output",
    "durable_copy_seconds": "cp + fsync",
    "by_hand_seconds": "by hand: load, index_select, save",
}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write a picture of the median times of results, of those BARS that were measured."""
    from matplotlib.figure import Figure

    cases = results["cases"]
    bars = [name for name in BARS if any(name in case for case in cases.values())]
    width = 0.8 / len(bars)
    figure = Figure(figsize=(9, (0.25 * len(bars) + 0.1) * len(cases) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(bars):
        times = {row + width * i: case[name] for row, case in enumerate(cases.values()) if name in case}
        drawn = axes.barh(list(times), list(times.values()), 0.95 * width, label=BARS[name])
        axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
    axes.set_yticks([row + width * (len(bars) - 1) / 2 for row in range(len(cases))], list(cases))
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("seconds (median)")
    axes.set_title(f"{results['model'].upper()} bf16, {results['machine']}")
    figure.legend(loc="outside lower center", ncols=len(bars), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.1b", help="of the model (default 1.1b)")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds (default 5)")
    parser.add_argument("--no-peers", action="store_true", help="leave out the ways by hand")
    parser.add_argument("--work-dir", type=Path, help="where the checkpoints lie meanwhile (default: the system's)")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="write a picture")
    parser.add_argument("--results", type=Path, metavar="FILE", help="draw these results, and measure nothing")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the results are written (default: benchmarks/results/streaming-SIZE.json; with --cases: nowhere)",
    )
    args = parser.parse_args(argv)
    if args.results is not None and args.figure is None:
        parser.error("--results needs --figure: where the picture is written")
    results = json.loads(args.results.read_text()) if args.results is not None else measure_all(args)
    if args.figure is not None:
        draw(results, args.figure)


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for, print and write it; return the results as they are in the file."""
    cases = [case for case in CASES if case.name in (args.cases or [case.name])]
    if args.work_dir is not None:
        args.work_dir.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="streaming-", dir=args.work_dir) as top:
        bench = Bench(args.size, Path(top), args.repeat, not args.no_peers)
        if bench.sparse:
            cases = [case for case in cases if (case.source, case.name[:5]) == ("hf", "prune")]
        for case in cases:
            results.append(bench.run_sparse(case) if bench.sparse else bench.run(case))
            print("  ".join(rows(results[-1:])[-1]), file=sys.stderr, flush=True)
    print(table(rows(results)))
    measured = {r.case.name: {"rounds": len(r.ours), **figures(r)} for r in results}
    machine = f"{len(os.sched_getaffinity(0))} CPU cores"
    whole = {"benchmark": "streaming", "model": args.size, "machine": machine, "cases": measured}
    file = args.json or (None if args.cases else RESULTS / f"streaming-{args.size}.json")
    if file is not None:
        write_durably(file, as_json(whole))
    return whole


if __name__ == "__main__":
    main(sys.argv[1:])
