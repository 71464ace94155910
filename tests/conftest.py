"""The checkpoints that many tests start from."""

import gc
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from model_shapes import EACH_SHAPE  # and not helpers, which would bring torch to processes that only collect

# Before torch is imported, and for the processes that tests start: it is the CPU that computes, beside a GPU too.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub for what it misspells

# A user's settings are not those of the scripts that tests start.
script = (Path(__file__).parents[1] / "scripts/common.sh").read_text()
own = "RUNS QUICKSTART_RUNS PYTHON TRAIN_ITERS TP SEQUENCES TRAIN_FILES VALID_FILES"
own += " WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE"
for name in (*script.split("unset ", 1)[1].split("}", 1)[0].replace("\\", " ").split(), *own.split()):
    os.environ.pop(name, None)

# A job in the background of a shell has these ignored, and so would the programs that tests start and end by them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest.register_assert_rewrite("helpers")

SLOW, FAST = 8.0, 0.2  # seconds that a test takes, where its mark does not say them: to tell what to begin with


@pytest.hookimpl(trylast=True)  # after others have left out what is not asked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: a process has a file for its own, and the last one is waited for."""
    files = Counter[Path]()
    for item in items:
        slow = item.get_closest_marker("slow")
        files[item.path] += (slow.args or (SLOW,))[0] if slow else FAST
    items.sort(key=lambda item: files[item.path], reverse=True)


def pytest_collection_finish() -> None:
    """Have what is imported not be looked through again and again for garbage: it takes a twentieth of the time."""
    gc.collect(), gc.freeze()


@pytest.fixture(scope="session", params=EACH_SHAPE)
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Hugging Face checkpoint of each shape; its directory has the name of the shape."""
    from helpers import make_llama

    return make_llama(tmp_path_factory.mktemp("llama") / request.param, request.param)


@pytest.fixture(scope="session")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Hugging Face checkpoint with grouped-query attention."""
    from helpers import make_llama

    return make_llama(tmp_path_factory.mktemp("gqa") / "hf", "gqa")
