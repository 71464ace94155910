"""No checkpoint, however broken or malicious, runs code, hangs, fills the memory or is read wrongly in silence.

fuzz.py breaks at random what users give; some of it runs here. What it has found stays by name in
test_damaged_checkpoints.py.
"""

import collections
import importlib
import os
import pickle
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from fuzz import KINDS
from fuzz_checkpoints import Fuzzer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.pruning.storage import pickles
from megatron.pruning.storage.pickles import read_pickle
from megatron.pruning.storage.small_files import parse_json


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    """Make sound checkpoints in every format and what tries broken ones; nothing is tried here of durability."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_a_broken_checkpoint_is_refused_in_a_sentence_or_read_right(fuzzer: Fuzzer, random: Random) -> None:
    fuzzer.attempt(random)


@pytest.mark.slow
@settings(max_examples=80, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_a_command_on_a_broken_file_ends_in_a_sentence_or_well(fuzzer: Fuzzer, random: Random) -> None:
    fuzzer.command(random)


@pytest.mark.slow
@settings(max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_a_broken_field_of_a_format_ends_in_a_sentence_or_well(fuzzer: Fuzzer, random: Random) -> None:
    fuzzer.field(random)


@pytest.mark.slow
@pytest.mark.parametrize("kind,count", [("tokens", 4), ("text", 3), ("disks", 3), ("processes", 1)])
def test_a_few_cases_of_each_kind_in_processes_of_their_own(tmp_path: Path, kind: str, count: int) -> None:
    module, name, method = KINDS[kind]
    driver = getattr(importlib.import_module(module), name)(tmp_path)
    for number in range(count):
        getattr(driver, method)(Random(f"suite {number}"))


def test_a_pickle_of_endless_opcodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MAX_OPCODES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 opcodes"):
        read_pickle(b"]" * 1000 + b".", {})


def test_a_name_that_is_twice_in_a_long_object_is_found_at_once() -> None:
    names = ",".join(f'"{number}":0' for number in range(200_000))
    begin = time.monotonic()
    with pytest.raises(ValueError, match="it holds '7' twice"):
        parse_json(f'{{{names},"7":1}}'.encode(), "it")
    assert time.monotonic() - begin < 5, "every name was compared with every other"


def test_pickles_of_data_are_read_as_they_are() -> None:
    value = {"a": [1, -2, 2**70, 1.5, None, True, "ü", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], 5: {"x": {}}}
    for protocol in (2, 3, 4, 5):
        assert read_pickle(pickle.dumps(value, protocol), {}) == value
        assert protocol == 2 or read_pickle(pickle.dumps([b"x"], protocol), {}) == [b"x"]
        space = Namespace(x=1, y=[2])
        assert read_pickle(pickle.dumps(space, protocol), {"argparse.Namespace": Namespace}) == space
        record = read_pickle(pickle.dumps(collections.Counter("aab"), protocol), {})
        assert record.name == "collections.Counter"
