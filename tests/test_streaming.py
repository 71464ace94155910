"""The streaming core: every byte lands where it belongs, with its checksum, whatever the sizes and the file system."""

import errno
import io
import json
import os
import re
import shutil
import stat
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import CONVERT, run
from helpers import assert_same_tensors, convert, digests, make_llama, rank_file, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.pruning.formats import megatron_dist, open_checkpoint, save_checkpoint
from megatron.pruning.model.layout import Layout
from megatron.pruning.storage import direct_write, output
from megatron.pruning.storage.dcp_file import read_metadata
from megatron.pruning.storage.direct_write import Segment, fill, finish
from megatron.pruning.storage.dtypes import BYTES
from megatron.pruning.storage.manifest import MANIFEST, Digest, manifest_bytes, read_manifest, verify
from megatron.pruning.storage.source_file import File
from megatron.pruning.storage.torch_writer import archive, tensor
from megatron.pruning.storage.views import (
    BITS,
    BLOCK_BYTES,
    Bits,
    Index,
    Stored,
    View,
    cast,
    concat,
    read_all,
    take,
)


class Held(View):
    """A tensor in memory."""

    def __init__(self, bits: Bits, dtype: str = "bf16") -> None:
        self.bits, self.shape, self.dtype = bits, bits.shape, dtype

    def sources(self) -> Iterator[File]:
        return iter(())

    def read_into(self, rows: Index, out: Bits) -> None:
        out[:] = self.bits[rows]


def random_view(*shape: int, dtype: str = "bf16", seed: int = 0) -> Held:
    """Return a tensor of random bits, NaNs of every kind among them."""
    kind = BITS[BYTES[dtype]]
    info = np.iinfo(kind)
    return Held(np.random.default_rng(seed).integers(info.min, info.max, shape, kind, endpoint=True), dtype)


@pytest.mark.parametrize("format", ["hf", "torch", "torch_dist"])
def test_every_format_gets_a_manifest_of_all_its_files(gqa: Path, tmp_path: Path, format: str) -> None:
    path = convert(gqa, tmp_path / "out", format=format, layout=Layout(2, 2))
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    content = json.loads(files.pop(MANIFEST))
    assert content == {"format": 1, "files": {
        name: {"bytes": len(raw), "crc32": f"{zlib.crc32(raw):08x}"} for name, raw in files.items()
    }}  # fmt: skip
    assert verify(path) == []


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_digests_add_up_to_the_digest_of_the_whole(pieces: list[bytes]) -> None:
    assert sum(map(Digest.of, pieces), Digest()) == Digest.of(b"".join(pieces))


def test_torch_and_zip_find_rank_files_whole(gqa: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    for path in sorted(convert(gqa, tmp_path / "m", tensor=2).rglob("*.pt")):
        assert zipfile.ZipFile(path).testzip() is None  # reads every entry and checks its crc32
        assert all(entry.CRC for entry in zipfile.ZipFile(path).infolist())
        with torch.serialization.safe_globals([Namespace]):
            plain, mapped = (torch.load(path, weights_only=True, mmap=mmap) for mmap in (False, True))
            torch.save(plain, again)  # what torch writes of it holds the same
            round_trip = torch.load(again, weights_only=True)
        assert plain["args"] == mapped["args"] == round_trip["args"]
        for key, value in plain["model"].items():
            assert torch.equal(value, mapped["model"][key]) and torch.equal(value, round_trip["model"][key])
            assert value.data_ptr() % 64 == mapped["model"][key].data_ptr() % 64 == 0


def test_zip_finds_every_entry_of_torch_dist_whole(gqa: Path, tmp_path: Path) -> None:
    release = convert(gqa, tmp_path / "m", format="torch_dist") / "release"
    chunks = [chunk for entry in read_metadata(release).values() for chunk in entry.chunks.values()]
    assert len(chunks) > 30
    for chunk in chunks:
        raw = chunk.path.read_bytes()[chunk.start : chunk.start + chunk.length]
        assert zipfile.ZipFile(io.BytesIO(raw)).testzip() is None


@pytest.mark.skipif(shutil.which("unzip") is None, reason="no unzip here")
def test_unzip_finds_a_rank_file_whole(gqa: Path, tmp_path: Path) -> None:
    done = run("unzip", "-t", str(rank_file(convert(gqa, tmp_path / "m"), "mp_rank_00")))
    assert done.returncode == 0 and "No errors detected" in done.stdout, done.stdout


def test_storages_beyond_four_gibibytes_are_read_by_torch_and_zip(tmp_path: Path) -> None:
    large, small = Held(np.broadcast_to(np.int16(0), (3, 1 << 30))), random_view(5, 3)
    sizes = {"large": large.nbytes, "small": small.nbytes}
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        for part in archive({"large": tensor(large, 0), "small": tensor(small, 1)}, sizes, {}):
            if part == "small":
                file.write(small.bits.tobytes())
            elif part == "large":
                file.seek(large.nbytes, os.SEEK_CUR)  # a hole
            else:
                file.write(part)
    assert [entry.file_size for entry in zipfile.ZipFile(path).infolist()][2:4] == [6 << 30, 30]
    content = torch.load(path, weights_only=True, mmap=True)
    assert content["large"].shape == (3, 1 << 30) and int(content["large"][2, -1]) == 0
    assert torch.equal(content["small"].view(torch.int16), torch.from_numpy(small.bits))


def segments(*contents: bytes | View) -> list[Segment]:
    """Lay out contents one after the other."""
    made, at = [], 0
    for i, content in enumerate(contents):
        size = len(content) if isinstance(content, bytes) else content.nbytes
        made.append(Segment(at, at + size, None if isinstance(content, bytes) else str(i), content))
        at += size
    return made


def no_direct_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file system not know O_DIRECT, as tmpfs does not."""

    def refuse(descriptor: int, direct: bool) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(direct_write, "_set_direct", refuse)


def direct_writes_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file system take the flag, but no write that has it."""
    write = os.pwrite

    def refuse(descriptor: int, data: memoryview, offset: int) -> int:
        if direct_write.fcntl.fcntl(descriptor, direct_write.fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data, offset)

    monkeypatch.setattr(direct_write.os, "pwrite", refuse)


def short_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file system write a page at a time."""
    write = os.pwrite
    monkeypatch.setattr(
        direct_write.os, "pwrite", lambda descriptor, data, offset: write(descriptor, data[:4096], offset)
    )


@pytest.mark.parametrize("system", [lambda _: None, no_direct_writes, direct_writes_fail, short_writes])
def test_every_byte_lands_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system) -> None:
    system(monkeypatch)
    views = [random_view(1001, 777), random_view(3), random_view(7, 5, dtype="fp32"), random_view(2, 700_001)]
    laid = segments(b"head", views[0], b"", b"between", *views[1:3], b"x" * 5000, views[3], b"tail")
    wanted = [part.content if isinstance(part.content, bytes) else part.content.bits.tobytes() for part in laid]
    monkeypatch.setattr(direct_write, "EXTENT_BYTES", 1 << 20)
    assert laid[-1].stop > 4 << 20
    told: list[int] = []
    digests = fill(tmp_path / "file", laid, told.append)
    assert (tmp_path / "file").read_bytes() == b"".join(wanted)
    assert digests == [Digest.of(content) for content in wanted]
    assert sum(told) == sum(view.nbytes for view in views)
    finish(tmp_path / "file", [(1, b"EA"), (laid[-1].start, b"TAIL")])
    assert (tmp_path / "file").read_bytes() == b"hEAd" + b"".join(wanted)[4:-4] + b"TAIL"


def test_an_empty_file_can_be_written(tmp_path: Path) -> None:
    assert fill(tmp_path / "file", segments(b""), lambda _: None) == [Digest()]
    assert (tmp_path / "file").read_bytes() == b""


def test_one_thread_that_fails_ends_the_others(tmp_path: Path) -> None:
    read: list[int] = []

    class Broken(Held):
        def read_into(self, rows: Index, out: Bits) -> None:
            read.append(int(rows[0]))
            time.sleep(0.02)
            if not threading.current_thread().name.endswith("_0"):  # the one whose end is waited for first
                raise ValueError("it cannot be read")
            super().read_into(rows, out)

    view = Broken(np.zeros((64 * 512, 1024), np.int16))  # 64 extents of 512 rows
    with pytest.raises(ValueError, match="it cannot be read"):
        fill(tmp_path / "file", segments(view), lambda _: None)
    assert len(read) < 32


def test_a_full_disk_is_said_of_the_file_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_write.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as failure:
        fill(tmp_path / "file", segments(random_view(10, 10)), lambda _: None)
    assert failure.value.filename == str(tmp_path / "file")


def test_a_source_that_fails_is_said_of_the_source(gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(gqa)

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError, match="Input/output error") as failure:
        save_checkpoint(source, tmp_path / "out", format="torch")
    assert failure.value.filename == str(gqa / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(4000))
    view = Stored(File(path), 0, (1000,), "fp32")
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match="data was changed or replaced while it was read"):
        view.read(np.arange(1000))


@settings(deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.sampled_from(sorted(BYTES)), st.booleans())
def test_any_stretch_of_bytes_is_read_alike(
    data: st.DataObject, rows: int, columns: int, dtype: str, flat: bool
) -> None:
    parts = [random_view(*(n,) if flat else (n, columns), dtype=dtype, seed=n) for n in (rows, 1, rows + 1)]
    view = concat(parts, 0)
    raw = b"".join(part.bits.tobytes() for part in parts)
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, len(raw)))
    room = np.zeros(stop - start + 1, np.uint8)
    out = room[data.draw(st.integers(0, 1)) :][: stop - start]  # also where the elements are not aligned
    view.read_bytes(start, out)
    assert out.tobytes() == raw[start:stop]


@pytest.mark.parametrize(("axis", "every"), [(0, 3), (1, 64)])
def test_what_is_read_to_keep_little_of_it_stays_small(tmp_path: Path, axis: int, every: int) -> None:
    rows, columns = 1 << 14, 1 << 12
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", 2 * rows * columns)  # 128 MiB
    view = take(
        Stored(File(tmp_path / "file"), 0, (rows, columns), "bf16"), axis, np.arange(0, (rows, columns)[axis], every)
    )
    out = np.empty(view.nbytes, np.uint8)
    tracemalloc.start()
    view.read_bytes(0, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * BLOCK_BYTES


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=12),
    st.sampled_from([1, 2, 4, 8, 16, 24, 32]),
    st.sampled_from(sorted(BYTES)),
)
def test_columns_are_taken_as_numpy_takes_them(blocks: list[int], width: int, dtype: str) -> None:
    index = (np.array(blocks)[:, None] * width + np.arange(width)).ravel()
    view = random_view(6, 9 * width, dtype=dtype)
    for chosen in (index, index[1:], index[:-1], index + 1 if width > 1 else index):
        assert np.array_equal(read_all(take(view, 1, chosen)), view.bits[:, chosen])
    rows = np.array([5, 0, 0, 3])
    both = take(take(view, 0, rows), 1, index)
    assert np.array_equal(read_all(both), view.bits[rows][:, index])
    joined = concat([both, take(view, 0, rows)], 1)
    assert np.array_equal(read_all(joined), np.concatenate([view.bits[rows][:, index], view.bits[rows]], 1))


@pytest.mark.parametrize("before", sorted(BYTES))
@pytest.mark.parametrize("after", ["bf16", "fp32"])
def test_values_are_rounded_as_torch_rounds_them(before: str, after: str) -> None:
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    bits = np.arange(1 << 16).astype(np.uint16).view(np.int16)
    if before == "fp32":  # every upper half, with lower halves on both sides of and on a tie
        halves = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.int32)
        bits = ((bits.astype(np.int32) << 16)[:, None] | halves).ravel()
    found = torch.from_numpy(read_all(cast(Held(bits, before), after))).view(kinds[after])
    wanted = torch.from_numpy(bits).view(kinds[before]).to(kinds[after])
    number = ~wanted.isnan()
    assert torch.equal(found.isnan(), wanted.isnan()) and int(number.sum()) > 60_000
    assert torch.equal(found[number].view(torch.uint8), wanted[number].view(torch.uint8))


def test_fp16_is_rounded_as_torch_rounds_it() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 3, 100_000)
    values[:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    found = torch.from_numpy(read_all(cast(Held(values.view(torch.int32).numpy(), "fp32"), "fp16"))).view(torch.float16)
    assert torch.equal(found[3:], values[3:].half()) and torch.equal(found[:2], values[:2].half())
    assert bool(found[2].isnan())


@pytest.mark.slow
def test_plans_are_made_without_torch(gqa: Path, tmp_path: Path) -> None:
    script = (
        "import sys; import prune_llama; prune_llama.main(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'megatron.core'} & set(sys.modules)))"
    )
    shards = convert(gqa, tmp_path / "torch", tensor=2, pipeline=2)
    for source in (gqa, shards, convert(gqa, tmp_path / "dist", format="torch_dist")):
        flags = ["--load", str(source), "--save", str(tmp_path / "out"), "--drop-layers", "1,2", "--plan-only"]
        done = run(sys.executable, "-c", script, *flags)
        assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stdout + done.stderr


def test_manifests_are_the_same_whatever_the_order(tmp_path: Path) -> None:
    digests = {"b": Digest(1, 2), "a/c": Digest(3, 0xFFFFFFFF)}
    assert manifest_bytes(digests) == manifest_bytes(dict(reversed(digests.items())))
    (tmp_path / MANIFEST).write_bytes(manifest_bytes(digests))
    assert read_manifest(tmp_path / MANIFEST) == digests


OPTIONAL = (
    "flock",
    "posix_fallocate",
    "posix_fadvise",
    "fsync of a directory",
    "renameat2",
    "O_DIRECT",
    "direct write",
)
ANY_ERROR = ("renameat2", "flock", "posix_fadvise", "O_DIRECT")  # is taken alike


def without(call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file system answer an optional call with an error."""
    write, sync, control = os.pwrite, os.fsync, direct_write.fcntl.fcntl

    def refuse(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    def sync_files(descriptor: int) -> None:
        return refuse() if stat.S_ISDIR(os.fstat(descriptor).st_mode) else sync(descriptor)

    def control_without_direct(descriptor: int, command: int, *argument: int) -> int:
        direct = command == direct_write.fcntl.F_SETFL and argument[0] & os.O_DIRECT
        return refuse() if direct else control(descriptor, command, *argument)

    def write_without_direct(descriptor: int, data: memoryview, offset: int) -> int:
        direct = control(descriptor, direct_write.fcntl.F_GETFL) & os.O_DIRECT
        return refuse() if direct else write(descriptor, data, offset)

    patches: dict[str, tuple[Any, str, Any]] = {
        "flock": (output.fcntl, "flock", refuse),
        "posix_fallocate": (os, "posix_fallocate", refuse),
        "posix_fadvise": (os, "posix_fadvise", refuse),
        "fsync of a directory": (os, "fsync", sync_files),
        "renameat2": (output, "_renameat2", lambda *_: False),
        "O_DIRECT": (direct_write.fcntl, "fcntl", control_without_direct),
        "direct write": (os, "pwrite", write_without_direct),
    }
    monkeypatch.setattr(*patches[call])


@pytest.fixture(scope="module")
def cut_in_two(gqa: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of a conversion."""
    return digests(convert(gqa, tmp_path_factory.mktemp("wanted") / "wanted", tensor=2))


@pytest.mark.slow(0.7)
@pytest.mark.parametrize(
    "call,number",
    # What names are exchanged with says no more than that it cannot.
    [
        (call, number)
        for call in OPTIONAL
        for number in sorted(direct_write.UNSUPPORTED)[: 1 if call in ANY_ERROR else None]
    ],
    ids=lambda value: value if isinstance(value, str) else errno.errorcode[value],
)
def test_a_file_system_without_an_optional_call_will_do(
    gqa: Path,
    cut_in_two: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: str,
    number: int,
) -> None:
    without(call, number, monkeypatch)
    for overwrite in (False, True):
        assert digests(convert(gqa, tmp_path / "out", tensor=2, overwrite=overwrite)) == cut_in_two
        assert capsys.readouterr().err.count("has no locks") == (call == "flock")
        assert verify(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("format", ["hf", "torch", "torch_dist"])
def test_an_error_of_the_system_is_no_damaged_checkpoint(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, number: int
) -> None:
    source = convert(gqa, tmp_path / "source", format=format)

    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as failure:
        convert(source, tmp_path / "out", format="hf")
    assert str(source) in str(failure.value.filename)
    assert not (tmp_path / "out").exists()


def test_a_file_system_that_takes_nothing_is_an_error(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="takes no more bytes"):
        convert(gqa, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_more_files_than_a_process_may_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_dist, "SHARD_BYTES", 1)
    source = make_llama(tmp_path / "hf", layers=60)
    many = convert(source, tmp_path / "many", format="torch_dist")
    assert len(list((many / "release").glob("*.distcp"))) > 300
    limited = ["bash", "-c", 'ulimit -n 128; exec "$@"', "limited", sys.executable, CONVERT]
    done = run(*limited, "--load", str(many), "--save", str(tmp_path / "back"), "--format", "hf")
    assert done.returncode == 0, done.stderr
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


def test_files_that_nobody_reads_any_more_are_closed_by_the_next_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(5000))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(300):
        file = File(tmp_path / "data")
        file.read_into(memoryview(bytearray(5000)), 0)
        del file
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
