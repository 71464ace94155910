"""The checkpoints that many tests start from."""

import gc
import os
import signal
from pathlib import Path

import pytest

# Before torch is imported, and for the processes that tests start: it is the CPU that computes, beside a GPU too.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub for what it misspells

# A job in the background of a shell has these ignored, and so would the programs that tests start and end by them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest.register_assert_rewrite("helpers")

from commands import ROOT  # noqa: E402, F401 - two are for tests that ask for them here
from helpers import EACH_SHAPE, load_whole, make_llama  # noqa: E402, F401 - two are for tests that ask for them here


def pytest_collection_finish() -> None:
    """Have what is imported not be looked through again and again for garbage: it takes a twentieth of the time."""
    gc.collect(), gc.freeze()


@pytest.fixture(scope="session", params=EACH_SHAPE)
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Hugging Face checkpoint of each shape; its directory has the name of the shape."""
    return make_llama(tmp_path_factory.mktemp("llama") / request.param, request.param)


@pytest.fixture(scope="session")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Hugging Face checkpoint with grouped-query attention."""
    return make_llama(tmp_path_factory.mktemp("gqa") / "hf", "gqa")
