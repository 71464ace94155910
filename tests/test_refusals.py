"""What cannot be done is refused in one sentence, with the flag or file and both values, and nothing is written."""

import argparse
import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert as converter
import pytest
import torch
from conftest import ROOT, make_llama
from safetensors.torch import load_file, save_file
from test_conversion import convert

import prune_llama
from megatron.pruning.cli.flags import hyphenated, megatron_flags
from megatron.pruning.formats import open_checkpoint
from megatron.pruning.storage import output
from megatron.pruning.storage.views import File, Stored


@pytest.mark.parametrize(
    "flags,message",
    [
        ("", r"nothing to prune: give at least one of --num-layers-remain"),
        ("--hidden_size_remain 40", r"nothing to prune"),
        ("--hidden-size-remain 41", r"--hidden-size-remain 41 must lie between 1 and the parent's 40"),
        ("--ffn-hidden-size-remain 0", r"--ffn-hidden-size-remain 0 must lie between 1 and the parent's 72"),
        ("--num-attention-heads-remain 16", r"--num-attention-heads-remain 16 must lie .* 8"),
        ("--num-query-groups-remain 5", r"--num-query-groups-remain 5 must lie .* 4"),
        ("--num-attention-heads-remain 6", r"--num-attention-heads-remain 6 is not a multiple of the 4 query groups"),
        ("--num-query-groups-remain 2", r"8 heads in 2 query groups need 4 heads a group, but the parent has 2"),
        ("--drop-layers 4", r"--drop-layers 4: the parent's layers are numbered 0 to 3"),
        ("--drop-layers 1,2,1", r"--drop-layers names layer 1 twice"),
        ("--drop-layers 0,1,2,3", r"--drop-layers drops all 4 layers"),
        ("--ffn-hidden-size-remain 50 --tensor-model-parallel-size 4", r"size 4 does not divide .*ffn hidden size 50"),
        ("--ffn-hidden-size-remain 40 --tensor-model-parallel-size 3", r"size 3 does not divide the parent's query gr"),
        (
            "--num-query-groups-remain 2 --num-attention-heads-remain 4 --tensor-model-parallel-size 4",
            r"--tensor-model-parallel-size 4 does not divide the pruned model's query groups 2",
        ),
        ("--drop-layers 1 --pipeline-model-parallel-size 2", r"size 2 does not divide the pruned model's 3 layers"),
        ("--drop-layers 1 --tensor-model-parallel-size 0", r"--tensor-model-parallel-size 0: it must be at least 1"),
        ("--drop-layers 1 --make-vocab-size-divisible-by 0", r"--make-vocab-size-divisible-by 0: it must be at least"),
        ("--drop-layers 1 --num-layers 5", r"--num-layers 5 disagrees with .*, whose model has 4"),
        ("--drop-layers 1 --hidden_size 64", r"--hidden-size 64 disagrees with .*, whose model has 40"),
        ("--drop-layers 1 --ffn-hidden-size 99", r"--ffn-hidden-size 99 disagrees"),
        ("--drop-layers 1 --num-attention-heads 4", r"--num-attention-heads 4 disagrees with .* has 8"),
        ("--drop-layers 1 --group-query-attention --num-query-groups 2", r"--num-query-groups 2 disagrees .* has 4"),
        ("--drop-layers 1 --norm-epsilon 1e-5", r"--norm-epsilon 1e-5 disagrees with .* has 0.0001"),
        ("--drop-layers 1 --normalization LayerNorm", r"--normalization LayerNorm disagrees"),
        ("--drop-layers 1 --add-qkv-bias", r"--add-qkv-bias disagrees"),
        ("--drop-layers 1 --qk-layernorm", r"--qk-layernorm disagrees"),
        ("--drop-layers 1 --use-rope-scaling", r"--use-rope-scaling disagrees"),
        ("--drop-layers 1 --rotary-percent 0.5", r"--rotary-percent 0.5 disagrees with .* has 1.0"),
        ("--drop-layers 1 --num-experts 8", r"--num-experts 8 disagrees with .* has None"),
        ("--drop-layers 1 --group-query-attention", r"--num-query-groups 1 disagrees with .* has 4"),
        ("--drop-layers 1 --padded-vocab-size 999", r"--padded-vocab-size 999 disagrees with .* has 128"),
        ("--hidden-size-remain 36 --format hf", r"hidden size 36 is not a multiple of 8 attention heads"),
        ("--drop-layers 1 --hidden-size many", r"--hidden-size many: not a number"),
        ("--drop-layers 1 --num-layers-per-virtual-pipeline-stage 2", r"virtual pipeline are not written"),
    ],
)
def test_impossible_prunings(gqa: Path, tmp_path: Path, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        prune_llama.main(["--load", str(gqa), "--save", str(tmp_path / "out"), *flags.split()])
    assert "\n" not in str(refusal.value)
    assert not any(tmp_path.iterdir())


def test_vocabulary_is_taken_only_where_the_source_does_not_know_it(gqa: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--vocab-size 50 disagrees with .*, whose model has 101"):
        converter.main(["--load", str(gqa), "--save", str(tmp_path / "out"), "--vocab-size", "50"])
    shards = convert(gqa, tmp_path / "m")
    rewritten("mp_rank_00", lambda content: setattr(content["args"], "vocab_size", None))(shards)
    shutil.rmtree(shards / "huggingface")
    flags = ["--load", str(shards), "--vocab-size", "101", "--format", "hf"]
    converter.main([*flags, "--save", str(tmp_path / "a")])
    prune_llama.main([*flags, "--save", str(tmp_path / "b"), "--drop-layers", "1"])
    for name in ("a", "b"):
        assert len(load_file(tmp_path / name / "model.safetensors")["lm_head.weight"]) == 101


def test_training_flags_are_accepted_in_both_spellings_and_unknown_ones_refused(gqa: Path, tmp_path: Path) -> None:
    base = ["--load", str(gqa), "--save", str(tmp_path / "out"), "--is_prune", "--drop_layers", "1"]
    training = """--num_layers 4 --hidden-size 40 --swiglu --use-flash-attn --bf16 --lr 1e-4 --data-path 0.5 a_b 0.5 c_d
        --no-async-tensor-model-parallel-allreduce --tokenizer-model=/a_b/c_d --sequence-parallel"""
    prune_llama.main([*base, *training.split()])
    args = prune_llama.parser().parse_args(hyphenated([*base, *training.split()]))
    assert args.data_path == ["0.5", "a_b", "0.5", "c_d"] and args.tokenizer_model == "/a_b/c_d"
    for wrong in ("--hiden-size-remain", "--hidden-size-remai"):
        with pytest.raises(SystemExit) as leave:
            prune_llama.parser().parse_args([*base, wrong, "32"])
        assert leave.value.code == 2
    with pytest.raises(SystemExit):
        prune_llama.parser().parse_args([*base[:-1], "1,x"])


def test_flag_list_is_that_of_the_wheel() -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    arities = {None: "1"}
    stock = {
        hyphenated([option])[0]: arities.get(action.nargs, str(action.nargs))
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option != "--help"
    }
    ours = megatron_flags()
    assert stock.items() <= ours.items()


def test_warns_of_a_shape_that_transformers_refuses(
    gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune_llama.main(["--load", str(gqa), "--save", str(tmp_path / "out"), "--hidden-size-remain", "36"])
    assert "hidden size 36 is not a multiple of 8 attention heads" in capsys.readouterr().err


def damaged(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Return a function that rewrites the weights of a Hugging Face directory."""

    def apply(path: Path) -> None:
        state = load_file(path / "model.safetensors")
        change(state)
        save_file(state, path / "model.safetensors")

    return apply


Q = "model.layers.1.self_attn.q_proj.weight"


def set_config(**values: Any) -> Callable[[Path], None]:
    """Return a function that changes config.json; None removes a field."""

    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | values
        config = {key: value for key, value in config.items() if value is not None}
        (path / "config.json").write_text(json.dumps(config))

    return apply


def truncate(path: Path, to: float) -> None:
    """Cut a file to a part of its length."""
    os.truncate(path, int(path.stat().st_size * to))


@pytest.mark.parametrize(
    "damage,message",
    [
        (damaged(lambda state: state.pop(Q)), rf"lacks tensors: {Q}"),
        (damaged(lambda state: state.update(extra=torch.ones(2))), r"holds unexpected tensors: extra"),
        (
            damaged(lambda state: state.update({Q: torch.ones(48, 41)})),
            r"q_proj.weight has shape \(48, 41\).*48, 40",
        ),
        (damaged(lambda state: state.update({Q: torch.ones(48, 40).int()})), r"q_proj.weight has dtype 'I32'; only"),
        (lambda path: truncate(path / "model.safetensors", 0.5), r"has \d+ bytes, but a tensor of it ends at \d+"),
        (lambda path: truncate(path / "model.safetensors", 0.001), r"claims a header of \d+ bytes"),
        (lambda path: truncate(path / "model.safetensors", 0), r"ends at byte 0, 8 bytes too early"),
        (lambda path: (path / "model.safetensors").unlink(), r"neither model.safetensors nor"),
        (lambda path: (path / "config.json").write_text("{"), r"config.json is not JSON"),
        (lambda path: (path / "config.json").write_text("[]"), r"config.json holds list"),
        (set_config(model_type="gpt2"), r"model_type is 'gpt2'"),
        (set_config(attention_bias=True), r"attention_bias is True"),
        (set_config(hidden_size=None), r"hidden_size is missing"),
        (set_config(num_hidden_layers="4"), r"num_layers is '4'"),
        (set_config(tie_word_embeddings="false"), r"tie_word_embeddings is 'false'"),
        (set_config(rms_norm_eps="small"), r"could not convert string to float: 'small'"),
        (set_config(rope_parameters=[1]), r"rope parameters are \[1\], not an object"),
        (set_config(rope_parameters={"rope_theta": 10000.5}), r"rope_theta 10000.5: .* whole numbers only"),
        (set_config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), r"is not one that Megatron"),
        (damaged(lambda state: state.update({"model.norm.weight": torch.ones(())})), r"have one or two dims"),
        (set_config(num_key_value_heads=3), r"num_attention_heads 8 is not a multiple of num_query_groups 3"),
        (set_config(num_hidden_layers=5), r"lacks tensors: model.layers.4"),
        (lambda path: shutil.rmtree(path), r"no such directory"),
        (lambda path: (path / "config.json").unlink(), r"is not a checkpoint: it has neither a config.json"),
    ],
)
def test_damaged_hugging_face_checkpoints(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    source = make_llama(tmp_path / "hf", "gqa")
    damage(source)
    with pytest.raises(ValueError, match=message) as refusal:
        convert(source, tmp_path / "out", tensor=2)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_index_that_names_files_elsewhere(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "gqa", max_shard_size="60KB")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    missing = next(iter(content["weight_map"].values()))
    (source / missing).rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"names {missing}, which is not in"):
        open_checkpoint(source)
    content["weight_map"][Q] = "../model.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must map tensor names to plain file names"):
        open_checkpoint(source)


def rank(path: Path, name: str) -> Path:
    """Return a rank file."""
    return path / "release" / name / "model_optim_rng.pt"


def rewritten(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return a function that rewrites one rank file of a Megatron checkpoint."""

    def apply(path: Path) -> None:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(rank(path, name), weights_only=True)
        change(content)
        torch.save(content, rank(path, name))

    return apply


FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    "damage,message",
    [
        (
            lambda path: shutil.rmtree(path / "release/mp_rank_01_000"),
            r"lacks .* tensor rank 1, pipeline rank 0",
        ),
        (lambda path: rank(path, "mp_rank_01_001").unlink(), r"lacks the file of tensor rank 1, pipeline rank 1"),
        (lambda path: truncate(rank(path, "mp_rank_00_001"), 0.7), r"mp_rank_00_001.* is not a complete file of torch"),
        (lambda path: truncate(rank(path, "mp_rank_00_000"), 0), r"\(0 bytes\) is not a complete file"),
        (rewritten("mp_rank_01_000", lambda c: c["model"].pop(FC1)), r"linear_fc1.weight is on 1 of 2 tensor ranks"),
        (rewritten("mp_rank_01_000", lambda c: c["model"].update(x=torch.ones(2))), r"holds an unexpected tensor: x"),
        (
            rewritten("mp_rank_01_000", lambda c: c["model"].update({FC1: torch.ones(70, 40)})),
            r"tensor rank 1: decoder.layers.0.mlp.linear_fc1.weight has shape \(70, 40\).*\(72, 40\)",
        ),
        (rewritten("mp_rank_00_000", lambda c: c["model"].update({FC1: 5})), r"linear_fc1.weight is int, not a tensor"),
        (
            rewritten("mp_rank_00_000", lambda c: c["model"].update({FC1: torch.ones(72, 40).double()})),
            r"linear_fc1.weight is of torch.DoubleStorage; only",
        ),
        (
            rewritten("mp_rank_01_001", lambda c: c.update(iteration=7)),
            r"is of iteration 7, but .* of 0",
        ),
        (
            rewritten("mp_rank_01_001", lambda c: c.update(checkpoint_version=1.0)),
            r"checkpoint_version 1.0: before",
        ),
        (rewritten("mp_rank_00_000", lambda c: c.pop("args")), r"carries no Megatron arguments"),
        (
            rewritten("mp_rank_00_000", lambda c: setattr(c["args"], "num_layers", 6)),
            r"are of different models",
        ),
        (rewritten("mp_rank_00_000", lambda c: setattr(c["args"], "swiglu", False)), r"argument swiglu is False"),
        (rewritten("mp_rank_00_000", lambda c: setattr(c["args"], "window_size", (4, 0))), r"window_size is \(4, 0\)"),
        (rewritten("mp_rank_00_000", lambda c: setattr(c["args"], "rotary_base", "x")), r"arguments are not a Llama's"),
        (rewritten("mp_rank_00_000", lambda c: c.update(model=torch.ones(1))), r"has no 'model'"),
        (
            lambda path: [shutil.rmtree(path / f"release/mp_rank_01_00{p}") for p in (0, 1)],
            r"rank files for tensor_model_parallel_size 1, but .*mp_rank_00_000.* says 2",
        ),
        (lambda path: (path / "release/mp_rank_00").mkdir(), r"two directories for one rank"),
        (lambda path: (path / "release/.metadata").write_text(""), r"is not the metadata of a checkpoint"),
        (lambda path: (path / "latest_checkpointed_iteration.txt").write_text("x"), r"holds 'x', neither a number"),
        (
            lambda path: (path / "latest_checkpointed_iteration.txt").write_text("7"),
            r"names iter_0000007, which",
        ),
    ],
)
def test_damaged_megatron_checkpoints(gqa: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    source = convert(gqa, tmp_path / "m", tensor=2, pipeline=2)
    damage(source)
    with pytest.raises(ValueError, match=message) as refusal:
        convert(source, tmp_path / "out", format="hf")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda path: (path / ".metadata").write_bytes(b"\x80\x04."), r"is not the metadata of a checkpoint"),
        (lambda path: truncate(path / ".metadata", 0.5), r"is not the metadata of a checkpoint"),
        (lambda path: truncate(path / "__0_0.distcp", 0.5), r"__0_0.distcp has \d+ bytes, but an entry of it ends at"),
        (lambda path: (path / "__0_0.distcp").unlink(), r"names __0_0.distcp, which is not there"),
        (lambda path: (path / "common.pt").unlink(), r"carries no Megatron arguments"),
        (lambda path: (path / "common.pt").write_bytes(b"x"), r"common.pt .* is not a complete file of torch.save"),
        (
            lambda path: (path / "__0_0.distcp").write_bytes(bytes((path / "__0_0.distcp").stat().st_size)),
            r"an entry of .*__0_0.distcp is not a complete file",
        ),
        (
            lambda path: (path / ".metadata").write_bytes(
                (path / ".metadata").read_bytes().replace(b"__0_0", b"../_0")
            ),
            r"names ../_0.distcp, outside its own directory",
        ),
        (
            lambda path: (path / ".metadata").write_bytes(
                (path / ".metadata").read_bytes().replace(b"mlp.linear_fc2.weight", b"mlp.linear_fc9.weight")
            ),
            r"holds an unexpected tensor: decoder.layers.mlp.linear_fc9.weight",
        ),
    ],
)
def test_damaged_torch_dist_checkpoints(
    gqa: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    source = convert(gqa, tmp_path / "m", format="torch_dist")
    damage(source / "release")
    with pytest.raises(ValueError, match=message) as refusal:
        convert(source, tmp_path / "out", format="hf")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


class Bomb:
    """A pickle that runs a command when it is loaded by an unsafe reader."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def test_a_pickle_that_would_run_code_does_not_run(gqa: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    source = convert(gqa, tmp_path / "m", tensor=2)
    rewritten("mp_rank_01", lambda content: content.update(args=Bomb(trace)))(source)
    with pytest.raises(ValueError, match=r"holds more than data and was not loaded: .*system"):
        convert(source, tmp_path / "out", format="hf")
    (source / "release/mp_rank_01/model_optim_rng.pt").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ValueError, match=r"is not a complete file of torch\.save"):
        convert(source, tmp_path / "out", format="hf")
    dist = convert(gqa, tmp_path / "dist", format="torch_dist")
    (dist / "release/.metadata").write_bytes(pickle.dumps({"storage_data": Bomb(trace)}))
    with pytest.raises(ValueError, match=r".metadata holds more than data and was not loaded: it names posix.system"):
        convert(dist, tmp_path / "out", format="hf")
    torch.save(Bomb(trace), dist / "release/common.pt")
    whole = convert(gqa, tmp_path / "d2", format="torch_dist")
    shutil.copy(whole / "release/.metadata", dist / "release/.metadata")
    with pytest.raises(ValueError, match=r"common.pt holds more than data"):
        convert(dist, tmp_path / "out", format="hf")
    assert not trace.exists()


def test_existing_target_is_kept_unless_overwrite(gqa: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    convert(gqa, target)  # an empty directory is no loss
    before = (target / "megatron_args.txt").stat().st_ino
    with pytest.raises(ValueError, match="out exists: name another directory, or add --overwrite"):
        convert(gqa, target)
    assert (target / "megatron_args.txt").stat().st_ino == before
    convert(gqa, target, overwrite=True, tensor=4)
    assert len(list((target / "release").iterdir())) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "thesis/chapter").mkdir(parents=True)
    for name, message in (("file", "not a directory"), ("link", "not a directory"), ("thesis", "holds something else")):
        with pytest.raises(ValueError, match=message):
            convert(gqa, tmp_path / name, overwrite=True)
    assert (tmp_path / "thesis/chapter").is_dir()
    for inside in (gqa, gqa / "x", gqa.parent):
        with pytest.raises(ValueError, match="overlap"):
            convert(gqa, inside, overwrite=True)


def test_a_hub_cache_whose_files_are_links_is_not_overwritten(gqa: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    shutil.copytree(gqa, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="overlap"):
        convert(snapshot, blobs, format="hf", overwrite=True)
    convert(snapshot, tmp_path / "out", format="hf")


def test_two_runs_do_not_build_the_same_checkpoint(gqa: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    holder = os.open(partial, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another run is writing it"):
        convert(gqa, tmp_path / "out")
    assert partial.is_dir()
    os.close(holder)  # as when that run is killed
    convert(gqa, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_between_the_two_renames_takes_the_first_one_back(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = convert(gqa, tmp_path / "out", tensor=2)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(output, "_exchange", lambda *_: False)  # as on NFS
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(gqa, old, tensor=4, overwrite=True)
    assert len(list((old / "release").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_run_is_refused_until_what_was_replaced_is_gone(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = convert(gqa, tmp_path / "out", tensor=2)
    remove, refused = shutil.rmtree, []

    def removing(path: Path, **options: Any) -> None:
        if path.exists() and not refused:
            refused.append(path.name)
            assert len(list((target / "release").iterdir())) == 4
            with pytest.raises(ValueError, match="another run is writing it"):
                convert(gqa, target, overwrite=True)
        remove(path, **options)

    monkeypatch.setattr(output.shutil, "rmtree", removing)
    convert(gqa, target, tensor=4, overwrite=True)
    assert refused == [".out.partial"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_killed_between_its_two_renames_loses_nothing(gqa: Path, tmp_path: Path) -> None:
    old = convert(gqa, tmp_path / "out", tensor=2)
    old.rename(tmp_path / ".out.replaced")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(ValueError, match="out exists"):
        convert(gqa, tmp_path / "out")
    assert len(list((tmp_path / "out/release").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_leaves_nothing_and_the_old_checkpoint(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = convert(gqa, tmp_path / "out", tensor=2)
    before = sorted((path, path.stat().st_size) for path in old.rglob("*"))

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device") as failure:
        convert(gqa, old, tensor=4, overwrite=True)
    assert "mp_rank_00" in str(failure.value.filename)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert before == sorted((path, path.stat().st_size) for path in old.rglob("*"))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(4000))
    view = Stored(File(path), 0, (1000,), "fp32")
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match="ends at byte 1000, 3000 bytes too early"):
        view.read(torch.arange(1000).numpy())


def test_entry_points_end_in_one_sentence_and_a_status(gqa: Path, tmp_path: Path) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, *command], text=True, capture_output=True, env=environment)

    target = ["--load", str(gqa), "--save", str(tmp_path / "out")]
    wrong = run(str(ROOT / "prune_llama.py"), *target, "--drop-layers", "9")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "error: --drop-layers 9: the parent's layers are numbered 0 to 3\n"
    unknown = run(str(ROOT / "tools/checkpoint_conversion/convert.py"), *target, "--fromat", "hf")
    assert unknown.returncode == 2 and "unrecognized arguments: --fromat hf" in unknown.stderr
    command = f"{sys.executable} {ROOT}/tools/checkpoint_conversion/convert.py {' '.join(target)}"
    for format in ("torch", "hf"):
        limited = ["bash", "-c", f"ulimit -f 100; exec {command} --format {format}"]  # KiB: too few for the file
        full = subprocess.run(limited, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert full.returncode == 1 and full.stderr.startswith("error: ") and full.stderr.count("\n") == 1
        assert "File too large" in full.stderr
    assert not any(tmp_path.iterdir())
