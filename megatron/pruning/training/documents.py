"""Documents apart from each other in training, and conversations among them: packed whole, and masked.

A text that tools/preprocess_data.py made of conversations has a mask beside it. Where one is among the texts of a run,
no token attends to another document, as with Megatron's --dataloader-inter-document-masking. Rotary positions act by
their differences alone, so that a document is computed as if it began the sequence.

Megatron's own data for this, --sft, puts each line of a .jsonl into a sequence of its own, by templates that it names
itself, and takes no weights or token files beside it: one run could not learn from text and conversations.
"""

import argparse
import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.training.utils import get_blend_and_blend_per_split, print_rank_0
from numpy.typing import NDArray

from megatron.pruning.training.tokens import has_mask, mask_of


def keep_documents_apart(args: argparse.Namespace) -> None:
    """Let the flags keep documents apart where one of the texts that they name has a mask.

    Raises ValueError where that, or --dataloader-inter-document-masking, meets a flag with which it cannot be.
    """
    if args.sft:
        raise ValueError(
            "--sft: conversations are learned from token files here: make them with tools/preprocess_data.py --chat, "
            "name their prefix as any other, and leave the flag out"
        )
    blend, by_split = get_blend_and_blend_per_split(args)
    masked = [prefix for one in [blend, *(by_split or [])] for prefix in (one or [()])[0] if has_mask(prefix)]
    if masked and not args.dataloader_inter_document_masking:
        print_rank_0(f"note: {masked[0]} has a mask: no token attends to another document")
        args.dataloader_inter_document_masking = True
    for flag, given in {
        "--context-parallel-size above 1": args.context_parallel_size > 1,
        "--spec": args.spec is not None,
    }.items():
        if given and args.dataloader_inter_document_masking:
            why = f"{masked[0]} has a mask" if masked else "--dataloader-inter-document-masking"
            raise ValueError(f"{flag} cannot be combined with documents that are kept apart ({why}): leave it out")


class TextDataset(GPTDataset):  # type: ignore[misc]  # of a library without types
    """Megatron's dataset, which of a text with a mask gives whole documents, and the loss of what counts in them.

    A sample of such a text is as many documents, shuffled anew in each epoch, as there is room for; one that is longer
    than a sample goes on in the next. All is computed from the seed, so that ranks and resumed runs agree.
    """

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: str | None, *more: Any) -> None:
        self.masked = dataset_path is not None and has_mask(dataset_path)
        super().__init__(indexed_dataset, dataset_path, *more)
        if self.masked:
            self._pad_token_id = -1  # no token of a conversation is taken for padding
            # Megatron marks the padding of the first sample in what it keeps of it for all others.
            self.masks_and_position_ids_are_cacheable = False
            self._mask = copy.copy(self)  # so that it is read at the very places of the tokens
            self._mask.dataset = IndexedDataset(mask_of(str(dataset_path)), mmap=self.config.mmap_bin_files)
            self._mask._pad_token_id = 0

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = super().__getitem__(idx)
        if self.masked:
            counts, _, lengths = self._mask._query_document_sample_shuffle_indices(idx or 0)
            counts[np.cumsum(lengths)[:-1]] = 0  # nothing foretells how a document begins
            sample["loss_mask"] = sample["loss_mask"] * torch.from_numpy(counts[1:]).float()
        return sample

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
        if not self.masked:
            found: tuple[Any, Any, Any] = super()._build_document_sample_shuffle_indices()
            return found
        draw = np.random.RandomState(self.config.random_seed)
        orders: list[NDArray[Any]] = []
        starts: list[tuple[int, int]] = []
        while not orders or len(starts) < (self.num_samples or 0):
            order = draw.permutation(self.indices)
            before = len(self.indices) * len(orders)
            samples = pack(self.dataset.sequence_lengths[order], self.config.sequence_length)
            starts += [(before + document, offset) for document, offset in samples]
            orders.append(order)
        # A sample takes one token more, a label, of what begins the next: of any document, after the last.
        documents = np.concatenate([*orders, orders[0][:1]]).astype(np.int32)
        ends = np.asarray([*starts, (len(documents) - 1, 0)], dtype=np.int64)
        return documents, ends, np.arange(len(starts))


def pack(lengths: NDArray[np.int32], room: int) -> list[tuple[int, int]]:
    """Return where each sample of at most `room` tokens begins, as a document's number and a place in it.

    `lengths` are those of the documents in their order. What is longer than `room` begins a sample, and goes on in the
    samples after it.
    """
    starts, free = [], 0
    for document, length in enumerate(lengths.tolist()):
        if length > free:
            starts += [(document, offset) for offset in range(0, length, room)]
            free = -length % room
        else:
            free -= length
    return starts


class Documents(PackedSeqParams):  # type: ignore[misc]  # of a library without types
    """Where documents begin, which torch's attention is told in numbers that the host has."""

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Their tokens, asked of the device once, and not by every layer."""
        lengths: list[int] = self.cu_seqlens_q.diff().tolist()
        return lengths


def documents_of(cu_seqlens: torch.Tensor, length: int) -> Documents:
    """Return where documents begin in a micro batch of sequences of `length`, all of which lie behind each other.

    `cu_seqlens` are Megatron's, `[batch, length + 1]`: where each document of a sequence begins, then `length` again
    and again. The activations stay `[length, batch, ...]`, which is what `sbhd` says.
    """
    firsts = torch.arange(len(cu_seqlens), device=cu_seqlens.device, dtype=cu_seqlens.dtype) * length
    begins = torch.unique(cu_seqlens + firsts[:, None])  # sorted
    return Documents("sbhd", begins, begins, max_seqlen_q=length, max_seqlen_kv=length)


class EngineDocuments:
    """What TransformerEngine's attention is given to keep documents apart: they lie behind each other, in one row.

    To be put before Megatron's TEDotProductAttention among the bases of a class.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Return what the queries gather, `[sequence, batch, heads * head_dim]`.

        Query, key and value are `[sequence, batch, heads or groups, head_dim]`.
        """
        forward: Any = super().forward  # type: ignore[misc]  # of the class that comes after
        if packed_seq_params is None:
            mixed: torch.Tensor = forward(query, key, value, attention_mask, **options)
            return mixed
        length, batch = query.shape[:2]
        rows = (t.transpose(0, 1).flatten(0, 1) for t in (query, key, value))
        in_a_row = dataclasses.replace(packed_seq_params, qkv_format="thd")
        mixed = forward(*rows, None, packed_seq_params=in_a_row, **options)
        return mixed.reshape(batch, length, -1).transpose(0, 1).contiguous()
