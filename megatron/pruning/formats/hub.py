"""Names of the Hugging Face hub: a model that lies in the hub's cache is read there, and nothing is downloaded."""

import re
from pathlib import Path

from megatron.pruning.storage.small_files import read_small

_NAME = re.compile(r"(?P<model>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def located(path: Path) -> Path:
    """Return the directory that `path` stands for.

    That is itself; of a model's directory in the hub's cache its snapshot; and of a model's name, `owner/name` or
    `owner/name@revision`, the snapshot that the cache has. Raises ValueError for a name that the cache does not have.
    """
    if path.exists():
        return _snapshot(path) if (path / "snapshots").is_dir() else path
    if not (name := _NAME.fullmatch(str(path))):
        return path
    model, revision = name["model"], name["revision"]
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:  # it comes with transformers, which pruning can do without
        return path
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        chosen = f" --revision {revision}" if revision else ""
        raise ValueError(
            f"--load {path}: no such directory, and no such model in the hub's cache; to get one from the hub: "
            f"hf download {model}{chosen}"
        ) from None


def _snapshot(cached: Path) -> Path:
    """Return the snapshot of a model's directory in the cache: the main branch's, or the only one."""
    main, snapshots = cached / "refs" / "main", sorted((cached / "snapshots").iterdir())
    if main.is_file():
        commit = read_small(main).decode(errors="replace").strip()
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"{main} holds {commit[:50]!r}, which is no commit: download the model again")
        return cached / "snapshots" / commit
    if len(snapshots) != 1:
        names = ", ".join(path.name for path in snapshots) or "none"
        raise ValueError(f"--load {cached} has no main branch, and its snapshots are: {names}; name one of them")
    return snapshots[0]
