"""Break what users give in thousands of ways, and see that every command refuses it in one sentence or reads it right.

    python tests/fuzz.py conversions --count 10000      # broken checkpoints, converted by the library
    python tests/fuzz.py commands --count 3600          # and met by the commands that users type, with plans and scores
    python tests/fuzz.py fields --count 2000            # the same, broken field by field as the formats have them
    python tests/fuzz.py training --count 1000          # checkpoints before and inside of the stock loader
    python tests/fuzz.py text --count 1000              # JSON lines and tokenizers that preprocess_data.py reads
    python tests/fuzz.py tokens --count 1000            # .bin and .idx, as training and evaluation open them
    python tests/fuzz.py disks --count 1000             # sound files on a file system that fails or does little
    python tests/fuzz.py processes --count 300          # two processes that meet over a broken checkpoint or disk
    python tests/fuzz.py training --only 711            # repeat one case, with its traceback

A case is drawn from the seed and its number alone, so that it can be repeated. It has 20 seconds and 300 MB. It must
end in an error of one sentence, with what was there before untouched, or well, with the right result.
"""

import argparse
import collections
import importlib
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / part) for part in ("", "tools", "tools/checkpoint_conversion")
]

# The module and class that try each kind of cases, and the method that tries one.
KINDS = {
    "conversions": ("fuzz_checkpoints", "Fuzzer", "attempt"),
    "commands": ("fuzz_checkpoints", "Fuzzer", "command"),
    "fields": ("fuzz_checkpoints", "Fuzzer", "field"),
    "training": ("fuzz_training", "Training", "attempt"),
    "text": ("fuzz_text", "Texts", "attempt"),
    "tokens": ("fuzz_text", "Tokens", "attempt"),
    "disks": ("fuzz_disks", "Disks", "attempt"),
    "processes": ("fuzz_disks", "Pairs", "attempt"),
}


def tries(attempt: Callable[[Random], tuple[str, str]], seed: int, numbers: Sequence[int], show: bool) -> int:
    """Try the cases of these numbers, print the counts, and return how many went wrong."""
    counts: collections.Counter[str] = collections.Counter()
    wrong: dict[str, list[int]] = {}
    start = time.monotonic()
    for i in numbers:
        try:
            case, ended = attempt(Random(f"{seed} {i}"))
            counts[ended] += 1
            if show:
                print(i, case, "->", ended, flush=True)
        except AssertionError as error:
            counts["WRONG"] += 1
            first = str(error).split(": ", 3)
            signature = f"{first[1]}: {first[-1][:90]}"
            wrong.setdefault(signature, []).append(i)
            if len(wrong[signature]) == 1:
                print(f"case {i}: {str(error)[:400]}", flush=True)
            if show:
                traceback.print_exc()
    print(f"{sum(counts.values())} cases in {time.monotonic() - start:.0f} s:", dict(counts))
    for signature, cases in wrong.items():
        print(f"{len(cases):5} x {signature}  e.g. {cases[:4]}")
    return counts["WRONG"]


def main(argv: Sequence[str]) -> None:
    """Try the cases of one kind; exit with 1 when one of them went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS, help="what is broken, and who meets it")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="cases (default 1000)")
    parser.add_argument("--first", type=int, default=0, metavar="I", help="number of the first case (default 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random choices (default 0)")
    parser.add_argument("--show", action="store_true", help="print every case")
    parser.add_argument("--only", type=int, metavar="I", help="try case I alone, and show its traceback")
    args = parser.parse_args(argv)
    module, name, method = KINDS[args.kind]
    driver = getattr(importlib.import_module(module), name)  # which imports Megatron only where it is needed
    warnings.simplefilter("ignore")  # of zipfile, about what is broken on purpose
    size = int(_address_space() + 4000) << 20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))  # a runaway ends here, not the machine
    shm = Path("/dev/shm")
    numbers = range(args.first, args.first + args.count) if args.only is None else [args.only]
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as directory:
        attempt = getattr(driver(Path(directory)), method)
        wrong = tries(attempt, args.seed, numbers, args.show or args.only is not None)
    sys.exit(1 if wrong else 0)


def _address_space() -> float:
    import torch
    from fuzz_guards import megabytes

    torch.set_num_threads(1)
    return megabytes("VmSize")


if __name__ == "__main__":
    main(sys.argv[1:])
