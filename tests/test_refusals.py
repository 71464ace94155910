"""What cannot be done is refused in one sentence, with the flag or file and both values, and nothing is written."""

import argparse
import collections
import fcntl
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import convert as converter
import pytest
from commands import CONVERT, PRUNE, run
from helpers import convert, digests, make_llama, prune, rewritten, tensors

import prune_llama
from megatron.pruning.cli.flags import hyphenated, megatron_flags
from megatron.pruning.formats import open_checkpoint, save_checkpoint
from megatron.pruning.storage import direct_write, output


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
        (
            "--drop-layers 1 --tensor-model-parallel-size 0",
            r"--tensor-model-parallel-size 0: it must lie between 1",
        ),
        ("--drop-layers 1 --make-vocab-size-divisible-by 0", r"--make-vocab-size-divisible-by 0: it must lie between"),
        ("--drop-layers 1 --make-vocab-size-divisible-by 1000000000000", r"by 1000000000000: it must lie between"),
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
        prune(gqa, tmp_path / "out", *flags.split())
    assert "\n" not in str(refusal.value)
    assert not any(tmp_path.iterdir())


def test_vocabulary_is_taken_only_where_the_source_does_not_know_it(gqa: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--vocab-size 50 disagrees with .*, whose model has 101"):
        converter.main(["--load", str(gqa), "--save", str(tmp_path / "out"), "--vocab-size", "50"])
    shards = convert(gqa, tmp_path / "m")
    rewritten("mp_rank_00", lambda content: setattr(content["args"], "vocab_size", None))(shards)
    shutil.rmtree(shards / "huggingface")
    flags = ["--vocab-size", "101", "--format", "hf"]
    converter.main(["--load", str(shards), "--save", str(tmp_path / "a"), *flags])
    prune(shards, tmp_path / "b", "--drop-layers", "1", *flags)
    assert [len(tensors(tmp_path / name)["lm_head.weight"]) for name in ("a", "b")] == [101, 101]


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


@pytest.mark.slow
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
    prune(gqa, tmp_path / "out", "--hidden-size-remain", "36")
    assert "hidden size 36 is not a multiple of 8 attention heads" in capsys.readouterr().err


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
    (tmp_path / "thesis/config.json").write_text('{"editor": "vim"}')  # many a folder has one
    for name, message in (("file", "not a directory"), ("link", "not a directory"), ("thesis", "holds something else")):
        with pytest.raises(ValueError, match=message):
            convert(gqa, tmp_path / name, overwrite=True)
    assert (tmp_path / "thesis/chapter").is_dir()
    for inside in (gqa, gqa / "x", gqa.parent):
        with pytest.raises(ValueError, match="overlap"):
            convert(gqa, inside, overwrite=True)


@pytest.mark.parametrize("save", ["runs/../precious", "runs/../parent", "tomorrow/../../scratch/new", "runs/.."])
def test_dots_after_a_link_lead_out_of_where_it_leads(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: str
) -> None:
    (tmp_path / "scratch/runs").mkdir(parents=True)
    (tmp_path / "repo/precious").mkdir(parents=True)
    (tmp_path / "repo/precious/thesis").touch()
    (tmp_path / "repo/runs").symlink_to(tmp_path / "scratch/runs")
    shutil.copytree(gqa, tmp_path / "repo/parent")
    monkeypatch.chdir(tmp_path / "repo")
    words = ["--load", "parent", "--save", save, "--format", "hf"]
    if save == "runs/..":
        with pytest.raises(ValueError, match="scratch exists: name another directory"):
            converter.main(words)
    else:
        converter.main(words)
        assert (tmp_path / "scratch" / Path(save).name / "config.json").is_file()
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["parent", "precious", "runs"]
    assert [path.name for path in Path("precious").iterdir()] == ["thesis"]
    assert digests(Path("parent")) == digests(gqa)


def test_a_hub_cache_whose_files_are_links_is_not_overwritten(gqa: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    shutil.copytree(gqa, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="overlap"):
        convert(snapshot, blobs, format="hf", overwrite=True)
    convert(snapshot, tmp_path / "out", format="hf")


def test_two_runs_do_not_build_the_same_checkpoint(
    gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / ".out.partial-0a1b2c3d"
    partial.mkdir()
    (partial / "work").touch()
    holder = os.open(partial, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"another run is writing it \(.out.partial-0a1b2c3d\)"):
        convert(gqa, tmp_path / "out")
    os.close(holder)  # as when that run is killed
    convert(gqa, tmp_path / "out")
    assert f"{partial} is of a run that was killed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [partial.name, "out"]
    assert (partial / "work").exists(), "this run has not made it"


def test_a_target_that_turns_up_during_the_run_stays(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = output._sync_directories

    def late(top: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis").touch()
        sync(top)

    monkeypatch.setattr(output, "_sync_directories", late)
    for supported in (True, False):
        if not supported:
            monkeypatch.setattr(output, "_renameat2", lambda *_: False)
        for overwrite in (False, True):  # it is no checkpoint either
            with pytest.raises(ValueError, match=r"out exists|something else than a checkpoint"):
                convert(gqa, tmp_path / "out", overwrite=overwrite)
            assert (tmp_path / "out/thesis").exists()
            assert [path.name for path in tmp_path.iterdir()] == ["out"]
            shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("supported", [True, False])
def test_of_two_runs_without_locks_both_end_well_or_with_a_sentence(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    """Locks of one node bind no other: the second run begins and ends while the first is about to put its own there."""
    monkeypatch.setattr(output, "hold_directory", lambda directory, **_: os.open(directory, os.O_RDONLY))
    if not supported:
        monkeypatch.setattr(output, "_renameat2", lambda *_: False)
    sync = output._sync_directories

    def late(top: Path) -> None:
        monkeypatch.setattr(output, "_sync_directories", sync)
        convert(gqa, tmp_path / "out", tensor=4)
        sync(top)

    monkeypatch.setattr(output, "_sync_directories", late)
    with pytest.raises(ValueError, match="out exists"):
        convert(gqa, tmp_path / "out", tensor=2)
    assert len(list((tmp_path / "out/release").iterdir())) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("supported", [True, False])
def test_what_another_run_puts_there_during_the_exchange_stays(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    target = convert(gqa, tmp_path / "out", tensor=2)
    # A lock of one node binds no other.
    monkeypatch.setattr(output, "hold_directory", lambda directory, **_: os.open(directory, os.O_RDONLY))
    replace = output._replace

    def late(partial: Path, path: Path, seen: tuple[int, int]) -> Path:
        monkeypatch.setattr(output, "_replace", replace)
        target.rename(tmp_path / "moved")
        convert(gqa, target, tensor=4)
        return replace(partial, path, seen)

    if not supported:
        monkeypatch.setattr(output, "_renameat2", lambda *_: False)
    monkeypatch.setattr(output, "_replace", late)
    with pytest.raises(ValueError, match="another run has put its own checkpoint there meanwhile"):
        convert(gqa, target, overwrite=True)
    assert len(list((target / "release").iterdir())) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "out"]


def test_a_source_that_is_replaced_while_it_is_read_is_refused(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(gqa, tmp_path / "source"))
    checkpoint = open_checkpoint(source)
    other = make_llama(tmp_path / "other", "gqa", seed=1)
    (other / "model.safetensors").rename(source / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors was changed or replaced while it was read"):
        save_checkpoint(checkpoint, tmp_path / "out", format="torch")
    checkpoint = open_checkpoint(source)
    sync = direct_write.finish

    def late(*arguments: Any) -> None:
        os.utime(source / "model.safetensors")
        sync(*arguments)

    monkeypatch.setattr(output, "finish", late)
    with pytest.raises(ValueError, match=r"model.safetensors was changed or replaced while it was read"):
        save_checkpoint(checkpoint, tmp_path / "out", format="torch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "source"]


def test_nothing_that_is_a_link_is_followed(gqa: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").touch()
    for name in (".out.partial", ".out.replaced", ".out.partial-00000000"):
        (tmp_path / name).symlink_to(tmp_path / "thesis")
    convert(gqa, tmp_path / "out")
    convert(gqa, tmp_path / "out", overwrite=True)
    assert (tmp_path / "thesis/chapter").exists()
    assert len(list(tmp_path.iterdir())) == 5


def test_a_refusal_leaves_no_directory_behind(gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = collections.namedtuple("Usage", "free")(10)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ValueError, match="are free there"):
        convert(gqa, tmp_path / "a/b/out")
    assert not list(tmp_path.iterdir())


def test_a_failure_between_the_two_renames_takes_the_first_one_back(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = convert(gqa, tmp_path / "out", tensor=2)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(output, "_renameat2", lambda *_: False)  # as on NFS
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
    assert len(refused) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_killed_between_its_two_renames_loses_nothing(
    gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = convert(gqa, tmp_path / "out", tensor=2)
    old.rename(replaced := tmp_path / ".out.replaced-01234567")
    convert(gqa, tmp_path / "out", tensor=4)
    assert f"{replaced} is of a run that was killed" in capsys.readouterr().err
    assert len(list((replaced / "release").iterdir())) == 2


def test_a_failed_write_leaves_nothing_and_the_old_checkpoint(
    gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = convert(gqa, tmp_path / "out", tensor=2)
    before = digests(old)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device") as failure:
        convert(gqa, old, tensor=4, overwrite=True)
    assert "mp_rank_00" in str(failure.value.filename)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digests(old) == before


def test_entry_points_end_in_one_sentence_and_a_status(gqa: Path, tmp_path: Path) -> None:
    target = ["--load", str(gqa), "--save", str(tmp_path / "out")]
    wrong = run(sys.executable, PRUNE, *target, "--drop-layers", "9")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "error: --drop-layers 9: the parent's layers are numbered 0 to 3\n"
    unknown = run(sys.executable, CONVERT, *target, "--fromat", "hf")
    assert unknown.returncode == 2 and "unrecognized arguments: --fromat hf" in unknown.stderr
    for format in ("torch", "hf"):
        limit = 'ulimit -f 100; exec "$@"'  # KiB: too few for the file
        full = run("bash", "-c", limit, "limited", sys.executable, CONVERT, *target, "--format", format)
        assert full.returncode == 1 and full.stderr.startswith("error: ") and full.stderr.count("\n") == 1
        assert "File too large" in full.stderr
    assert not any(tmp_path.iterdir())
