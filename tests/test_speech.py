"""What a run prints, for whom: one JSON object for a program, nothing for nobody."""

import json
from pathlib import Path
from typing import Any

import pytest
import show_checkpoint
from convert import main as convert_main
from helpers import prune, tensors

import prune_llama
from megatron.pruning import __version__
from megatron.pruning.cli.speech import add_speech_flags, speaking


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return what stdout has, which must be one JSON value and nothing else."""
    return json.loads(capsys.readouterr().out)


def test_a_program_reads_one_object(gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune(gqa, tmp_path / "pruned", "--ffn-hidden-size-remain=40", "--drop-layers=1", "--json")
    found = printed(capsys)
    assert found["dropped_layers"] == [1] and found["evidence"]["criterion"] == "random" and found["losses"] is None
    parameters = sum(tensor.numel() for tensor in tensors(gqa).values())
    assert (found["parent"]["path"], found["parent"]["parameters"]) == (str(gqa), parameters)
    pruned = found["pruned"]
    assert (pruned["format"], pruned["sizes"]["ffn"], pruned["sizes"]["layers"]) == ("torch", 40, 3)
    assert pruned["layout"] == {"tensor": 1, "pipeline": 1}

    prune(gqa, tmp_path / "planned", "--ffn-hidden-size-remain=40", "--plan-only", "--json")
    assert printed(capsys)["pruned"]["sizes"]["ffn"] == 40 and not (tmp_path / "planned").exists()
    prune(gqa, tmp_path / "pruned", "--ffn-hidden-size-remain=32", "--plan-only", "--json")
    assert printed(capsys)["pruned"]["sizes"]["ffn"] == 32, "and not of what lies there"

    prune(gqa, tmp_path / "sized", "--target-ratio=0.5", "--json")
    shapes = printed(capsys)["shapes"]
    assert len(shapes) > 1 and all(0.4 < shape["parameters"] / parameters < 0.6 for shape in shapes)

    convert_main(["--load", str(tmp_path / "pruned"), "--save", str(tmp_path / "hf"), "--format=hf", "--json"])
    found = printed(capsys)
    assert found["source"] == pruned and found["saved"]["parameters"] == pruned["parameters"]
    assert found["saved"]["layout"] is None

    show_checkpoint.main([str(tmp_path / "hf"), "--weights", "--verify", "--digest", "--json"])
    found = printed(capsys)
    assert found["verified"] is True and len(found["digest"]) == 64
    shown = {weight["name"]: tuple(weight["shape"]) for weight in found["weights"]}
    assert shown == {name: tuple(tensor.shape) for name, tensor in tensors(tmp_path / "hf").items()}


def test_quiet_runs_print_what_is_wrong_alone(
    gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(gqa, tmp_path / "pruned", "--drop-layers=1", "--quiet")
    assert capsys.readouterr() == ("", "")
    prune(gqa, tmp_path / "narrow", "--ffn-hidden-size-remain=40", "-q")
    out, err = capsys.readouterr()
    assert not out and err.startswith("note: a random choice")
    prune(gqa, tmp_path / "both", "--drop-layers=1", "-q", "--json")
    assert printed(capsys)["dropped_layers"] == [1]


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        prune_llama.main(["--version"])
    assert capsys.readouterr().out == f"megatron-llama-pruning {__version__}\n"


def test_a_verbose_run_says_where_a_mistake_was_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    parser = prune_llama.new_parser("")
    add_speech_flags(parser)
    for flags, wanted in (([], False), (["-v"], True)):
        with pytest.raises(ValueError, match="wrong"), speaking(parser.parse_args(flags)):
            raise ValueError("wrong")
        assert ("test_speech.py" in capsys.readouterr().err) == wanted
