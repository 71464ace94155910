"""Files of records: compressed or not, several by a pattern, Parquet; damage and a missing library are one sentence."""

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron.pruning.storage.records import are_records, find_files, parse_record, records, text_at

ROWS: list[dict[str, Any]] = [{"text": f"line {i}\n☃", "meta": {"body": f"deep {i}"}} for i in range(600)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write(path: Path) -> Path:
    """Write the rows as the name of the file says."""
    if path.suffix == ".gz":  # of two members, as `cat a.gz b.gz` makes them
        path.write_bytes(gzip.compress(LINES[:1000]) + gzip.compress(LINES[1000:]))
    elif path.suffix == ".zst":
        compressor = pytest.importorskip("zstandard").ZstdCompressor()
        path.write_bytes(compressor.compress(LINES[:1000]) + compressor.compress(LINES[1000:]))
    elif path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow").Table.from_pylist(ROWS)
        importlib.import_module("pyarrow.parquet").write_table(table, path)
    else:
        path.write_bytes(LINES)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_kind_of_file_has_the_same_records(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    assert are_records(path)
    found = list(records(path, ["text", "meta.body"]))
    assert [parse_record(record.raw) for record in found] == ROWS
    assert [record.number for record in found] == list(range(1, len(ROWS) + 1))
    assert sum(record.read for record in found) == path.stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{name} (is damaged after line \d+|cannot be read as Parquet): "):
        list(records(path))


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_library_that_is_missing_is_named(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=f"{name} needs {package}, which is not installed: pip install {package}"):
        list(records(tmp_path / name))


def test_patterns_name_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz", "[d].jsonl"):
        write(tmp_path / name)
    found = find_files([f"{tmp_path}/?.jsonl", f"{tmp_path}/c*", f"{tmp_path}/[d].jsonl"], "--input")
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl", "c.jsonl.gz", "[d].jsonl"]
    with pytest.raises(ValueError, match=r"--input .*/\*\.txt matches no file"):
        find_files([f"{tmp_path}/*.txt"], "--input")
    with pytest.raises(ValueError, match=r"--input .*none\.jsonl is not a file"):
        find_files([f"{tmp_path}/none.jsonl"], "--input")


def test_a_key_may_be_a_path() -> None:
    record = {"a": {"b": {"c": "deep"}}, "a.b": "flat", "n": 1}
    assert (text_at(record, "a.b.c"), text_at(record, "a.b")) == ("deep", "flat")
    for key, sentence in {"a.x": 'there is no "a.x", only a, a.b, n', "n.x": 'no "n.x"', "n": '"n" holds int'}.items():
        with pytest.raises(ValueError, match=sentence):
            text_at(record, key)
