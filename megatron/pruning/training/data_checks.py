"""What must hold of the text before a model is built for it, in seconds for terabytes of it.

Megatron looks for a file late, and where an id is not in the vocabulary, a split has no document or a file is shorter
than its index says, it ends in a traceback, never ends, or trains on nonsense.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.training.utils import get_blend_and_blend_per_split
from numpy.typing import NDArray

from megatron.pruning.model.layout import Layout
from megatron.pruning.storage.processes import is_first_here
from megatron.pruning.training.tokens import Text, has_mask, mask_of, open_mask, open_text

_SPLITS = ("train", "valid", "test")
_STRETCH, _STRETCHES = 4096, 256  # tokens looked at in one place, and places


def check_data(args: argparse.Namespace) -> None:
    """Check the text that the stock flags name; the first process of each machine does, for all see the same files.

    Raises ValueError for a weight or a prefix that cannot be meant, a file that is missing, damaged, or another's, an
    id that the model has not, a split without a document, and texts that --full-validation cannot go over.
    """
    if args.mock_data or not is_first_here():
        return
    blend, by_split = get_blend_and_blend_per_split(args)
    if args.full_validation:
        _check_whole_validation(args.split, blend, by_split)
    blends = {"--data-path": blend} if by_split is None else dict(zip(_FLAGS, by_split, strict=True))
    for flag, one in blends.items():
        prefixes, weights = one or ((), None)
        for prefix, weight in zip(prefixes, weights or [1.0] * len(prefixes), strict=True):
            if not weight > 0:
                raise ValueError(f"{flag}: the weight of {prefix} is {weight:g}: leave out a text that has none")
        for prefix in prefixes:
            text = open_text(prefix, flag)
            _check_ids(text.tokens, _vocabulary(args), prefix, flag)
            if has_mask(prefix):
                _check_mask(open_mask(prefix, text, flag), prefix, flag)
                _say_longer(text, args.seq_length, prefix)
            if by_split is None:
                _check_splits(args.split, text, prefix)


def _check_whole_validation(split: str, blend: Any, by_split: Sequence[Any] | None) -> None:
    """Check for what Megatron ends on in a traceback, some of it after the training."""
    if by_split is None:
        _, valid, test = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        flag, weights = "--data-path", blend and blend[1]
    else:
        _, valid, test = by_split
        flag, weights = "--valid-data-path", valid and valid[1]
    if not valid:
        raise ValueError("--full-validation needs a text: give --valid-data-path, or --split a second number above 0")
    if test:
        raise ValueError(
            "--full-validation cannot be had with a text to test on: leave --test-data-path out, or give --split 0 as "
            "its third number"
        )
    if weights:
        raise ValueError(f"--full-validation goes over each text once: leave the weights out of {flag}")


_FLAGS = tuple(f"--{split}-data-path" for split in _SPLITS)


def _vocabulary(args: argparse.Namespace) -> int | None:
    """Return how many ids the model has, None where that is not known yet."""
    if args.vocab_size is None or args.tokenizer_type != "NullTokenizer":
        known: int | None = args.vocab_size or args.padded_vocab_size
        return known
    # This tokenizer's end of a document is one more, and is meant to lie in the padding.
    return Layout(args.tensor_model_parallel_size, 1, args.make_vocab_size_divisible_by).padded_vocab(
        args.vocab_size + 1
    )


def _extremes(values: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield the lowest and the highest value, and 0, in places that are spread over all of them."""
    starts = np.unique(np.linspace(0, max(0, len(values) - _STRETCH), _STRETCHES).astype(np.int64))
    for start in starts.tolist():
        stretch = values[start : start + _STRETCH]
        yield int(stretch.min(initial=0)), int(stretch.max(initial=0))


def _check_mask(mask: NDArray[np.uint8], prefix: str, flag: str) -> None:
    highest = max(high for _, high in _extremes(mask))
    if highest > 1:
        raise ValueError(f"{flag} {prefix}: {mask_of(prefix)} holds {highest}, and a mask has nothing but 0 and 1")


def _say_longer(text: Text, length: int, prefix: str) -> None:
    if longer := int(np.count_nonzero(text.lengths > length)):
        print(
            f"note: {longer:,} of the {len(text.lengths):,} documents of {prefix} are longer than --seq-length "
            f"{length} and go on in the next sequence, without what came before; "
            "tools/preprocess_data.py --max-length cuts them",
            flush=True,
        )


def _check_ids(tokens: NDArray[Any], vocabulary: int | None, prefix: str, flag: str) -> None:
    for low, high in _extremes(tokens):
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise ValueError(
                f"{flag} {prefix} holds token {low if low < 0 else high}, but the model has a vocabulary of "
                f"{vocabulary}: it was made with another tokenizer"
            )


def _check_splits(split: str, text: Text, prefix: str) -> None:
    shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for name, share in zip(_SPLITS, shares, strict=True):
        if share is not None and round(share[0] * len(text.lengths)) == round(share[1] * len(text.lengths)):
            raise ValueError(
                f"--split {split} leaves no document of {prefix}, which has {len(text.lengths)}, for {name}: "
                "give it a larger share, or 0"
            )
