"""No checkpoint, however broken or malicious, runs code, hangs, fills the memory or is read wrongly in silence.

`fuzz_checkpoints.py` breaks checkpoints at random; some of it runs here, and what it or a reader of the code has found
stays below by name.
"""

import io
import json
import os
import shutil
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from fuzz_checkpoints import Fuzzer, call, convert, make_base, time_limit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_refusals import rank, rewritten, set_config

from megatron.pruning.model.layout import Layout
from megatron.pruning.storage import pickles
from megatron.pruning.storage.pickles import read_pickle


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Durability is not what is tried here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    """Sound checkpoints in every format, and what tries broken ones."""
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_a_broken_checkpoint_is_refused_in_a_sentence_or_read_right(fuzzer: Fuzzer, random: Random) -> None:
    fuzzer.attempt(random)


@pytest.fixture(autouse=True)
def a_minute() -> Iterator[None]:
    """Whatever hangs is a failure."""
    with time_limit(60):
        yield


def refused(source: Path, message: str) -> None:
    """Assert that a checkpoint is refused, in one line that matches, and nothing is written."""
    target = source.with_name("target")
    with pytest.raises(ValueError, match=message) as refusal:
        convert(source, target, format="hf")
    assert "\n" not in str(refusal.value)
    assert [path.name for path in source.parent.iterdir() if "target" in path.name] == []


def header(change: Callable[[dict[str, Any]], Any], as_text: Callable[[str], str] = str) -> Callable[[Path], None]:
    """Return a function that changes the header of a file of safetensors, and leaves the data."""

    def apply(path: Path) -> None:
        file = path / "model.safetensors"
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        tree = json.loads(raw[8:end])
        change(tree)
        text = as_text(json.dumps(tree)).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return apply


NORM, K, V = "model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"


def sparse(name: str, size: int) -> Callable[[Path], None]:
    """Return a function that makes a file of a claimed size that takes no disk."""

    def apply(path: Path) -> None:
        (path / name).touch()
        os.truncate(path / name, size)

    return apply


def claim_header(path: Path) -> None:
    """Make a file of which the whole 50 MB are a header."""
    sparse("model.safetensors", 50_000_008)(path)
    with (path / "model.safetensors").open("r+b") as file:
        file.write((50_000_000).to_bytes(8, "little"))


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda path: (path / "config.json").write_text("[" * 200_000), r"config.json is not JSON: maximum recursion"),
        (lambda path: (path / "config.json").write_text('{"a":1,"a":2}'), r"config.json is not JSON: .*'a' twice"),
        (lambda path: (path / "config.json").write_bytes(b'{"a":"\xff"}'), r"config.json is not JSON: .*utf-8"),
        (sparse("config.json", 1 << 40), r"config.json has 1,099,511,627,776 bytes"),
        (sparse("tokenizer.json", 1 << 40), r"tokenizer.json has 1,099,511,627,776 bytes"),
        (sparse("prune_plan.json", 1 << 40), r"prune_plan.json has 1,099,511,627,776 bytes"),
        (set_config(num_hidden_layers=10**9), r"num_layers is 1000000000: .* from 1 to 10000"),
        (set_config(num_attention_heads=2**24, num_key_value_heads=2**24, head_dim=2**24), r"more than any model has"),
        (set_config(vocab_size=2**40), r"vocab_size is 1099511627776: .* from 1 to 16777216"),
        (set_config(vocab_size=True), r"vocab_size is True"),
        (set_config(model_type=["llama"]), r"model_type is \['llama'\], but a dense Llama"),
        (set_config(note="\ud800"), r"config.json is not JSON: 'utf-8' codec can't encode"),
        (set_config(rope_theta=10**400), r"int too large to convert to float"),
        (set_config(rope_parameters={"rope_type": "llama3", "factor": []}), r"must be a string or a real number"),
        (set_config(bos_token_id=float("nan")), r"config.json is not JSON: NaN is not a number"),
        (
            lambda path: set_config(x=1)(path) or replace(path / "config.json", b'"x": 1', b'"x": 1e999'),
            r"1e999 is not",
        ),
        (claim_header, r"has a header of 50,000,000 bytes: more than 10,000,000"),
        (header(lambda tree: None, lambda text: "[" * 200_000), r"the header of .* is not JSON: maximum recursion"),
        (header(lambda tree: None, lambda text: text[:-1] + "," + text[1:]), r"the header of .* twice"),
        (header(lambda tree: None, lambda text: text.replace("16", "1" * 5000, 1)), r"the header of .*4300 digits"),
        (header(lambda tree: tree.update({NORM: 5})), r"model.norm.weight has shape None"),
        (header(lambda tree: tree[NORM].update(shape=[2**63])), r"model.norm.weight has shape \[9223372036854775808\]"),
        (header(lambda tree: tree[NORM].update(shape=[16, True])), r"model.norm.weight has shape \[16, True\]"),
        (header(lambda tree: tree[NORM].update(dtype=["F32"])), r"model.norm.weight has dtype \['F32'\]"),
        (
            header(lambda tree: tree[K].update(data_offsets=tree[V]["data_offsets"])),
            r"begins at byte .* before it ends",
        ),
        (header(lambda tree: tree.pop("model.norm.weight")), r"before it ends at|its tensors end at"),
        (lambda path: append(path / "model.safetensors", b"x"), r"has \d+ bytes, but its tensors end at byte"),
    ],
)
def test_hostile_hugging_face_checkpoints(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    source = make_base(tmp_path / "hf")
    damage(source)
    refused(source, message)


def replace(file: Path, old: bytes, new: bytes) -> None:
    """Replace the first occurrence of some bytes in a file."""
    raw = file.read_bytes()
    assert old in raw
    file.write_bytes(raw.replace(old, new, 1))


def append(file: Path, more: bytes) -> None:
    """Make a file longer."""
    file.write_bytes(file.read_bytes() + more)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "directory", "nowhere"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, name: str, kind: str) -> None:
    source = make_base(tmp_path / "hf")
    path = source / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)  # to open it would be to wait for ever
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": name, "nowhere": "../" * 40 + "nowhere"}[kind])
    refused(source, r"is not a checkpoint|neither model.safetensors nor")


def rezipped(
    change: Callable[[bytes], bytes] = bytes,
    method: int = zipfile.ZIP_STORED,
    more: dict[str, bytes] | None = None,
    name: str = "mp_rank_00",
) -> Callable[[Path], None]:
    """Return a function that writes the zip archive of a rank file anew, its pickle changed."""

    def apply(path: Path) -> None:
        out = io.BytesIO()
        with zipfile.ZipFile(rank(path, name)) as before, zipfile.ZipFile(out, "w", method) as after:
            for entry in before.infolist():
                with before.open(entry) as file:
                    file._expected_crc = None  # type: ignore[attr-defined]  # holes that were filled later have none
                    content = file.read()
                after.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
            for extra, content in (more or {}).items():
                after.writestr(extra, content)
        rank(path, name).write_bytes(out.getvalue())

    return apply


def before_stop(opcodes: bytes) -> Callable[[bytes], bytes]:
    """Return a function that adds opcodes at the end of a pickle."""
    return lambda pickled: pickled[:-1] + opcodes + b"."


LAUGHS = b")" + b"q\xfe0h\xfeh\xfe\x86" * 60  # a tuple of two of a tuple of two of ...: hashing it takes for ever
TWO, MODEL = r"release/mp_rank_01/model_optim_rng.pt", "decoder.layers.0."


def nested(depth: int) -> Any:
    """Return tuples of which each holds the one before it twice: comparing two such takes for ever."""
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return value


def in_itself() -> dict[str, Any]:
    """Return a dictionary that holds itself."""
    found: dict[str, Any] = {}
    found["x"] = found
    return found


def swap(path: Path, a: str, b: str) -> None:
    """Exchange two rank files."""
    first, second = rank(path, a), rank(path, b)
    raw = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(raw)


def both(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return a function that rewrites both rank files alike."""
    return lambda path: [rewritten(name, change)(path) for name in ("mp_rank_00", "mp_rank_01")] and None


@pytest.mark.parametrize(
    "damage,message",
    [
        (rezipped(method=zipfile.ZIP_DEFLATED), r"is damaged: the entry .* is compressed"),
        (rezipped(lambda raw: raw + bytes(10**8), zipfile.ZIP_DEFLATED), r"is damaged: the entry .* is compressed"),
        (rezipped(lambda raw: raw + bytes(1 << 26)), r"a header of .* bytes, more than"),
        (rezipped(more={"model_optim_rng/data.pkl": b"x"}), r"is damaged: it holds an entry twice"),
        (rezipped(before_stop(LAUGHS + b"}" + LAUGHS + b"Ns")), r"a key of it is not plain"),
        (rezipped(before_stop(b"X\xff\xff\xff\xff")), r"is damaged: it ends too early"),
        (rezipped(before_stop(b"\x96" + struct.pack("<Q", 1 << 35))), r"is damaged: its pickle has the opcode b'.x96'"),
        (rezipped(before_stop(call("posix", "system", "true"))), r"holds more than data .* it names posix.system"),
        (rezipped(before_stop(call("builtins", "eval", "1"))), r"holds more than data .* it names builtins.eval"),
        (rezipped(before_stop(call("builtins", "getattr", "1"))), r"holds more than data .* builtins.getattr"),
        (rezipped(before_stop(b"NR")), r"it makes an object of what is not a class"),
        (lambda path: replace(rank(path, "mp_rank_00"), b"num_layers", b"num_lavers"), r"the checksum .*data.pkl"),
        (lambda path: replace(rank(path, "mp_rank_00"), b"little", b"big   "), r"the checksum .*byteorder|byte order"),
        (rewritten("mp_rank_00", lambda c: c.update(iteration=nested(60))), r"is of iteration \(\("),
        (both(lambda c: c.update(iteration=nested(60))), r"is of iteration \(\("),
        (both(lambda c: c.update(checkpoint_version="x")), r"has checkpoint_version 'x'"),
        (both(lambda c: c.update(model=in_itself())), r"'model' is nested in itself"),
        (both(lambda c: setattr(c["args"], "swiglu", nested(60))), r"argument swiglu is \(\("),
        (both(lambda c: setattr(c["args"], "hidden_size", 10**400)), r"hidden_size is 1000"),
        (both(lambda c: setattr(c["args"], "rotary_base", 10**400)), r"int too large to convert to float"),
        (both(lambda c: setattr(c["args"], "make_vocab_size_divisible_by", "x")), r"divisible_by is str, not a number"),
        (lambda path: swap(path, "mp_rank_00", "mp_rank_01"), r"was saved by process 0 and .* by 1: .* mixed up"),
        (
            lambda path: shutil.copy(rank(path, "mp_rank_01"), rank(path, "mp_rank_00")),
            r"mp_rank_01.* was saved by process 1 and .*mp_rank_00.* by 1: .* mixed up",
        ),
        (
            rewritten("mp_rank_01", lambda c: setattr(c["args"], "tensor_model_parallel_size", 4)),
            r"rank files for tensor_model_parallel_size 2, but .*mp_rank_01.* says 4",
        ),
        (
            rewritten("mp_rank_01", lambda c: c["model"][f"{MODEL}input_layernorm.weight"].mul_(1.5)),
            r"decoder.layers.0.input_layernorm.weight on tensor ranks 0 and 1 differs by up to",
        ),
        (
            rewritten("mp_rank_01", lambda c: c["model"]["decoder.final_layernorm.weight"].fill_(float("nan"))),
            r"decoder.final_layernorm.weight on tensor ranks 0 and 1 differs by up to nan",
        ),
        (
            rewritten(
                "mp_rank_00",
                lambda c: c["model"].update(
                    {f"{MODEL}pre_mlp_layernorm.weight": c["model"][f"{MODEL}input_layernorm.weight"]}
                ),
            ),
            r"decoder.layers.0.input_layernorm.weight and decoder.layers.0.pre_mlp_layernorm.weight share bytes",
        ),
    ],
)
def test_hostile_rank_files(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    source = convert(make_base(tmp_path / "hf"), tmp_path / "m", layout=Layout(2, 1, 4))
    damage(source)
    refused(source, message)


def test_pipeline_stages_that_changed_places_are_refused(tmp_path: Path) -> None:
    source = convert(make_base(tmp_path / "hf"), tmp_path / "m", layout=Layout(1, 2, 4))
    swap(source, "mp_rank_00_000", "mp_rank_00_001")
    refused(source, r"belongs to another pipeline stage: its files are mixed up")
    for name in ("mp_rank_00_000", "mp_rank_00_001"):
        rewritten(name, lambda c: delattr(c["args"], "rank"))(source)
    refused(source, r"belongs to another pipeline stage: its files are mixed up")


def test_replicas_that_drifted_by_rounding_are_read(tmp_path: Path) -> None:
    source = convert(make_base(tmp_path / "hf"), tmp_path / "m", layout=Layout(2, 1, 4))
    rewritten("mp_rank_01", lambda c: c["model"]["decoder.final_layernorm.weight"].mul_(1.001))(source)
    convert(source, tmp_path / "out", format="hf")


def test_a_tensor_that_reaches_out_of_its_storage_is_refused(tmp_path: Path) -> None:
    source = make_base(tmp_path / "hf", as_bin=True)
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    key = "model.layers.0.input_layernorm.weight"
    torch.save({**state, key: state[key][:12]}, source / "pytorch_model.bin")  # a view of all 16 elements
    raw = (source / "pytorch_model.bin").read_bytes()
    with zipfile.ZipFile(source / "pytorch_model.bin") as archive:
        pickled = archive.read("pytorch_model/data.pkl")
    at = pickled.index(b"K\x0c\x85")  # the shape (12,)
    longer = pickled[:at] + b"K\x11" + pickled[at + 2 :]
    start = raw.index(pickled)
    crc = lambda data: struct.pack("<I", zipfile.crc32(data))  # noqa: E731
    raw = raw[:start] + longer + raw[start + len(pickled) :]
    (source / "pytorch_model.bin").write_bytes(raw.replace(crc(pickled), crc(longer)))
    refused(source, r"of shape \(17,\) from element 0 on does not fit its storage, of 16 elements in 64 bytes")


def test_a_state_dict_with_strange_keys_is_refused(tmp_path: Path) -> None:
    source = make_base(tmp_path / "hf", as_bin=True)
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save({**state, 5: torch.ones(1)}, source / "pytorch_model.bin")
    refused(source, r"holds a tensor called 5")


def metadata(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return a function that changes the bytes of .metadata."""

    def apply(path: Path) -> None:
        raw = (path / "release/.metadata").read_bytes()
        changed = change(raw)
        assert changed != raw
        (path / "release/.metadata").write_bytes(changed)

    return apply


@pytest.mark.parametrize(
    "damage,message",
    [
        (metadata(lambda raw: raw[:-1] + LAUGHS + b"}" + LAUGHS + b"Ns."), r"a key of it is not plain"),
        (
            metadata(lambda raw: raw[:2] + b"(\x8c\5posix\x8c\6system\x93\x8c\4true\x85R" + raw[2:]),
            r"names posix.system",
        ),
        (metadata(lambda raw: b"\x80\4" + b"\x95" + struct.pack("<Q", 1 << 62) + b"N."), r"is not the metadata"),
        (metadata(lambda raw: b"\x80\4N0Nr\xff\xff\xff\x7f."), r"is not the metadata"),
        (metadata(lambda raw: b"\x80\4\x96" + struct.pack("<Q", 1 << 36) + b"."), r"is not the metadata"),
        (sparse("release/.metadata", 1 << 40), r"\.metadata has 1,099,511,627,776 bytes"),
        (sparse("release/common.pt", 1 << 40), r"common.pt .* is not a complete file|is damaged"),
    ],
)
def test_hostile_torch_dist_checkpoints(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    source = convert(make_base(tmp_path / "hf"), tmp_path / "m", format="torch_dist", layout=Layout(1, 1, 4))
    damage(source)
    refused(source, message)


def test_two_tensors_in_one_place_are_refused(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    source = convert(make_base(tmp_path / "hf"), tmp_path / "m", format="torch_dist", layout=Layout(1, 1, 4))
    content = FileSystemReader(source / "release").read_metadata()
    names = {index.fqn: index for index in content.storage_data if "norm" in index.fqn and not any(index.offset or ())}
    first, second = sorted(names)[:2]
    content.storage_data[names[first]] = content.storage_data[names[second]]
    import pickle

    (source / "release/.metadata").write_bytes(pickle.dumps(content))
    refused(source, r"share bytes of __0_0.distcp")


def test_a_pickle_of_endless_opcodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MAX_OPCODES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 opcodes"):
        read_pickle(b"]" * 1000 + b".", {})


def test_pickles_of_data_are_read_as_they_are() -> None:
    import collections
    import pickle

    value = {"a": [1, -2, 2**70, 1.5, None, True, "ü", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], 5: {"x": {}}}
    for protocol in (2, 3, 4, 5):
        assert read_pickle(pickle.dumps(value, protocol), {}) == value
        assert protocol == 2 or read_pickle(pickle.dumps([b"x"], protocol), {}) == [b"x"]
        space = Namespace(x=1, y=[2])
        assert read_pickle(pickle.dumps(space, protocol), {"argparse.Namespace": Namespace}) == space
        record = read_pickle(pickle.dumps(collections.Counter("aab"), protocol), {})
        assert record.name == "collections.Counter"
