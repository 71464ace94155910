"""A checkpoint is data: nothing in it or beside it runs, leads elsewhere, commands a terminal, or adds a flag."""

import io
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, check_model, run
from helpers import convert, load_whole, make_llama, rank_file, rewritten, set_config
from safetensors.torch import load_file, save_file
from stock_loop import StockLoop

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.formats.megatron import ARGS_FILE, HF_FILES
from megatron.pruning.storage.harmless import require_harmless
from megatron.pruning.training.hf_model import build, tokenizer_of


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


# Flags ---------------------------------------------------------------------------------------------------------------


def launch(folder: Path, load: Path) -> tuple[list[str], list[str]]:
    return check_model(folder, LOAD_PATH=load, DATA_PATH="text", TOKENIZER_MODEL="none", SAVE_PATH=folder / "save")


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines",
    [
        "--tensor-model-parallel-size BASH_VERSINFO[$(touch${IFS}%s)0]",
        "--tensor-model-parallel-size x[$(touch${IFS}%s)]",
        "--trust-remote-code --spec evil layers --save /tmp/elsewhere",
    ],
)
def test_flags_beside_a_checkpoint_are_neither_run_nor_passed_on(gqa: Path, tmp_path: Path, lines: str) -> None:
    load = convert(gqa, tmp_path / "load")
    words = launch(tmp_path, load)[1]
    with (load / ARGS_FILE).open("a") as file:
        file.write(lines.replace("%s", str(tmp_path / "ran")) + "\n")
    assert launch(tmp_path, load)[1] == words
    assert not (tmp_path / "ran").exists()
    assert words[:2] == ["--num-layers", "4"] and "--trust-remote-code" not in words


@pytest.mark.parametrize("format", ["torch", "torch_dist"])
def test_the_flags_of_a_foreign_checkpoint_are_all_that_it_knows(tmp_path: Path, format: str) -> None:
    source = make_llama(tmp_path / "hf", "llama3")
    load = convert(source, tmp_path / "load", format=format, tensor=2)
    words = launch(tmp_path, load)[1]
    (load / ARGS_FILE).unlink()
    shutil.rmtree(load / HF_FILES)
    found = launch(tmp_path, load)[1]
    assert found == words
    for flag, value in {"--norm-epsilon": "0.0001", "--rope-scaling-factor": "32.0", "--rotary-base": "500000"}.items():
        assert found[found.index(flag) + 1] == value
    assert found[found.index("--tensor-model-parallel-size") + 1] == "2"


# Pickles -------------------------------------------------------------------------------------------------------------


def evil_metadata(call: Call) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        (path / ".metadata").write_bytes(pickle.dumps(call))

    return apply


def evil_extra_state(call: Call) -> Callable[[Path], None]:
    """Return a change that hides a pickle where TransformerEngine unpickles once more."""

    def apply(path: Path) -> None:
        content = {"model": {"decoder.layers.0.mlp.linear_fc1._extra_state": io.BytesIO(pickle.dumps(call))}}
        torch.save(content, path / "__0_0.pt")

    return apply


def evil_extra_tensor(call: Call) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        state = torch.frombuffer(bytearray(pickle.dumps(call)), dtype=torch.uint8)
        torch.save({"model": {"decoder.layers.0.mlp.linear_fc1._extra_state": state}}, path / "__0_0.pt")

    return apply


def evil_common(call: Call) -> Callable[[Path], None]:
    return lambda path: torch.save({"args": call}, path / "common.pt")


@pytest.mark.parametrize("hide", [evil_metadata, evil_extra_state, evil_extra_tensor, evil_common])
@pytest.mark.parametrize("function", [os.system, torch.hub.load, torch.load, pickle.loads, exec])
def test_pickles_that_the_stock_loader_would_run_are_refused(
    gqa: Path, tmp_path: Path, hide: Callable[[Call], Callable[[Path], None]], function: Any
) -> None:
    folder = convert(gqa, tmp_path / "dist", format="torch_dist") / "release"
    require_harmless(folder)
    hide(Call(function, f"touch {tmp_path}/ran"))(folder)
    with pytest.raises(ValueError, match=r"holds more than data and was not loaded: it names \w+"):
        require_harmless(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_training_refuses_them_before_the_stock_loader_reads(gqa: Path, tmp_path: Path) -> None:
    load = convert(gqa, tmp_path / "evil", format="torch_dist")
    changes: dict[str, tuple[Callable[[Path], Any], str]] = {
        "evil": (evil_metadata(Call(os.system, f"touch {tmp_path}/ran")), "holds more than data"),
        "cut": (lambda at: (at / "metadata.json").write_text('{"sharded'), "/metadata.json: it is not JSON"),
        "none": (lambda at: (at / "metadata.json").unlink(), "none/release/metadata.json: No such file"),
        "number": (lambda at: (at / "metadata.json").write_text('{"sharded_backend": 1}'), "sharded_backend is 1, of"),
    }
    words = f"{(load / ARGS_FILE).read_text()} --finetune --mock-data --tokenizer-type NullTokenizer "
    words += "--seq-length 16 --micro-batch-size 1 --train-iters 1 --lr 1e-3 --lr-warmup-iters 0 --eval-iters 0"
    for name in changes:
        if name != "evil":
            shutil.copytree(load, tmp_path / name)
    for name, (change, _) in changes.items():
        change(tmp_path / name / "release")
    cases = [{"name": f"{name}-run", "words": f"--load {name} {words}".split(), "ranks": 1} for name in changes]
    for name, done in StockLoop(tmp_path).run_all(cases).items():
        assert done.code == 1 and re.search(changes[name.removesuffix("-run")][1], done.error), done.log[-2000:]
    assert not (tmp_path / "ran").exists()


def test_a_pipe_among_the_files_is_not_waited_for(gqa: Path, tmp_path: Path) -> None:
    folder = convert(gqa, tmp_path / "dist", format="torch_dist") / "release"
    weights = next(folder.glob("*.distcp"))
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ValueError, match=rf"names {weights.name}, which is not there or is no file"):
        require_harmless(folder)


def without_a_chunk(path: Path) -> None:
    """Let `.metadata` name one chunk less of a weight, whose rows torch would leave as they were drawn."""
    content = pickle.loads((path / "release/.metadata").read_bytes())
    content.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    (path / "release/.metadata").write_bytes(pickle.dumps(content))


def argument(name: str, value: Any) -> Callable[[Path], None]:
    """Return a change that says something else in an argument that is saved with the weights."""

    def apply(path: Path) -> None:
        content = load_whole(path / "release/common.pt")
        setattr(content["args"], name, value)
        torch.save(content, path / "release/common.pt")

    return apply


@pytest.mark.slow
def test_what_a_checkpoint_says_of_its_model_is_believed_only_as_a_flag_could_say_it(gqa: Path, tmp_path: Path) -> None:
    changes: dict[str, tuple[Callable[[Path], None], str]] = {
        "spec": (argument("spec", ["antigravity", "fly"]), "note: --spec is taken from the command line alone"),
        "text": (argument("num_attention_heads", "rope"), "has 'rope' for num_attention_heads, which cannot be meant"),
        "huge": (argument("hidden_size", 1 << 24), r"says that it has [\d,]+ weights or more in [\d,]+ bytes"),
        "call": (argument("norm_epsilon", Call(set, 1)), "checkpoint in call: 'int' object is not iterable"),
        "hole": (without_a_chunk, "the chunks of decoder.layers.mlp.linear_fc2.weight do not make up its shape"),
    }
    words = (
        "--use-checkpoint-args --finetune --mock-data --tokenizer-type NullTokenizer --vocab-size 100 --seq-length 16 "
    )
    words += "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --lr-warmup-iters 0 --eval-iters 0"
    for name, (change, _) in changes.items():
        change(convert(gqa, tmp_path / name, format="torch_dist"))
    cases = [{"name": name, "words": f"--load {name} {words}".split(), "ranks": 1} for name in changes]
    for name, done in StockLoop(tmp_path).run_all(cases).items():
        assert re.search(changes[name][1], done.log if name == "spec" else done.error), done.log[-2000:]
        assert done.code == (name != "spec")


@pytest.mark.slow
def test_a_broken_checkpoint_is_refused_by_the_training_or_loaded_whole(tmp_path: Path) -> None:
    few = {"name": "few", "program": "fuzz_training", "words": [str(tmp_path / "few"), "1"], "ranks": 1}
    StockLoop(tmp_path).run_all([few])["few"].ok()


# What lies beside ----------------------------------------------------------------------------------------------------


@pytest.fixture
def source(gqa: Path, tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer."""
    path = Path(shutil.copytree(gqa, tmp_path / "source"))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(ROOT / "assets/tiny-llama" / name, path)
    return path


def beside(path: Path) -> set[str]:
    """Return the names of what was carried along to an export."""
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_programs_and_folders_beside_a_checkpoint_stay_behind(source: Path, tmp_path: Path) -> None:
    plain = beside(convert(source, tmp_path / "plain", format="hf"))
    for name in ("tokenizer.py", "tokenization_evil.py", "tokenizer_evil.so", "generation_config.py"):
        (source / name).write_text("raise SystemExit('it ran')")
    (source / "a").symlink_to(".")
    (source / "tokenizer").symlink_to(".")
    assert beside(convert(source, tmp_path / "out", format="hf")) == plain
    (source / "tekken.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/rag.jinja").write_text("{{ x }}")
    found = beside(convert(source, tmp_path / "more", format="hf"))
    assert found - plain == {"tekken.json", "additional_chat_templates/rag.jinja"}
    shards = convert(tmp_path / "more", tmp_path / "shards")
    assert beside(convert(shards, tmp_path / "back", format="hf")) == found


@pytest.mark.parametrize(
    "through,name", [("hf", "tokenizer.json"), ("torch", "tokenizer.json"), ("hf", "prune_plan.json")]
)
def test_a_link_out_of_the_checkpoint_is_refused_by_name(source: Path, tmp_path: Path, through: str, name: str) -> None:
    path, folder = source, source
    if through == "torch":
        path = convert(source, tmp_path / "shards")
        folder = path / HF_FILES
    (tmp_path / "secret").write_text("secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{name} is a link to .*secret, outside of its checkpoint"):
        convert(path, tmp_path / "out", format="hf")
    assert not (tmp_path / "out").exists()


def test_the_links_of_a_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    model = tmp_path / "models--owner--name"
    snapshot = model / "snapshots/0123abcd"
    (model / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        (model / f"blobs/{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert "tokenizer.model" in beside(convert(snapshot, tmp_path / "out", format="hf"))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize(
    "name,content,complaint",
    [
        ("tokenizer.model", POINTER, "a git-lfs pointer"),
        ("tokenizer.json", "<!DOCTYPE html><html>404</html>", "a web page, not the file"),
        ("tokenizer.model", "", "empty, not the file"),
        ("config.json", POINTER, "a git-lfs pointer"),
        (
            "model.safetensors",
            POINTER,
            "a git-lfs pointer",
        ),
    ],
)
def test_a_wrong_file_under_a_right_name_is_named(
    source: Path, tmp_path: Path, name: str, content: str, complaint: str
) -> None:
    (source / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is {complaint}"):
        convert(source, tmp_path / "out", format="hf")


def test_settings_that_run_code_do_not_go_on_and_are_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import convert as converter

    evil: dict[str, Any] = {"auto_map": {"AutoConfig": "evil.Config"}, "attn_implementation": "owner/kernel"}
    set_config(**evil, trust_remote_code=True)(source)
    tokenizer = source / "tokenizer_config.json"
    tokenizer.write_text(
        tokenizer.read_text().replace("{", '{"auto\\u005fmap": {"AutoTokenizer": ["evil.T", null]},', 1)
    )
    (source / "evil.py").write_text("raise SystemExit('it ran')")
    converter.main(["--load", str(source), "--save", str(tmp_path / "out"), "--format", "hf"])
    assert "auto_map, attn_implementation, trust_remote_code" in capsys.readouterr().out
    for name in ("config.json", "tokenizer_config.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "auto_map" not in text and "attn_impl" not in text and "trust_remote" not in text
    checkpoint = open_checkpoint(source)
    assert build(checkpoint, "fp32", "cpu").config._attn_implementation in ("sdpa", "eager")
    assert tokenizer_of(checkpoint).encode("def main")


def test_what_a_name_commands_a_terminal_is_shown_and_not_obeyed(source: Path, tmp_path: Path) -> None:
    target = convert(source, tmp_path / "out", format="hf")
    manifest = target / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokenizer.model"', '"\\u001b]0;owned\\u0007"'))
    done = run(sys.executable, str(ROOT / "tools/show_checkpoint.py"), str(target), "--verify")
    assert done.returncode == 1 and "\\x1b]0;owned" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


# One rule for tied embeddings, buffers and constants -----------------------------------------------------------------


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_tied_model_with_two_matrices_keeps_both_unless_they_are_the_same(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "tied")
    change_tensors(source, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert open_checkpoint(source).config.tied
    change_tensors(source, lambda tensors: tensors[HEAD][50].neg_())
    assert not open_checkpoint(source).config.tied
    back = convert(convert(source, tmp_path / "m", tensor=2, pipeline=2), tmp_path / "back", format="hf")
    for key, value in load_file(source / "model.safetensors").items():
        assert torch.equal(load_file(back / "model.safetensors")[key], value)


def test_a_tied_model_that_has_only_the_head_is_read(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "tied")
    wanted = load_file(source / "model.safetensors")[EMBEDDING]
    change_tensors(source, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    back = convert(source, tmp_path / "back", format="hf")
    assert torch.equal(load_file(back / "model.safetensors")[EMBEDDING], wanted)


def test_a_last_stage_whose_copy_of_the_embedding_is_another_is_refused(tmp_path: Path) -> None:
    source = convert(make_llama(tmp_path / "hf", "tied"), tmp_path / "m", pipeline=2)
    change = rewritten("mp_rank_00_001", lambda content: content["model"]["output_layer.weight"][7].neg_())
    assert rank_file(source, "mp_rank_00_001").is_file()
    change(source)
    with pytest.raises(ValueError, match="output layer on tensor rank 0 is not a copy of the embedding"):
        open_checkpoint(source)


def test_buffers_are_skipped_whatever_they_are(gqa: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(gqa, tmp_path / "source"))
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3, dtype=torch.float64),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 5, 3),
        "model.rotary_emb.inv_freq": torch.ones(3),
        "model.layers.1.self_attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "model.layers.1.self_attn.masked_bias": torch.tensor(-1e4),
    }
    change_tensors(source, lambda tensors: tensors.update(buffers))
    assert open_checkpoint(source).config == open_checkpoint(gqa).config
