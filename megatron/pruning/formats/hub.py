"""Names of the Hugging Face hub: a model is read where the hub's cache has it, and fetched to there if it has not."""

import contextlib
import fcntl
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron.pruning.formats.huggingface import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    indexed_files,
    read_hf_config,
    weight_files,
)
from megatron.pruning.model.lineage import COMMIT
from megatron.pruning.storage.progress import Progress
from megatron.pruning.storage.small_files import read_small

_NAME = re.compile(r"(?P<model>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_COMMIT = re.compile(COMMIT)
_WEIGHTS = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
# What may be fetched beside the weights: data and texts, in the repository's own folder.
_SMALL = [
    "*.json", "*.model", "*.model.v*", "*.txt", "*.tiktoken", "*.bpe", "chat_template*.jinja",
    "additional_chat_templates/*.jinja", "README.md", "LICENSE", "LICENSE.md", "USE_POLICY.md", "NOTICE", "NOTICE.md",
]  # fmt: skip


def located(path: Path, fetch: bool) -> Path:
    """Return the directory that `path` stands for.

    That is itself; of a model's directory in the hub's cache its snapshot; and of a model's name, `owner/name` or
    `owner/name@revision`, the snapshot that the cache has, or with `fetch` gets. Raises ValueError for a name of which
    there is no model to be had.
    """
    if path.exists():
        return _snapshot(path) if (path / "snapshots").is_dir() else path
    if not (name := _NAME.fullmatch(str(path))):
        return path
    try:
        from huggingface_hub import constants
    except ImportError as error:  # it comes with transformers, which pruning can do without
        raise ValueError(
            f"--load {path}: no such directory; to read a model of this name from the Hugging Face hub: "
            "pip install huggingface_hub"
        ) from error
    model, revision = name["model"], name["revision"]
    cache = Path(constants.HF_HUB_CACHE)
    home = cache / f"models--{model.replace('/', '--')}"
    if found := _cached(home, revision):
        return found
    if not fetch:
        chosen = f" --revision {revision}" if revision else ""
        raise ValueError(
            f"{path}: no such directory, and no such model in the hub's cache; to get one from the hub: "
            f"hf download {model}{chosen}"
        )
    with _alone(cache / ".locks" / f"{home.name}.fetching"):
        return _cached(home, revision) or _fetched(path, model, revision)


def _cached(home: Path, revision: str | None) -> Path | None:
    """Return the snapshot of a revision if the cache has all of its weights."""
    commit = revision or "main"
    if not _COMMIT.fullmatch(commit):
        branch = home / "refs" / commit
        commit = _commit_of(branch) if branch.is_file() else ""
    folder = home / "snapshots" / commit
    return folder if commit and _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / CONFIG_FILE).is_file() and bool(weight_files(folder))
    except ValueError:
        return False


def _fetched(path: Path, model: str, revision: str | None) -> Path:
    """Fetch a model: first what is small, then, if that is a model to be read, its safetensors; return its snapshot.

    Raises ValueError, with one sentence, where that does not work.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    where = constants.ENDPOINT
    if not constants.HF_HUB_OFFLINE:
        print(f"{path}: no such directory here: fetching the model of that name from {where}", file=sys.stderr)
    if Progress.quiet or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        small = Path(
            snapshot_download(
                model, revision=revision, allow_patterns=_SMALL, ignore_patterns=[f"*/{name}" for name in _SMALL]
            )
        )
        if not (small / CONFIG_FILE).is_file():
            raise ValueError(
                f"--load {path}: {model} on {where} has no {CONFIG_FILE}, so that it is no Llama to be read"
            )
        read_hf_config(small / CONFIG_FILE)  # before gigabytes of another model are fetched
        snapshot_download(model, revision=small.name, allow_patterns=_names_of_weights(small))
    except HFValidationError:
        raise ValueError(f"--load {path}: no such directory, and no name that a model of the hub could have") from None
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise
        raise ValueError(f"--load {path}: {_reason(error, model, revision)}") from error
    if not _is_whole(small):
        raise ValueError(
            f"--load {path}: {model} on {where} has no {WEIGHTS_FILE}, in one file or several, which is all that is "
            f"fetched; to read other weights: hf download {model}"
        )
    return small


def _names_of_weights(small: Path) -> list[str]:
    """Return the files of weights of a model whose small files are there. Raises ValueError for other names."""
    if not (small / INDEX_FILE).is_file():
        return [WEIGHTS_FILE]
    names = indexed_files(small / INDEX_FILE)
    if strange := [name for name in names if not _WEIGHTS.fullmatch(name)]:
        raise ValueError(f"{small / INDEX_FILE} names {strange[0][:100]!r}: only files of safetensors are fetched")
    return names


def _reason(error: Exception, model: str, revision: str | None) -> str:
    """Return why a model could not be fetched, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    where, here = constants.ENDPOINT, "no such directory, and not in the hub's cache, or not whole"
    if constants.HF_HUB_OFFLINE:
        return f"{here}; HF_HUB_OFFLINE is set, so that nothing is fetched: unset it, or name a directory"
    if isinstance(error, hub.GatedRepoError):
        return f"{where} gives {model} to those alone who ask for it: ask on its page, then log in with hf auth login"
    if isinstance(error, hub.RepositoryNotFoundError):
        return (
            f"no such directory, and {where} has no such model, or shows it to its owners alone: see how it is "
            "spelled, or log in with hf auth login"
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{model} on {where} has no revision {revision or 'main'}"
    told = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, hub.LocalEntryNotFoundError):
        return f"{here}; {where} cannot be reached: try again, or name a directory ({told[0][:200]})"
    return f"it could not be fetched from {where}: the same command goes on where it was ({told[0][:200]})"


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keep the other processes of this machine waiting, so that one of them fetches a model and the others find it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: the hub's client has some of its own
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _snapshot(cached: Path) -> Path:
    """Return the snapshot of a model's directory in the cache: the main branch's, or the only one."""
    main, snapshots = cached / "refs" / "main", sorted((cached / "snapshots").iterdir())
    if main.is_file():
        return cached / "snapshots" / _commit_of(main)
    if len(snapshots) != 1:
        names = ", ".join(path.name for path in snapshots) or "none"
        raise ValueError(f"--load {cached} has no main branch, and its snapshots are: {names}; name one of them")
    return snapshots[0]


def _commit_of(branch: Path) -> str:
    """Return the commit that a branch of the cache stands for."""
    commit = read_small(branch).decode(errors="replace").strip()
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"{branch} holds {commit[:50]!r}, which is no commit: download the model again")
    return commit
