"""A damaged or malicious checkpoint is refused in one sentence, runs no code, and leaves nothing behind.

There is one table a format: how a sound checkpoint is damaged, and what the sentence must say. The modules
fuzz_*.py damage them at random; what it or a reader of the code has found stays here by name.
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_pickles import call
from helpers import as_bin, convert, make_llama, rank_file, rewritten, set_config
from safetensors.torch import load_file, save_file

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.storage.manifest import verify

pytestmark = pytest.mark.timeout(60)  # a reader that hangs fails here, by name

Damage = Callable[[Path], Any]

# Files of any kind ---------------------------------------------------------------------------------------------------


def removed(name: str) -> Damage:
    """Return a function that removes a file or directory."""
    return lambda path: (shutil.rmtree if (path / name).is_dir() else os.unlink)(path / name)


def written(name: str, content: str | bytes) -> Damage:
    """Return a function that writes a file anew."""
    return lambda path: (path / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, part: float) -> Damage:
    """Return a function that cuts a file to a part of its length."""
    return lambda path: os.truncate(path / name, int((path / name).stat().st_size * part))


def changed(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Return a function that changes the bytes of a file."""

    def apply(path: Path) -> None:
        before = (path / name).read_bytes()
        after = change(before)
        assert after != before
        (path / name).write_bytes(after)

    return apply


def replaced(name: str, old: bytes, new: bytes, count: int = 1) -> Damage:
    """Return a function that replaces some bytes of a file."""
    return changed(name, lambda raw: raw.replace(old, new, count))


def sparse(name: str, size: int) -> Damage:
    """Return a function that makes a file of a claimed size that takes no disk."""

    def apply(path: Path) -> None:
        (path / name).touch()
        os.truncate(path / name, size)

    return apply


def no_file(name: str, kind: str) -> Damage:
    """Return a function that puts in the place of a file what cannot be read as one."""

    def apply(path: Path) -> None:
        file = path / name
        file.unlink()
        if kind == "fifo":
            os.mkfifo(file)  # to open it would be to wait for ever
        elif kind == "directory":
            file.mkdir()
        else:
            file.symlink_to({"device": "/dev/zero", "loop": name, "nowhere": "../" * 40 + "nowhere"}[kind])

    return apply


def both(*damages: Damage) -> Damage:
    """Return a function that damages in several ways, one after the other."""
    return lambda path: [damage(path) for damage in damages]


class Bomb:
    """A pickle that makes the file `ran` when it is loaded by an unsafe reader."""

    def __init__(self, checkpoint: Path) -> None:
        self.trace = checkpoint.parent / "ran"

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


# Hugging Face --------------------------------------------------------------------------------------------------------

WEIGHTS, CONFIG, BIN = "model.safetensors", "config.json", "pytorch_model.bin"
Q, K, V = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
NORM = "model.norm.weight"
TERABYTE = 1 << 40


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Return a function that rewrites the weights of a Hugging Face directory."""

    def apply(path: Path) -> None:
        state = load_file(path / WEIGHTS)
        change(state)
        save_file(state, path / WEIGHTS)

    return apply


def header(change: Callable[[dict[str, Any]], Any], as_text: Callable[[str], str] = str) -> Damage:
    """Return a function that changes the header of a file of safetensors, and leaves the data."""

    def apply(path: Path) -> None:
        raw = (path / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        tree = json.loads(raw[8:end])
        change(tree)
        text = as_text(json.dumps(tree)).encode()
        (path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return apply


def header_text(change: Callable[[str], str]) -> Damage:
    """Return a function that changes the text of the header of a file of safetensors."""
    return header(lambda tree: None, change)


HUGGING_FACE: list[tuple[Damage, str]] = [
    (removed("."), r"no such directory"),
    (removed(CONFIG), r"is not a checkpoint: it has neither a config.json"),
    *(
        (no_file(name, kind), r"is not a checkpoint|neither model.safetensors nor")
        for name in (CONFIG, WEIGHTS)
        for kind in ("fifo", "device", "loop", "directory", "nowhere")
    ),
    # config.json
    (written(CONFIG, "{"), r"config.json: it is not JSON"),
    (written(CONFIG, "[]"), r"config.json: it holds list"),
    (written(CONFIG, "[" * 200_000), r"config.json: it is not JSON: maximum recursion"),
    (written(CONFIG, '{"a":1,"a":2}'), r"config.json: it is not JSON: .*'a' twice"),
    (written(CONFIG, b'{"a":"\xff"}'), r"config.json: it is not JSON: .*utf-8"),
    (set_config(note="\ud800"), r"config.json: it is not JSON: 'utf-8' codec can't encode"),
    (set_config(bos_token_id=float("nan")), r"config.json: it is not JSON: NaN is not a number"),
    (both(set_config(x=1), replaced(CONFIG, b'"x": 1', b'"x": 1e999')), r"1e999 is not"),
    (sparse(CONFIG, TERABYTE), r"config.json has 1,099,511,627,776 bytes"),
    (written("tokenizer_config.json", "[" * 100_000), r"tokenizer_config.json is nested too deeply"),
    (sparse("tokenizer.json", TERABYTE), r"tokenizer.json has 1,099,511,627,776 bytes"),
    (sparse("prune_plan.json", TERABYTE), r"prune_plan.json has 1,099,511,627,776 bytes"),
    # Models that are no Llama, or of no size
    (set_config(model_type="gpt2"), r"model_type is 'gpt2'"),
    (set_config(model_type="mixtral"), r"model_type is 'mixtral', but .* has 'llama' or 'mistral' or"),
    (set_config(model_type="gemma"), r"model_type is 'gemma', but .* has 'llama' or 'mistral' or 'qwen2' or 'qwen3'"),
    (set_config(model_type=["llama"]), r"model_type is \['llama'\], but a dense Llama"),
    (
        set_config(model_type="mistral", sliding_window=4096),
        r"sliding_window is 4096, but a dense Llama.* has None",
    ),
    (set_config(model_type="qwen2", use_sliding_window=True), r"sliding_window is 4096, but"),
    (set_config(model_type="qwen3", head_dim=8, use_sliding_window=True), r"sliding_window is 4096, but"),
    (set_config(model_type="qwen2", layer_types=["sliding_attention"]), r"layer_types has others than full_attention"),
    (set_config(quantization_config={"bits": 4}), r"quantization_config is"),
    (set_config(attention_bias=True), r"attention_bias is True"),
    (set_config(hidden_size=None), r"hidden_size is missing"),
    (set_config(num_hidden_layers="4"), r"num_layers is '4'"),
    (set_config(num_hidden_layers=10**9), r"num_layers is 1000000000: .* from 1 to 10000"),
    (set_config(num_attention_heads=2**24, num_key_value_heads=2**24, head_dim=2**24), r"more than any model has"),
    (set_config(num_key_value_heads=3), r"num_attention_heads 8 is not a multiple of num_query_groups 3"),
    (set_config(vocab_size=2**40), r"vocab_size is 1099511627776: .* from 1 to 16777216"),
    (set_config(vocab_size=True), r"vocab_size is True"),
    (set_config(tie_word_embeddings="false"), r"tie_word_embeddings is 'false'"),
    (set_config(rms_norm_eps="small"), r"could not convert string to float: 'small'"),
    (set_config(rope_parameters=[1]), r"rope parameters are \[1\], not an object"),
    (set_config(rope_parameters={"rope_theta": 10000.5}), r"rope_theta 10000.5: .* whole numbers only"),
    (set_config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), r"is not one that Megatron"),
    (
        set_config(rope_parameters={"rope_type": "llama3", "factor": []}),
        r"rope_scaling.factor is \[\]: it must be",
    ),
    (set_config(rope_parameters=None, rope_theta=10**400), r"int too large to convert to float"),
    (set_config(rope_parameters={"rope_type": "llama3", "factor": -8.0}), r"rope_scaling.factor is -8.0: it must be"),
    (set_config(rope_parameters={"rope_theta": 1e300}), r"rope_theta is 1e\+300: it must be a positive number below"),
    (set_config(rope_parameters={"rope_theta": True}), r"rope_theta is True: it must be a number"),
    (set_config(rms_norm_eps=True), r"rms_norm_eps is True: it must be a number"),
    # Weights that do not fit the config
    (removed(WEIGHTS), r"neither model.safetensors nor"),
    (weights(lambda state: state.pop(Q)), rf"lacks tensors: {Q}"),
    (set_config(num_hidden_layers=5), r"lacks tensors: model.layers.4"),
    (weights(lambda state: state.update(extra=torch.ones(2))), r"holds unexpected tensors: extra"),
    (weights(lambda state: state.update({Q: torch.ones(48, 41)})), r"q_proj.weight has shape \(48, 41\).*48, 40"),
    (weights(lambda state: state.update({Q: torch.ones(48, 40).int()})), r"q_proj.weight has dtype 'I32'; only"),
    (weights(lambda state: state.update({NORM: torch.ones(())})), r"have one or two dims"),
    # The file of safetensors
    (cut(WEIGHTS, 0.5), r"has \d+ bytes, but its tensors end at byte \d+"),
    (cut(WEIGHTS, 0.001), r"claims a header of \d+ bytes"),
    (cut(WEIGHTS, 0), r"ends at byte 0, 8 bytes too early"),
    (changed(WEIGHTS, lambda raw: raw + b"x"), r"has \d+ bytes, but its tensors end at byte"),
    (
        both(sparse(WEIGHTS, 50_000_008), changed(WEIGHTS, lambda raw: (50_000_000).to_bytes(8, "little") + raw[8:])),
        r"has a header of 50,000,000 bytes: more than 10,000,000",
    ),
    (header_text(lambda text: "[" * 200_000), r"the header of .* is not JSON: maximum recursion"),
    (header_text(lambda text: text[:-1] + "," + text[1:]), r"the header of .* twice"),
    (header_text(lambda text: text.replace("40", "1" * 5000, 1)), r"the header of .*4300 digits"),
    (header(lambda tree: tree.update({NORM: 5})), r"model.norm.weight has offsets None"),
    (header(lambda tree: tree[NORM].update(shape=[2**63])), r"model.norm.weight has shape \[9223372036854775808\]"),
    (header(lambda tree: tree[NORM].update(shape=[40, True])), r"model.norm.weight has shape \[40, True\]"),
    (header(lambda tree: tree[NORM].update(dtype=["F32"])), r"model.norm.weight has dtype \['F32'\]"),
    (header(lambda tree: tree[K].update(data_offsets=tree[V]["data_offsets"])), r"begins at byte .* before it ends"),
    (header(lambda tree: tree.pop(NORM)), r"before it ends at|its tensors end at"),
]

INDEX, FIRST_SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"


def place(path: Path) -> None:
    """Let the index name a file outside the directory, which is there."""
    shutil.copy(path / FIRST_SHARD, path.parent / WEIGHTS)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][Q] = f"../{WEIGHTS}"
    (path / INDEX).write_text(json.dumps(index))


HUGGING_FACE_SHARDS: list[tuple[Damage, str]] = [
    (removed(FIRST_SHARD), rf"names {FIRST_SHARD}, which is not in"),
    (place, r"must map tensor names to plain file names"),
]


def longer_than_its_storage(path: Path) -> None:
    """Let the pickle claim 41 elements for a tensor of which the file has 40, with the checksum that fits."""
    state = torch.load(path / BIN, weights_only=True)
    torch.save(state | {NORM: state[NORM][:12]}, path / BIN)  # a view of all 40 elements
    raw = (path / BIN).read_bytes()
    with zipfile.ZipFile(path / BIN) as archive:
        pickled = archive.read("pytorch_model/data.pkl")
    at = pickled.index(b"K\x0c\x85")  # the shape (12,)
    longer = pickled[:at] + b"K\x29" + pickled[at + 2 :]
    start = raw.index(pickled)
    raw = raw[:start] + longer + raw[start + len(pickled) :]
    checksums = [struct.pack("<I", zipfile.crc32(data)) for data in (pickled, longer)]
    (path / BIN).write_bytes(raw.replace(*checksums))


HUGGING_FACE_BIN: list[tuple[Damage, str]] = [
    (
        lambda path: torch.save(torch.load(path / BIN, weights_only=True) | {5: torch.ones(1)}, path / BIN),
        r"holds a tensor called 5",
    ),
    (
        longer_than_its_storage,
        r"of shape \(41,\) from element 0 on does not fit its storage, of 40 elements in 160 bytes",
    ),
]

# Megatron, `torch`: two tensor ranks, two pipeline stages ------------------------------------------------------------

RANKS = [f"mp_rank_{tensor:02d}_{pipeline:03d}" for tensor in (0, 1) for pipeline in (0, 1)]
RANK_00, RANK_01, RANK_10, RANK_11 = RANKS
FILE_00, FILE_01, FILE_10, FILE_11 = (f"release/{name}/model_optim_rng.pt" for name in RANKS)
TRACKER = "latest_checkpointed_iteration.txt"
LAYER = "decoder.layers.0."
FC1 = f"{LAYER}mlp.linear_fc1.weight"
LAUGHS = b")" + b"q\xfe0h\xfeh\xfe\x86" * 60  # a tuple of two of a tuple of two of ...: hashing it takes for ever


def content(change: Callable[[dict[str, Any]], Any], *names: str) -> Damage:
    """Return a function that changes what rank files hold: all of them, or those that are named."""
    return both(*(rewritten(name, change) for name in names or RANKS))


def argument(name: str, value: Any, *names: str) -> Damage:
    """Return a function that sets an argument in rank files: in all of them, or in those that are named."""
    return content(lambda content: setattr(content["args"], name, value), *names)


def model(change: Callable[[dict[str, Any]], Any], name: str) -> Damage:
    """Return a function that changes the state dict of a rank file."""
    return rewritten(name, lambda content: change(content["model"]))


def swapped(a: str, b: str) -> Damage:
    """Return a function that exchanges two rank files."""

    def apply(path: Path) -> None:
        first, second = (rank_file(path, name).read_bytes() for name in (a, b))
        rank_file(path, a).write_bytes(second)
        rank_file(path, b).write_bytes(first)

    return apply


def rezipped(
    change: Callable[[bytes], bytes] = bytes, method: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None
) -> Damage:
    """Return a function that writes the zip archive of the first rank file anew, its pickle changed."""

    def apply(raw: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(raw)) as before, zipfile.ZipFile(out, "w", method) as after:
            for entry in before.infolist():
                with before.open(entry) as file:
                    file._expected_crc = None  # type: ignore[attr-defined]  # holes that were filled later have none
                    data = file.read()
                after.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
            for extra, data in (more or {}).items():
                after.writestr(extra, data)
        return out.getvalue()

    return changed(FILE_00, apply)


def moved_entry(raw: bytes) -> bytes:
    """Say in the header of a weight's entry that it begins 8 bytes earlier, where padding is."""
    start = raw.rindex(b"PK\3\4", 0, raw.index(b"/data/0"))
    extra = int.from_bytes(raw[start + 28 : start + 30], "little") - 8
    return raw[: start + 28] + extra.to_bytes(2, "little") + raw[start + 30 :]


def before_stop(opcodes: bytes) -> Callable[[bytes], bytes]:
    """Return a function that adds opcodes at the end of a pickle."""
    return lambda pickled: pickled[:-1] + opcodes + b"."


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


def other_norm(state: dict[str, Any]) -> None:
    """Let two names stand for one tensor."""
    state[f"{LAYER}pre_mlp_layernorm.weight"] = state[f"{LAYER}input_layernorm.weight"]


TORCH: list[tuple[Damage, str]] = [
    # Which files there are
    (removed(f"release/{RANK_10}"), r"lacks .* tensor rank 1, pipeline rank 0"),
    (removed(FILE_11), r"lacks the file of tensor rank 1, pipeline rank 1"),
    (
        both(removed(f"release/{RANK_10}"), removed(f"release/{RANK_11}")),
        r"rank files for tensor_model_parallel_size 1, but .*mp_rank_00_000.* says 2",
    ),
    (
        argument("tensor_model_parallel_size", 4, RANK_10),
        r"rank files for tensor_model_parallel_size 2, but .*mp_rank_01_000.* says 4",
    ),
    (lambda path: (path / "release/mp_rank_00").mkdir(), r"two directories for one rank"),
    (written("release/.metadata", ""), r"is not the metadata of a checkpoint"),
    (written(TRACKER, "x"), r"holds 'x', neither a number"),
    (written(TRACKER, "7"), r"names iter_0000007, which"),
    # Files in each other's place
    (swapped(RANK_00, RANK_10), r"was saved by process 0 and .* by 1: .* mixed up"),
    (
        lambda path: shutil.copy(path / FILE_10, path / FILE_00),
        r"mp_rank_01_000.* was saved by process 1 and .*mp_rank_00_000.* by 1: .* mixed up",
    ),
    (
        both(swapped(RANK_00, RANK_01), swapped(RANK_10, RANK_11)),
        r"belongs to another pipeline stage: its files are mixed up",
    ),
    (
        both(
            swapped(RANK_00, RANK_01),
            swapped(RANK_10, RANK_11),
            content(lambda content: delattr(content["args"], "rank")),
        ),
        r"belongs to another pipeline stage: its files are mixed up",
    ),
    # Archives and pickles
    (cut(FILE_01, 0.7), r"mp_rank_00_001.* is not a complete file of torch"),
    (cut(FILE_00, 0), r"\(0 bytes\) is not a complete file"),
    (rezipped(method=zipfile.ZIP_DEFLATED), r"is damaged: the entry .* is compressed"),
    (rezipped(lambda raw: raw + bytes(10**8), zipfile.ZIP_DEFLATED), r"is damaged: the entry .* is compressed"),
    (rezipped(lambda raw: raw + bytes(1 << 26)), r"a header of .* bytes, more than"),
    (rezipped(more={"model_optim_rng/data.pkl": b"x"}), r"is damaged: it holds an entry twice"),
    (
        changed(FILE_00, lambda raw: raw[:64] + raw[72:]),
        r"the entry data.pkl is not where its directory says|Corrupt zip64",
    ),
    (changed(FILE_00, moved_entry), r"is damaged: the entry data/0 does not end where the next one begins"),
    (replaced(FILE_00, b"num_layers", b"num_lavers"), r"the checksum .*data.pkl"),
    (replaced(FILE_00, b"little", b"big   "), r"the checksum .*byteorder|byte order"),
    (rezipped(before_stop(LAUGHS + b"}" + LAUGHS + b"Ns")), r"a key of it is not plain"),
    (rezipped(before_stop(b"X\xff\xff\xff\xff")), r"is damaged: expected 4294967295 bytes .* but only 1 remain"),
    (rezipped(before_stop(b"\x96" + struct.pack("<Q", 1 << 35))), r"is damaged: expected 34359738368 bytes .* only 1 "),
    (rezipped(before_stop(b"\x96" + struct.pack("<Q", 1) + b"x")), r"is damaged: its pickle has the opcode BYTEARRAY8"),
    (rezipped(before_stop(b"cnumpy\nnd\\x61rray\n0")), r"is damaged: it names a class with an escape or a space"),
    (rezipped(before_stop(call("posix", "system", "true"))), r"holds more than data .* it names posix.system"),
    (rezipped(before_stop(call("builtins", "eval", "1"))), r"holds more than data .* it names builtins.eval"),
    (rezipped(before_stop(call("builtins", "getattr", "1"))), r"holds more than data .* builtins.getattr"),
    (rezipped(before_stop(b"NR")), r"it makes an object of what is not a class"),
    (
        lambda path: rewritten(RANK_10, lambda content: content.update(args=Bomb(path)))(path),
        r"holds more than data and was not loaded: .*system",
    ),
    (
        lambda path: (path / FILE_10).write_bytes(pickle.dumps(Bomb(path))),
        r"is not a complete file of torch\.save",
    ),
    # What the files say of themselves
    (content(lambda content: content.update(iteration=7), RANK_11), r"is of iteration 7, but .* of 0"),
    (content(lambda content: content.update(iteration=nested(60)), RANK_00), r"is of iteration \(\("),
    (content(lambda content: content.update(iteration=nested(60))), r"is of iteration \(\("),
    (content(lambda content: content.update(checkpoint_version=1.0), RANK_11), r"checkpoint_version 1.0: before"),
    (content(lambda content: content.update(checkpoint_version="x")), r"has checkpoint_version 'x'"),
    (content(lambda content: content.pop("args"), RANK_00), r"carries no Megatron arguments"),
    (content(lambda content: content.update(model=torch.ones(1)), RANK_00), r"has no 'model'"),
    (content(lambda content: content.update(model=in_itself())), r"'model' is nested in itself"),
    (argument("num_layers", 6, RANK_00), r"are of different models"),
    (argument("swiglu", False, RANK_00), r"argument swiglu is False"),
    (argument("swiglu", nested(60)), r"argument swiglu is \(\("),
    (argument("window_size", (4, 0), RANK_00), r"window_size is \(4, 0\)"),
    (argument("no_rope_freq", 4), r"no_rope_freq is 4, but a Llama's is None"),
    (argument("softmax_type", "off-by-one"), r"softmax_type is 'off-by-one', but a Llama's is 'vanilla'"),
    (argument("use_mup", True), r"use_mup is True"),
    (argument("rotary_base", "x", RANK_00), r"arguments are not a Llama's"),
    (argument("rotary_base", 10**400), r"int too large to convert to float"),
    (argument("hidden_size", 10**400), r"hidden_size is 1000"),
    (argument("make_vocab_size_divisible_by", "x"), r"divisible_by is str, not a number"),
    # Tensors
    (model(lambda state: state.pop(FC1), RANK_10), r"linear_fc1.weight is on 1 of 2 tensor ranks"),
    (model(lambda state: state.update(x=torch.ones(2)), RANK_10), r"holds an unexpected tensor: x"),
    (
        model(lambda state: state.update({FC1: torch.ones(70, 40)}), RANK_10),
        r"tensor rank 1: decoder.layers.0.mlp.linear_fc1.weight has shape \(70, 40\).*\(72, 40\)",
    ),
    (model(lambda state: state.update({FC1: 5}), RANK_00), r"linear_fc1.weight is int, not a tensor"),
    (
        model(lambda state: state.update({FC1: torch.ones(72, 40).double()}), RANK_00),
        r"linear_fc1.weight is of torch.DoubleStorage; only",
    ),
    (
        model(lambda state: state[f"{LAYER}input_layernorm.weight"].mul_(1.5), RANK_10),
        r"decoder.layers.0.input_layernorm.weight on tensor ranks 0 and 1 differs by up to",
    ),
    (
        model(lambda state: state["decoder.final_layernorm.weight"].fill_(float("nan")), RANK_11),
        r"decoder.final_layernorm.weight on tensor ranks 0 and 1 differs by up to nan",
    ),
    (
        model(other_norm, RANK_00),
        r"decoder.layers.0.input_layernorm.weight and decoder.layers.0.pre_mlp_layernorm.weight share bytes",
    ),
]

# Megatron, `torch_dist` ----------------------------------------------------------------------------------------------

METADATA, DISTCP, COMMON = "release/.metadata", "release/__0_0.distcp", "release/common.pt"


def metadata(change: Callable[[Any], Any]) -> Damage:
    """Return a function that changes what .metadata says, in torch's own classes."""

    def apply(path: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader  # takes seconds

        found = FileSystemReader(path / "release").read_metadata()
        change(found)
        (path / METADATA).write_bytes(pickle.dumps(found))

    return apply


def in_one_place(found: Any) -> None:
    """Let two tensors lie in one place."""
    norms = {index.fqn: index for index in found.storage_data if "norm" in index.fqn and not any(index.offset or ())}
    first, second = sorted(norms)[:2]
    found.storage_data[norms[first]] = found.storage_data[norms[second]]


def chunks(*boxes: tuple[int, int, int, int]) -> Damage:
    """Return a function that cuts the output layer, [128, 40], into boxes: row, column, rows and columns.

    Rows are counted by 16 and columns by 4.
    """

    def apply(found: Any) -> None:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

        name = "output_layer.weight"
        (place,) = [found.storage_data.pop(index) for index in list(found.storage_data) if index.fqn == name]
        parts = []
        for i, (row, column, rows, columns) in enumerate(boxes):
            offset, size = torch.Size((16 * row, 4 * column)), torch.Size((16 * rows, 4 * columns))
            parts.append(ChunkStorageMetadata(offset, size))
            where = type(place)(place.relative_path, place.offset + i, 1)  # nothing is read before all is known to fit
            found.storage_data[MetadataIndex(name, offset)] = where
        found.state_dict_metadata[name].chunks = parts

    return metadata(apply)


NOT_TILED = r"the chunks of output_layer.weight do not make up its shape \(128, 40\)"
TORCH_DIST: list[tuple[Damage, str]] = [
    (removed(DISTCP), r"names __0_0.distcp, which is not there"),
    (cut(DISTCP, 0.5), r"__0_0.distcp has \d+ bytes, but an entry of it ends at"),
    (changed(DISTCP, lambda raw: bytes(len(raw))), r"an entry of .*__0_0.distcp is not a complete file"),
    (removed(COMMON), r"carries no Megatron arguments"),
    (written(COMMON, "x"), r"common.pt .* is not a complete file of torch.save"),
    (sparse(COMMON, TERABYTE), r"common.pt .* is not a complete file|is damaged"),
    (lambda path: torch.save(Bomb(path), path / COMMON), r"common.pt holds more than data"),
    (
        metadata(lambda found: found.state_dict_metadata.update({1: next(iter(found.state_dict_metadata.values()))})),
        r"names something 1, which is not text",
    ),
    # .metadata as a pickle
    (written(METADATA, b"\x80\x04."), r"is not the metadata of a checkpoint"),
    (cut(METADATA, 0.5), r"is not the metadata of a checkpoint"),
    (sparse(METADATA, TERABYTE), r"\.metadata has 1,099,511,627,776 bytes"),
    (changed(METADATA, lambda raw: raw[:-1] + LAUGHS + b"}" + LAUGHS + b"Ns."), r"a key of it is not plain"),
    (
        changed(METADATA, lambda raw: raw[:2] + b"(\x8c\5posix\x8c\6system\x93\x8c\4true\x85R" + raw[2:]),
        r"names posix.system",
    ),
    (
        lambda path: (path / METADATA).write_bytes(pickle.dumps({"storage_data": Bomb(path)})),
        r".metadata holds more than data and was not loaded: it names posix.system",
    ),
    (written(METADATA, b"\x80\4\x95" + struct.pack("<Q", 1 << 62) + b"N."), r"is not the metadata"),
    (written(METADATA, b"\x80\4N0Nr\xff\xff\xff\x7f."), r"is not the metadata"),
    (written(METADATA, b"\x80\4\x96" + struct.pack("<Q", 1 << 36) + b"."), r"is not the metadata"),
    # What .metadata says
    (replaced(METADATA, b"__0_0", b"../_0", -1), r"names ../_0.distcp, outside its own directory"),
    (
        replaced(METADATA, b"mlp.linear_fc2.weight", b"mlp.linear_fc9.weight", -1),
        r"holds an unexpected tensor: decoder.layers.mlp.linear_fc9.weight",
    ),
    (metadata(in_one_place), r"share bytes of __0_0.distcp"),
    (chunks((0, 0, 8, 5), (0, 5, 4, 5)), NOT_TILED),  # one box too low
    (chunks((0, 0, 8, 4), (0, 5, 8, 5)), NOT_TILED),  # a gap between columns
    (chunks((0, 0, 8, 6), (0, 5, 8, 5)), NOT_TILED),  # an overlap
    (chunks((0, 0, 4, 10), (5, 0, 3, 10)), NOT_TILED),  # a gap between rows
    (chunks((0, 0, 8, 5)), NOT_TILED),  # too narrow
    (chunks(), NOT_TILED),
]

# The manifest, beside a checkpoint of any format ---------------------------------------------------------------------

MANIFEST = "manifest.json"
OUTSIDE = '{"format": 1, "files": {"%s": {"bytes": 1, "crc32": "0"}}}'
MANIFESTS: list[tuple[Damage, str]] = [
    (removed(MANIFEST), r"has no manifest\.json, so there is nothing to check it against"),
    (written(MANIFEST, "{"), r"is not a manifest"),
    (written(MANIFEST, "[]"), r"is not a manifest"),
    (written(MANIFEST, '{"format": 2, "files": {}}'), r"it has format 2, this program reads 1"),
    (written(MANIFEST, OUTSIDE % "../x"), r"outside its own directory"),
    (written(MANIFEST, OUTSIDE % "/etc/x"), r"outside its own directory"),
    (written(MANIFEST, '{"format": 1, "files": {"x": {"bytes": 1}}}'), r"is not a manifest"),
    (removed(WEIGHTS), r"model.safetensors is missing"),
    (lambda path: os.truncate(path / WEIGHTS, 1000), r"model.safetensors has 1000 bytes, its manifest says"),
    (
        changed(WEIGHTS, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        r"model.safetensors has crc32 .*, its manifest says",
    ),
]

# Tables and tests ----------------------------------------------------------------------------------------------------

TABLES = {
    "Hugging Face": HUGGING_FACE,
    "Hugging Face, shards": HUGGING_FACE_SHARDS,
    "Hugging Face, bin": HUGGING_FACE_BIN,
    "torch": TORCH,
    "torch_dist": TORCH_DIST,
    "manifest": MANIFESTS,
}
CASES = [
    pytest.param(format, damage, sentence, id=f"{format}: {sentence}")
    for format, table in TABLES.items()
    for damage, sentence in table
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make one checkpoint of every format, of one model."""
    top = tmp_path_factory.mktemp("sound")
    one = make_llama(top / "hf")
    return {
        "Hugging Face": one,
        "Hugging Face, shards": make_llama(top / "shards", max_shard_size="150KB"),
        "Hugging Face, bin": as_bin(make_llama(top / "bin")),
        "torch": convert(one, top / "torch", tensor=2, pipeline=2),
        "torch_dist": convert(one, top / "torch_dist", format="torch_dist"),
        "manifest": convert(one, top / "manifest", format="hf"),
    }


def read(format: str, source: Path, target: Path) -> None:
    """Do what reads all of a checkpoint: convert it, or compare it with its manifest."""
    if format != "manifest":
        convert(source, target, format="torch" if format.startswith("Hugging Face") else "hf", tensor=2)
    elif problems := verify(source):
        assert len(problems) == 1, problems
        raise ValueError(problems[0])


@pytest.mark.parametrize("format,damage,sentence", CASES)
def test_a_damaged_checkpoint_is_refused_in_one_sentence_and_nothing_is_written(
    sound: dict[str, Path], tmp_path: Path, format: str, damage: Damage, sentence: str
) -> None:
    source, target = tmp_path / "from/source", tmp_path / "to/target"
    shutil.copytree(sound[format], source)
    target.parent.mkdir()
    damage(source)
    with pytest.raises(ValueError, match=sentence) as refusal:
        read(format, source, target)
    assert "\n" not in str(refusal.value)
    assert not any(target.parent.iterdir())
    assert not (source.parent / "ran").exists()


def test_a_sound_checkpoint_of_every_format_is_read(sound: dict[str, Path], tmp_path: Path) -> None:
    for format, source in sound.items():
        read(format, source, tmp_path / format)
    source = Path(shutil.copytree(sound["torch_dist"], tmp_path / "source"))
    chunks((0, 0, 8, 5), (0, 5, 8, 5))(source)
    assert open_checkpoint(source).config.num_layers == 4


def test_replicas_that_drifted_by_rounding_are_read(sound: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sound["torch"], tmp_path / "source"))
    model(lambda state: state["decoder.final_layernorm.weight"].mul_(1.001), RANK_11)(source)
    read("torch", source, tmp_path / "target")
