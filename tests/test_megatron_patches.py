"""What the project changes in Megatron and torch: it holds where it is applied, and what was there comes back.

Megatron is imported by the tests that need it: its import takes seconds, in every process that collects this file.
"""

import contextlib
import importlib.metadata
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from megatron.pruning.training import cpu_device
from megatron.pruning.training.quiet import quiet_imports


@pytest.mark.slow
def test_patches_hold_only_where_they_are_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.pruning.training.megatron_patches import applied, while_training

    monkeypatch.setattr(cpu_device, "is_installed", lambda: True)
    config = SimpleNamespace(deallocate_pipeline_outputs=True)
    flags = {"async_save": False, "swiglu": True, "ffn_hidden_size": 25, "tensor_model_parallel_size": 1}
    flags |= {"apply_rope_fusion": False, "disable_jit_fuser": False}
    rows = [row for row in while_training(Namespace(**flags), config) if row.needed]
    before = [vars(row.owner)[row.name] for row in rows]
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([weights[0]], weight_decay=0.1)]
    with pytest.raises(EOFError), applied(rows):
        assert [vars(row.owner)[row.name] for row in rows] == [row.value for row in rows]
        optimizers.append(torch.optim.AdamW([weights[1]], weight_decay=0.1))
        raise EOFError
    assert [vars(row.owner)[row.name] for row in rows] == before
    assert [optimizer.param_groups[0]["fused"] for optimizer in optimizers] == [None, True]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        for step in range(3):
            weight.grad = torch.cos(weight.detach() * 7 + step)
            optimizer.step()
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)
    assert not torch.equal(weights[0], torch.linspace(-1, 1, 50))


@pytest.mark.parametrize("version,said", [("0.18.2", "and 0.18.2 is installed"), ("0.20.0rc1", None), ("1.0", None)])
def test_a_megatron_that_is_too_old_is_refused_in_a_sentence(
    version: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(SystemExit, match=said) if said else contextlib.nullcontext(), quiet_imports():
        pass


@pytest.mark.slow
def test_a_patch_of_one_object_gives_back_what_it_inherits() -> None:
    from megatron.pruning.training.megatron_patches import Patch, applied

    model = torch.nn.Linear(2, 2)
    with applied([Patch(model, "extra_repr", len, "why")]):
        assert model.extra_repr is len
    assert "extra_repr" not in vars(model) and model.extra_repr() == torch.nn.Linear(2, 2).extra_repr()
    unknown = Patch(model, "of_another_megatron", len, "why")
    with pytest.raises(AttributeError, match="of_another_megatron"), applied([unknown]):
        pass
    with applied([Patch(model, "extra_repr", len, "why", needed=False)]):
        assert "extra_repr" not in vars(model)
