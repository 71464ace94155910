"""Beside the logits, the hidden states: the student's after its final norm are to point where the teacher's do.

    hidden loss = 1 - cos(student's, teacher's), per token, the teacher's in the hidden space that the student has

That space is what the pruning left: some channels of the teacher's, or a rotation's. Nothing is learned for it. It is
found by the embeddings, which the pruning cut and did not refit: the student's columns are some of the teacher's, or
the teacher's times the rotation. A rotated student's final norm has its gain in the output layer; the teacher's gain
is then taken off before.
"""

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.training.basis import Basis
from megatron.pruning.training.layerwise import ROW, tensor_of

_MOST_MISSED = 0.1  # share of the student's embedding that is no rotation of the teacher's


class HiddenLoss:
    """The loss for a student that was pruned from this teacher; `student` is the checkpoint as the pruning left it.

    Raises ValueError where its hidden space is no part of the teacher's.
    """

    def __init__(self, teacher: Checkpoint, student: Checkpoint, vocab: int, device: torch.device) -> None:
        basis = _basis(teacher, student, vocab, device)
        self.basis = Basis(basis.channels.to(device), None if basis.matrix is None else basis.matrix.to(device))
        gain = tensor_of(teacher.weight(ROW["final_norm"], None), torch.float32, device)
        self.gain = gain if basis.matrix is not None else torch.ones_like(gain)

    def __call__(self, student: Tensor, teacher: Tensor, sequence_parallel: bool) -> Tensor:
        """Return the loss of every token, `[sequence, batch]`, of what both final norms give, `[..., hidden]`.

        With sequence parallelism a rank has its part of the sequence, and gets the loss of all of it.
        """
        with torch.no_grad():
            wanted = self.basis.project(teacher.float() / self.gain)
        losses = 1 - torch.nn.functional.cosine_similarity(student.float(), wanted, dim=-1)
        if sequence_parallel:
            losses = gather_from_sequence_parallel_region(losses, tensor_parallel_output_grad=False)
        return losses


def _basis(teacher: Checkpoint, student: Checkpoint, vocab: int, device: torch.device) -> Basis:
    """Return the student's hidden space in the teacher's, from a sample of the rows of their embeddings."""
    wide, narrow = (_rows(checkpoint, vocab, 4 * teacher.config.hidden_size) for checkpoint in (teacher, student))
    written = wide.to(narrow.dtype).float()  # as the pruning wrote what it kept of it
    wide, narrow = wide.float(), narrow.float()
    numbers = {column.tobytes(): number for number, column in enumerate(written.T.contiguous().numpy())}
    found = [numbers.get(column.tobytes()) for column in narrow.T.contiguous().numpy()]
    if None not in found:
        return Basis(torch.tensor(found))
    wide, narrow = wide.to(device).double(), narrow.to(device).double()  # a CPU may take many minutes for it
    matrix = torch.linalg.lstsq(wide, narrow).solution
    missed = float((wide @ matrix - narrow).norm() / narrow.norm())
    if not narrow.shape[1] <= wide.shape[1] <= len(wide) or not missed <= _MOST_MISSED:
        raise ValueError(
            f"--kd-hidden: the hidden states of {student.path} are no part of those of {teacher.path}, by their "
            "embeddings: it takes the checkpoint as it was pruned from this teacher"
        )
    return Basis(torch.arange(0), matrix.float())


def _rows(checkpoint: Checkpoint, vocab: int, most: int) -> Tensor:
    view = checkpoint.weight(ROW["embed"], None)
    rows = np.unique(np.linspace(0, vocab - 1, min(vocab, most)).astype(np.intp))
    return torch.from_numpy(view.read(rows)).view(getattr(torch, TORCH_NAMES[view.dtype]))
