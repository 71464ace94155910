"""Distillation: the model in training learns the distribution that a teacher gives to every next token.

    kd loss = temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature)), in nats per token
    loss    = alpha * kd loss + (1 - alpha) * lm loss, and where it is asked for a share of the hidden loss

That is forward KL, with alpha 1 the recovery of Minitron (arXiv 2407.14679, table 15); the factor temperature^2 keeps
the gradient's size (arXiv 1503.02531, section 2). How it is computed is in divergence.py; the hidden loss
is in hidden_loss.py.

A teacher reads every batch beside the student (online_teacher.py), or has read the text of the whole training before,
and its likeliest tokens were kept (record_teacher.py, recorded_teacher.py).
"""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from megatron.training import get_tokenizer


class Distillation(ABC):
    """The loss that a teacher makes; `alpha` is its share, `vocab` the size of the vocabulary without padding."""

    hidden = 0.0  # share of the hidden loss
    validates = False  # are there answers to the text of the validation, too?

    def __init__(self, alpha: float, temperature: float, vocab: int) -> None:
        self.alpha, self.temperature, self.vocab = alpha, temperature, vocab

    def with_answers(self, dataset: Any) -> Any:
        """Return the training set of the last stage, with what its samples need for `completed`."""
        return dataset

    def completed(self, batch: dict[str, Any], size: int) -> dict[str, Any]:
        """Return a batch of `size` sequences of the last stage with what `of` takes, on all tensor-parallel ranks."""
        return batch

    def schedules(self, choose: Callable[..., Any], get_batch: Callable[..., Any]) -> Callable[..., Any]:
        """Return what is to choose the schedule of a step in the place of `choose`, Megatron's; `get_batch` is ours."""
        return choose

    @abstractmethod
    def of(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments with which the student's forward pass gives its losses as `loss` takes them.

        The values of the batch are `[batch, sequence]`; none are returned on a stage that computes no loss.
        """

    @abstractmethod
    def divergence(self, student: torch.Tensor, answers: Any) -> torch.Tensor:
        """Return the kd loss of every token, `[sequence, batch]`, of the student's logits on this rank."""

    def hidden_loss(self, student: torch.Tensor, answers: Any) -> torch.Tensor | None:
        """Return the hidden loss of every token, `[sequence, batch]`, if any, of what the final norm gives."""
        return None

    def _losses(self, context: Any, labels: torch.Tensor, **student: Any) -> torch.Tensor:
        """Return lm loss, kd loss and any hidden loss of every token, `[2 or 3, batch, sequence]`.

        GPTModel calls it at its end.

        `context` has the teacher's answers, `labels` are the next tokens, `[batch, sequence]`, and `student` is what
        else GPTModel gives, see `logits_of`.
        """
        logits = logits_of(**student)
        hidden = self.hidden_loss(student["hidden_states"], context)
        kd = self.divergence(logits, context)
        # Second, since Megatron's cross entropy writes over the logits; and for the log alone, when alpha is 1.
        with torch.set_grad_enabled(self.alpha < 1 and torch.is_grad_enabled()):
            lm = student["compute_language_model_loss"](labels, logits if self.alpha < 1 else logits.detach())
        return torch.stack([lm.float(), *(loss.transpose(0, 1) for loss in (kd, hidden) if loss is not None)])

    def loss(
        self, token_loss: Callable[..., Any], loss_mask: torch.Tensor, losses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to train on, summed over the tokens that count, their number, and all losses for the log.

        `token_loss` sums one kind of loss over the tokens where `loss_mask`, `[batch, sequence]`, is 1.0; `losses` is
        what the student's forward pass gave.
        """
        sums = [token_loss(loss_mask, each) for each in losses]
        (lm, *_), (kd, tokens, _), *hidden = sums
        loss = self.alpha * kd + (1 - self.alpha) * lm if self.alpha < 1 else kd
        for each, *_ in hidden:
            loss = loss + self.hidden * each
        names = ("lm loss", "kd loss", "hidden loss")
        return loss, tokens, {name: report["lm loss"] for name, (_, _, report) in zip(names, sums, strict=False)}


def ask(model: Any, batch: dict[str, Any], processor: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Return what this stage of a model gives of a batch; `processor` takes what the final norm gives (`logits_of`)."""
    output: torch.Tensor = model(
        batch.get("tokens"),
        batch.get("position_ids"),
        batch.get("attention_mask"),
        packed_seq_params=batch.get("packed_seq_params"),
        output_processor=processor,
    )
    return output


def logits_of(
    hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, **unused: Any
) -> torch.Tensor:
    """Return this rank's logits, `[sequence, batch, padded vocabulary / ranks]`, of what GPTModel gives at its end."""
    logits: torch.Tensor = scale_logits(output_layer(hidden_states, weight=output_weight)[0])
    return logits


def vocabulary_of(args: argparse.Namespace) -> int:
    """Return the size of the vocabulary of the model in training, without padding."""
    return int(args.vocab_size or get_tokenizer().vocab_size)


def samples_of(args: argparse.Namespace) -> int:
    """Return how many samples the whole training reads."""
    return int(args.train_samples or args.train_iters * args.global_batch_size)
