"""What the pages say that a step takes on a cluster is near to what was measured, where something was."""

import importlib
from types import ModuleType

import pytest
from commands import ROOT


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that the page of clusters makes its table with."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("resources")


def test_the_memory_of_a_training_is_near_to_the_measured_one(resources: ModuleType) -> None:
    found = resources._result("training-1b")
    assert found["sequence_length"] == resources.SEQUENCE
    estimate = resources.training_bytes(resources.MEASURED, 1, found["micro_batch_size"]) / 1e9
    for arm in (arm for name, arm in found["arms"].items() if name.startswith("pretrain_gpt.py")):
        assert estimate == pytest.approx(arm["memory_gigabytes"], rel=0.25)


def test_models_have_the_sizes_of_their_names(resources: ModuleType) -> None:
    for name, pair in resources.PAIRS.items():
        said = [float(word.rstrip("B")) for word in name.split(" -> ")]
        assert [c.parameters / 1e9 for c in (pair.parent, pair.pruned)] == pytest.approx(said, rel=0.05)


def test_a_plan_fits_its_gpus_and_no_fewer_would_do(resources: ModuleType) -> None:
    for pair in resources.PAIRS.values():
        gpus, each = map(
            int, resources.gpus_for(lambda n, pair=pair: resources.training_bytes(pair.pruned, n)).split(" x ")
        )
        assert each <= 68 and (gpus == 1 or resources.training_bytes(pair.pruned, gpus // 2) > 68e9)
