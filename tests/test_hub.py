"""A model of the Hugging Face hub is read where the hub's cache has it, and fetched once where it has not."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import CONVERT, ROOT, environment, run
from helpers import assert_same_tensors, convert, make_llama, tensors
from hub_server import SHA, Hub
from safetensors.torch import load_file

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


# Fetching ------------------------------------------------------------------------------------------------------------

SHOW = str(ROOT / "tools/show_checkpoint.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of a model in two files, with a card and a licence, and with what must never be fetched."""
    path = make_llama(tmp_path_factory.mktemp("repository") / "hf", "gqa", max_shard_size="40KB")
    assert (path / "model.safetensors.index.json").is_file()
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (path / "LICENSE").write_text("what may be done")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "original/params.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("not to be fetched")
    return path


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    """A hub that has the model."""
    with Hub(model) as server:
        yield server
        server.shutdown()


def settings(hub: Hub, tmp_path: Path) -> dict[str, object]:
    places = {"HF_HUB_CACHE": tmp_path / "cache", "HF_HOME": tmp_path / "home"}
    return {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": 0, **places}


def fetch(hub: Hub, tmp_path: Path, name: str, out: str = "out", **more: object) -> subprocess.CompletedProcess[str]:
    words = ["--load", name, "--save", str(tmp_path / out), "--format", "torch"]
    return run(sys.executable, CONVERT, *words, **settings(hub, tmp_path) | more)


@pytest.mark.slow
def test_a_model_is_fetched_once_and_what_it_is_stays_known(hub: Hub, model: Path, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "an-owner/a_model")
    assert done.returncode == 0, done.stderr
    assert (
        f"an-owner/a_model: no such directory here: fetching the model of that name from {hub.address}\n" in done.stderr
    )
    assert "%|" not in done.stderr, "a progress bar, and nobody who watches"
    allowed = {path.name for path in model.iterdir() if path.suffix in (".json", ".jinja", ".md", "")} - {"original"}
    weights = {path.name for path in model.glob("model-*.safetensors")}
    assert len(weights) > 1 and sorted(hub.fetched) == sorted(allowed | weights)
    lineage = json.loads((tmp_path / "out/huggingface/lineage.json").read_text())
    assert lineage["origin"] == {"name": "an-owner/a_model", "commit": SHA, "license": "apache-2.0"}
    wanted = {name: value for file in model.glob("model-*") for name, value in load_file(file).items()}
    assert_same_tensors(tensors(convert(tmp_path / "out", tmp_path / "back", "hf")), wanted)
    asked = len(hub.asked)
    for offline in ("0", "1"):
        assert fetch(hub, tmp_path, "an-owner/a_model", f"again-{offline}", HF_HUB_OFFLINE=offline).returncode == 0
    assert len(hub.asked) == asked, "what is in the cache is used"


@pytest.mark.slow
def test_what_an_ended_run_left_is_fetched_the_next_time(hub: Hub, model: Path, tmp_path: Path) -> None:
    weights = {path.name for path in model.glob("model-*.safetensors")}
    last = max(weights)
    hub.errors[last] = 403, "Forbidden"  # which is not tried again, as a 500 is for half a minute
    done = fetch(hub, tmp_path, "an-owner/a_model")
    assert done.returncode == 1 and done.stderr.count("error: ") == 1, done.stderr
    # Several are fetched at once, and of these some may not have begun.
    there = {path.name for path in tmp_path.rglob("snapshots/*/model-*.safetensors")}
    assert last not in there
    hub.errors.clear()
    hub.asked.clear()
    assert fetch(hub, tmp_path, "an-owner/a_model").returncode == 0
    assert sorted(hub.fetched) == sorted(weights - there), "the others were there"


@pytest.mark.slow
def test_of_many_processes_one_fetches(hub: Hub, tmp_path: Path) -> None:
    words = [sys.executable, "-c", FETCH, "an-owner/a_model"]
    env = environment(**settings(hub, tmp_path))
    started = [subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * 6, said
    assert len(hub.fetched) == len(set(hub.fetched)) and sum("fetching the model" in text for text in said) == 1


FETCH = """
import sys
from pathlib import Path
from megatron.pruning.formats import open_checkpoint
open_checkpoint(Path(sys.argv[1]), fetch=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,errors,more,told",
    [
        ("runs/parnet", {}, {}, "no such directory, and {} has no such model, or shows it to its owners alone"),
        ("an-owner/a_model@v2", {}, {}, "an-owner/a_model on {} has no revision v2"),
        ("an-owner/a_model", {"/resolve/": (403, "GatedRepo")}, {}, "{} gives an-owner/a_model to those alone who ask"),
        ("an-owner/a_model", {}, {"HF_HUB_OFFLINE": 1}, "HF_HUB_OFFLINE is set, so that nothing is fetched: unset it"),
        ("an-owner/a_model", {}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
        ("a--b/c", {}, {}, "no such directory, and no name that a model of the hub could have"),
    ],
)
def test_a_model_that_cannot_be_had_is_a_sentence_that_says_what_to_do(
    hub: Hub, tmp_path: Path, name: str, errors: dict, more: dict, told: str
) -> None:
    hub.errors |= errors
    done = fetch(hub, tmp_path, name, **more)
    *notes, last = done.stderr.splitlines()
    assert done.returncode == 1 and last.startswith(f"error: --load {name}: ") and told.format(hub.address) in last, (
        last
    )
    assert len(last) < 500 and not [note for note in notes if not note.startswith(f"{name}: no such directory here")]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change,told",
    [
        (lambda files: files.pop("config.json"), "has no config.json, so that it is no Llama to be read"),
        (lambda files: files.pop("model.safetensors.index.json"), "has no model.safetensors, in one file or several"),
        (lambda files: files.update({"config.json": files["README.md"]}), "it is not JSON"),
    ],
)
def test_what_is_no_model_to_be_read_is_said_before_weights_are_fetched(
    hub: Hub, tmp_path: Path, change: object, told: str
) -> None:
    change(hub.files)
    done = fetch(hub, tmp_path, "an-owner/a_model")
    assert done.returncode == 1 and told in done.stderr, done.stderr
    assert not [name for name in hub.fetched if name.endswith((".safetensors", ".bin", ".py"))]


@pytest.mark.slow
def test_an_index_that_names_a_program_fetches_nothing(hub: Hub, model: Path, tmp_path: Path) -> None:
    for name in ("modeling.py", "*", "pytorch_model.bin"):
        hub.files["model.safetensors.index.json"] = tmp_path / "index"
        (tmp_path / "index").write_text(json.dumps({"weight_map": {"a": name}}))
        done = fetch(hub, tmp_path, "an-owner/a_model", HF_HUB_CACHE=tmp_path / f"cache {name}")
        assert done.returncode == 1 and "only files of safetensors are fetched" in done.stderr
    assert not [name for name in hub.fetched if name.endswith((".safetensors", ".bin", ".py"))]


@pytest.mark.slow
def test_to_look_at_a_checkpoint_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    done = run(sys.executable, SHOW, "an-owner/a_model@v1", **settings(hub, tmp_path))
    assert done.returncode == 1 and done.stderr.strip().endswith("hf download an-owner/a_model --revision v1")
    assert hub.asked == []


def test_without_the_hubs_client_both_readings_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"^--load runs/parnet: no such directory; to read a model .*pip install hugg"):
        open_checkpoint(Path("runs/parnet"), fetch=True)
