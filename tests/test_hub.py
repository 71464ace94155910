"""A model of the Hugging Face hub is read where the hub's cache has it, by its name or by its directory."""

import sys
from pathlib import Path

import pytest
from commands import CONVERT, run
from helpers import assert_same_tensors, make_llama, tensors

from megatron.pruning.formats import open_checkpoint

NEW, OLD = "a" * 40, "b" * 40


@pytest.fixture
def cache(gqa: Path, mha: Path, tmp_path: Path) -> Path:
    """Lay a cache out as the hub's client does: blobs, snapshots that link to them, and what branches stand for."""
    model = tmp_path / "hub" / "models--an-owner--a_model"
    for commit, source in ((NEW, gqa), (OLD, mha)):
        for file in source.iterdir():
            blob, link = model / "blobs" / f"{commit}-{file.name}", model / "snapshots" / commit / file.name
            for path in (blob, link):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(file.read_bytes())
            link.symlink_to(Path("../../blobs") / blob.name)
    (model / "refs").mkdir()
    for branch, commit in (("main", NEW), ("v1.0", OLD)):
        (model / "refs" / branch).write_text(commit)
    return model.parent


@pytest.fixture(scope="module")
def mha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make another model."""
    return make_llama(tmp_path_factory.mktemp("mha") / "hf", "mha")


@pytest.mark.slow
@pytest.mark.parametrize("name,wanted", [("", "gqa"), ("@main", "gqa"), ("@v1.0", "mha"), (f"@{OLD}", "mha")])
def test_a_model_is_named_as_the_hub_names_it(
    cache: Path, gqa: Path, mha: Path, tmp_path: Path, name: str, wanted: str
) -> None:
    words = ["--load", f"an-owner/a_model{name}", "--save", str(tmp_path / "out")]
    done = run(sys.executable, CONVERT, *words, HF_HUB_CACHE=cache)
    assert done.returncode == 0, done.stderr
    assert_same_tensors(tensors(tmp_path / "out"), tensors({"gqa": gqa, "mha": mha}[wanted]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["an-owner/other", "an-owner/a_model@v2"])
def test_a_model_that_is_not_there_is_not_fetched(cache: Path, tmp_path: Path, name: str) -> None:
    model, _, revision = name.partition("@")
    done = run(sys.executable, CONVERT, "--load", name, "--save", str(tmp_path / "out"), HF_HUB_CACHE=cache)
    wanted = f"hf download {model}" + (f" --revision {revision}" if revision else "")
    assert done.returncode == 1 and done.stderr.startswith(f"error: --load {name}: ") and len(done.stderr) < 250
    assert done.stderr.strip().endswith(wanted)


def test_a_directory_of_the_cache_stands_for_its_snapshot(cache: Path) -> None:
    model = cache / "models--an-owner--a_model"
    assert open_checkpoint(model).path.name == NEW
    (model / "refs" / "main").write_text("../../../elsewhere")
    with pytest.raises(ValueError, match="which is no commit"):
        open_checkpoint(model)
    (model / "refs" / "main").unlink()
    with pytest.raises(ValueError, match=f"its snapshots are: {NEW}, {OLD}; name one"):
        open_checkpoint(model)
    assert open_checkpoint(model / "snapshots" / OLD).path.name == OLD
