"""The divergence of a student's next-token distribution from a teacher's, and its gradient.

The logits lie cut along the vocabulary over the tensor-parallel ranks, and each rank computes its part: a few small
all-reduces, and nothing of the vocabulary's size leaves a rank. Rows that only pad the vocabulary take no part, in
neither model, so that the loss is that of the exported models and the same in every layout.

Of a teacher whose logits are not at hand, `TopK` is what was kept: its K most likely tokens and the mass of all others.
That mass is one outcome more, for teacher and student alike, so that the divergence is never above that of the whole
vocabulary, and equal to it where K is all of it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FP32_VALUES = 2**25  # of logits that are computed with at once


class TopK(NamedTuple):
    """The most likely next tokens of each place: `log_probs` and `tokens` are `[..., K]`, `log_rest` is `[...]`.

    `log_rest` is the logarithm of what all other tokens have together, -inf where there are none. All are of the
    softmax of logits divided by a temperature.
    """

    log_probs: Tensor
    tokens: Tensor
    log_rest: Tensor


class _Divergence(torch.autograd.Function):
    """temperature^2 times a divergence in nats, `[...]` in fp32 and the same on every rank, and its gradient.

    The gradient is temperature * (softmax(student / temperature) - what the teacher gives of it). All of it but the
    factor is made with the divergence, while both models' logits are there.
    """

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the student's logits, the first argument.

        It takes the place of what was saved, so that it can be had once.
        """
        (difference,) = ctx.saved_tensors
        gradient = difference if difference.dtype == ctx.dtype else torch.empty_like(difference, dtype=ctx.dtype)
        factor = (gradients[0] * ctx.temperature).contiguous().unsqueeze(-1)
        for gap, factors, part in _rows(difference, factor, gradient):
            part.copy_(gap * factors)
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)

    @staticmethod
    def begin(ctx: Any, student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return where the divergence goes, and the gradient but for its factor."""
        # fp16 has no room for small differences before the loss is scaled.
        kept = torch.float32 if student.dtype == torch.float16 else student.dtype
        difference = torch.zeros(student.shape, dtype=kept, device=student.device)
        ctx.save_for_backward(difference)
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return torch.empty(student.shape[:-1], dtype=torch.float32, device=student.device), difference


class VocabParallelKL(_Divergence):
    """KL(teacher || student) per token, from logits that lie cut along the vocabulary over a group of ranks."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, vocab: int, group: Any) -> Tensor:
        """Return temperature^2 times the divergence in nats, computed in fp32, `[...]`, the same on every rank.

        `student` and `teacher` are this rank's logits, `[..., padded vocabulary / ranks]`; the teacher's get no
        gradient. `vocab` is the size of the vocabulary without padding over all ranks of `group`, which are in its
        order; `temperature` is above 0.
        """
        divergence, difference = VocabParallelKL.begin(ctx, student, temperature)
        mine, _ = _columns(student, vocab, group)
        for ours, theirs, gap, summed in _rows(student, teacher, difference, divergence.unsqueeze(-1)):
            log_p, log_q = _log_softmax([theirs[:, :mine], ours[:, :mine]], temperature, group)
            p = log_p.exp()
            torch.sum(p * log_p.sub_(log_q), -1, keepdim=True, out=summed)
            gap[:, :mine] = log_q.exp_().sub_(p)
        torch.distributed.all_reduce(divergence, group=group)
        return divergence.mul_(temperature**2)


class TopKKL(_Divergence):
    """KL(teacher || student) per token over the teacher's K most likely tokens and one outcome for all others."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        log_probs: Tensor,
        tokens: Tensor,
        log_rest: Tensor,
        temperature: float,
        vocab: int,
        group: Any,
    ) -> Tensor:
        """Return temperature^2 times the divergence in nats, `[...]`, as `VocabParallelKL` does.

        `student` are this rank's logits, `[..., padded vocabulary / ranks]`; the next three are a `TopK`, whole on
        every rank, of the same temperature; whatever they lack of a distribution's sum, for they were rounded, is made
        up for. A divergence below zero is rounding.
        """
        divergence, difference = TopKKL.begin(ctx, student, temperature)
        mine, offset = _columns(student, vocab, group)
        parts = (log_probs, tokens, log_rest.unsqueeze(-1))
        for ours, kept, ids, rest, gap, summed in _rows(student, *parts, difference, divergence.unsqueeze(-1)):
            log_q = _padded_log_softmax(ours, mine, temperature, group)
            log_p = torch.cat([kept.float(), rest], -1).log_softmax(-1)
            p, p_rest = torch.split(log_p.exp(), [kept.shape[-1], 1], -1)
            here, columns = _held(ids, offset, log_q)
            lost = torch.where(here & (p > 0), p * (log_p[:, :-1] - log_q.gather(-1, columns)), 0.0)
            q = log_q.exp_()
            others = _without(q, here, columns)
            sums = torch.stack([lost.sum(-1, keepdim=True), others.sum(-1, keepdim=True)])
            torch.distributed.all_reduce(sums, group=group)
            q_rest = sums[1].clamp_(min=torch.finfo(torch.float32).tiny)
            summed.copy_(sums[0] + torch.where(p_rest > 0, p_rest * (log_p[:, -1:] - q_rest.log()), 0.0))
            # Of a token that was kept q - p; of any other, its share of what all others have too much.
            q.sub_(others.mul_(p_rest / q_rest))
            gap.copy_(q.scatter_add_(-1, columns, -p * here))
        return divergence.mul_(temperature**2)


def top_k(logits: Tensor, k: int, temperature: float, vocab: int, group: Any) -> TopK:
    """Return the `k` most likely tokens of logits, `[..., padded vocabulary / ranks]`, the same on every rank.

    `k` is at most `vocab`, the size of the vocabulary over all ranks of `group` without padding. Probabilities are of
    the softmax of the logits divided by `temperature`, computed in fp32.
    """
    log_probs = torch.empty((*logits.shape[:-1], k), dtype=torch.float32, device=logits.device)
    tokens = torch.empty(log_probs.shape, dtype=torch.int64, device=logits.device)
    log_rest = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    mine, offset = _columns(logits, vocab, group)
    some = min(k, logits.shape[-1])  # as many from every rank; what pads is never chosen
    for part, best, ids, rest in _rows(logits, log_probs, tokens, log_rest.unsqueeze(-1)):
        log_p = _padded_log_softmax(part, mine, temperature, group)
        values, columns = log_p.topk(some, -1)
        everywhere = [_gathered(found, group) for found in (values, columns + offset)]
        chosen, places = everywhere[0].topk(k, -1)
        best.copy_(chosen), ids.copy_(everywhere[1].gather(-1, places))
        others = _without(log_p.exp_(), *_held(ids, offset, log_p)).sum(-1, keepdim=True)
        torch.distributed.all_reduce(others, group=group)
        rest.copy_(others.log_())
    return TopK(log_probs, tokens, log_rest)


def _columns(logits: Tensor, vocab: int, group: Any) -> tuple[int, int]:
    """Return how many columns of this rank's logits are no padding, and the token of the first."""
    width = logits.shape[-1]
    offset = torch.distributed.get_rank(group) * width
    return min(max(vocab - offset, 0), width), offset


def _held(tokens: Tensor, offset: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the tokens are in this rank's columns, and in which; in any, where they are not."""
    columns = tokens - offset
    return (columns >= 0) & (columns < logits.shape[-1]), columns.clamp(0, logits.shape[-1] - 1)


def _without(q: Tensor, here: Tensor, columns: Tensor) -> Tensor:
    """Return `q` with zeros in those `columns` that are `here`."""
    return q * (torch.zeros_like(q).scatter_add_(-1, columns, here.to(q.dtype)) == 0)


def _gathered(part: Tensor, group: Any) -> Tensor:
    """Return what all ranks have, side by side along the last dim."""
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, -1)


def _rows(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield a few tokens of each tensor at a time, `[tokens, ...]`: in fp32 a whole sequence may take gigabytes."""
    rows = max(1, _FP32_VALUES // logits.shape[-1])
    flat = (tensor.view(-1, tensor.shape[-1]) for tensor in (logits.reshape(-1, logits.shape[-1]), *others))
    return zip(*(torch.split(tensor, rows) for tensor in flat), strict=True)


def _log_softmax(logits: list[Tensor], temperature: float, group: Any) -> list[Tensor]:
    """Return log-probabilities in fp32 of this rank's columns, of several tensors by the same two all-reduces.

    The largest logit is taken off first: what is rounded then is the distance to it, not the logit. A rank may have no
    column at all.
    """
    nothing = torch.full((*logits[0].shape[:-1], 1), -torch.inf, device=logits[0].device)
    largest = torch.stack([part.amax(-1, keepdim=True).float() if part.shape[-1] else nothing for part in logits])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    scaled = [(part.float() - top).div_(temperature) for part, top in zip(logits, largest, strict=True)]
    total = torch.stack([part.exp().sum(-1, keepdim=True) for part in scaled])
    torch.distributed.all_reduce(total, group=group)
    return [part.sub_(log_sum) for part, log_sum in zip(scaled, total.log_(), strict=True)]


def _padded_log_softmax(logits: Tensor, mine: int, temperature: float, group: Any) -> Tensor:
    """Return log-probabilities in fp32 of all of this rank's columns, -inf from column `mine` on."""
    if mine < logits.shape[-1]:
        logits = torch.nn.functional.pad(logits[:, :mine], (0, logits.shape[-1] - mine), value=-torch.inf)
    return _log_softmax([logits], temperature, group)[0]
