"""The other ways that the benchmark of reconstruction stands beside: what they are where nothing is lost."""

from pathlib import Path

import pytest
import torch
from commands import ROOT
from helpers import make_llama

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.training import hf_model


@torch.no_grad()
def test_slicegpt_at_the_whole_hidden_size_is_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from other_ways import SliceGpt

    parent = open_checkpoint(make_llama(tmp_path / "parent", layers=3))
    texts = list(torch.randint(parent.config.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0)))
    whole, less = (SliceGpt(parent, texts, parent.config.hidden_size - cut) for cut in (0, 8))
    model = hf_model.build(parent, "fp32", "cpu")
    wanted = torch.nn.functional.cross_entropy(model(texts[0][None, :-1]).logits[0], texts[0][1:], reduction="none")
    torch.testing.assert_close(whole(texts[0]), wanted, rtol=0, atol=1e-4)
    assert float((less(texts[0]) - wanted).abs().max()) > 1e-3
    assert less.parameters < whole.parameters
