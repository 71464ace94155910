"""What clusters have on disk: virtual and uneven pipelines, both spellings of norms, older names, iterations."""

import shutil
from argparse import Namespace
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import convert as converter
import pytest
import torch
from helpers import (
    assert_same_tensors,
    convert,
    digests,
    load_whole,
    make_llama,
    rank_file,
    rewritten,
    tensors,
)
from safetensors.torch import load_file, save_file
from show_checkpoint import digest
from stock_loop import StockLoop

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.formats.format import SaveOptions
from megatron.pruning.formats.megatron_dist import dist_output
from megatron.pruning.model.hf_config import config_from_hf, config_to_hf
from megatron.pruning.model.layout import Layout
from megatron.pruning.model.megatron_args import config_to_args
from megatron.pruning.storage.dcp_file import DistFile, Piece, metadata_bytes, object_bytes
from megatron.pruning.storage.output import write_files
from megatron.pruning.storage.processes import World

Content = dict[str, Any]


def taken(path: Path, rank: str) -> Content:
    """Return the content of a rank file, and remove it."""
    content = load_whole(rank_file(path, rank))
    shutil.rmtree(rank_file(path, rank).parent)
    return content


def save(path: Path, rank: str, content: Content) -> None:
    """Write a rank file."""
    rank_file(path, rank).parent.mkdir(exist_ok=True)
    torch.save(content, rank_file(path, rank))


def part(model: Content, layers: list[int], first: bool, last: bool) -> Content:
    """Return some layers of a model of one rank, numbered from 0, with the weights before and after them."""
    out = {k: v for k, v in model.items() if (first and "embedding" in k) or (last and ("final" in k or "output" in k))}
    for new, old in enumerate(layers):
        for key, value in model.items():
            if key.startswith(f"decoder.layers.{old}."):
                out[key.replace(f".{old}.", f".{new}.", 1)] = value
    return out


def virtual_pipeline(path: Path, tensor: int) -> None:
    """Re-cut tp2 pp1 into two stages of two chunks each: stage 0 has layers 0 and 2, stage 1 has 1 and 3."""
    content = taken(path, f"mp_rank_{tensor:02d}")
    model = content.pop("model")
    content["args"].pipeline_model_parallel_size = 2
    for stage in (0, 1):
        chunks = {
            "model0": part(model, [stage], first=stage == 0, last=False),
            "model1": part(model, [stage + 2], first=False, last=stage == 1),
        }
        save(path, f"mp_rank_{tensor:02d}_{stage:03d}", content | chunks)


def uneven_pipeline(path: Path, tensor: int) -> None:
    """Re-cut tp2 pp1 into a stage of one layer and a stage of three."""
    content = taken(path, f"mp_rank_{tensor:02d}")
    model = content.pop("model")
    content["args"].pipeline_model_parallel_size = 2
    content["args"].decoder_first_pipeline_num_layers = 1
    for stage, layers in ((0, [0]), (1, [1, 2, 3])):
        chunk = part(model, layers, first=stage == 0, last=stage == 1)
        save(path, f"mp_rank_{tensor:02d}_{stage:03d}", content | {"model": chunk})


def older_names(path: Path, tensor: int) -> None:
    """Rename to the nested dictionaries of the time before Megatron-core."""
    content = taken(path, f"mp_rank_{tensor:02d}")
    names = {
        "pre_mlp_layernorm": "post_attention_norm", "input_layernorm": "input_norm", "linear_qkv": "query_key_value",
        "linear_proj": "dense", "linear_fc1": "dense_h_to_4h", "linear_fc2": "dense_4h_to_h",
    }  # fmt: skip
    encoder, model = {}, content["model"]
    for key, value in model.items():
        if key.startswith("decoder.layers."):
            for new, old in names.items():
                key = key.replace(new, old)
            encoder[key.removeprefix("decoder.")] = value
    encoder["final_norm.weight"] = model["decoder.final_layernorm.weight"]
    embedding = {"word_embeddings": {"weight": model["embedding.word_embeddings.weight"]}}
    language_model = {"embedding": embedding, "encoder": encoder}
    if "output_layer.weight" in model:
        language_model["output_layer"] = {"weight": model["output_layer.weight"]}
    content["model"] = {"language_model": language_model}
    content["args"].add_position_embedding = False
    del content["args"].position_embedding_type
    save(path, f"mp_rank_{tensor:02d}", content)


def test_a_virtual_pipeline_of_many_chunks_is_read_in_order(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "gqa", layers=24)
    shards = convert(source, tmp_path / "m")
    content = taken(shards, "mp_rank_00")
    model = content.pop("model")
    content["args"].pipeline_model_parallel_size = 2
    for stage in (0, 1):
        chunks = {
            f"model{v}": part(model, [2 * v + stage], first=(v, stage) == (0, 0), last=(v, stage) == (11, 1))
            for v in range(12)
        }
        save(shards, f"mp_rank_00_{stage:03d}", content | chunks)
    assert_same_tensors(tensors(convert(shards, tmp_path / "out", format="hf")), tensors(source))


def test_older_names_of_a_tied_pipeline_with_its_copy_are_read(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "tied")
    shards = convert(source, tmp_path / "m", pipeline=2)
    last = load_whole(rank_file(shards, "mp_rank_00_001"))
    copy = last["model"].pop("output_layer.weight")
    encoder = {key.removeprefix("decoder."): value for key, value in last["model"].items()}
    last["model"] = {"language_model": {"encoder": encoder}, "word_embeddings_for_head": {"weight": copy}}
    save(shards, "mp_rank_00_001", last)
    with pytest.raises(ValueError, match=r"unexpected tensor: language_model.encoder.final_layernorm.bias"):
        encoder["final_layernorm.bias"] = copy
        save(shards, "mp_rank_00_001", last)
        open_checkpoint(shards)
    del encoder["final_layernorm.bias"]
    encoder["layers.0.self_attention.query_key_value.weight"] = encoder.pop("layers.0.self_attention.linear_qkv.weight")
    save(shards, "mp_rank_00_001", last)
    assert_same_tensors(tensors(convert(shards, tmp_path / "out", format="hf")), tensors(source))


def test_torch_dist_by_layer_and_without_common_pt_is_read(gqa: Path, tmp_path: Path) -> None:
    (whole,), texts = dist_output(open_checkpoint(gqa), SaveOptions())
    pieces = [
        Piece(piece.name.replace("layers.", f"layers.{piece.layer}.", 1) if piece.layer is not None else piece.name,
              None, piece.view)
        for piece in whole.pieces
    ]  # fmt: skip
    with torch.serialization.safe_globals([Namespace]):
        common = torch.load(BytesIO(texts.pop("release/common.pt")), weights_only=True)
    file = DistFile(whole.name, pieces, {"common_state/shard_0_1": object_bytes([common])})
    texts["release/.metadata"] = metadata_bytes([file], 4)
    write_files([file], texts, tmp_path / "m", False, Path.is_dir, World())
    assert_same_tensors(tensors(convert(tmp_path / "m", tmp_path / "out", format="hf")), tensors(gqa))


@pytest.mark.parametrize("shape", ["gqa", "tied"])
@pytest.mark.parametrize("recut", [virtual_pipeline, uneven_pipeline, older_names])
def test_every_cluster_layout_is_read(tmp_path: Path, shape: str, recut: Callable[[Path, int], None]) -> None:
    source = make_llama(tmp_path / "hf", shape)
    shards = convert(source, tmp_path / "m", tensor=2)
    for tensor in (0, 1):
        recut(shards, tensor)
    assert_same_tensors(tensors(convert(shards, tmp_path / "out", format="hf")), tensors(source))


def test_norms_are_written_and_read_in_either_spelling(llama: Path, tmp_path: Path) -> None:
    te = convert(llama, tmp_path / "te", tensor=2, transformer_impl="transformer_engine")
    model = load_whole(rank_file(te, "mp_rank_01"))["model"]
    names = {key.replace("decoder.layers.1.", "") for key in model if ".layers.1." in key}
    optional = {"self_attention.linear_qkv.bias"} | {f"self_attention.{x}_layernorm.weight" for x in "qk"}
    assert names - optional == {
        "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight", "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }  # fmt: skip
    assert open_checkpoint(te).transformer_impl == "transformer_engine"
    again = convert(te, tmp_path / "again", tensor=4)  # keeps the spelling of its source
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in load_whole(rank_file(again, "mp_rank_00"))["model"]
    local = convert(again, tmp_path / "local", tensor=2, transformer_impl="local")
    assert_same_tensors(tensors(convert(local, tmp_path / "out", format="hf")), tensors(llama))


def test_an_iteration_can_be_named(gqa: Path, tmp_path: Path) -> None:
    saved = convert(gqa, tmp_path / "saved", tensor=2)
    other = convert(make_llama(tmp_path / "other", vocab=101, layers=2), tmp_path / "o", tensor=2)
    (saved / "release").rename(saved / "iter_0000010")
    shutil.copytree(other / "release", saved / "iter_0000020")
    (saved / "latest_checkpointed_iteration.txt").write_text("20")
    assert open_checkpoint(saved).config.num_layers == 2
    assert open_checkpoint(saved, iteration=10).config.num_layers == 4
    assert open_checkpoint(saved / "iter_0000010").config.num_layers == 4
    with pytest.raises(ValueError, match=r"has no iter_0000030; saved there: iter_0000010, iter_0000020"):
        open_checkpoint(saved, iteration=30)


def test_optimizer_state_is_dropped_and_said(gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = convert(gqa, tmp_path / "m")
    optimizer = {"state": {0: {"exp_avg": torch.ones(7)}}}
    rewritten("mp_rank_00", lambda content: content.update(optimizer=optimizer))(shards)
    converter.main(["--load", str(shards), "--save", str(tmp_path / "out"), "--format", "torch_dist"])
    assert "optimizer state of the source stays behind" in capsys.readouterr().out


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
LLAMA3_ROPE = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
# config.json as published: hidden, ffn, layers, heads, key/value heads, vocabulary, epsilon, theta, positions.
FAMILIES = {
    "Llama 1 7B": ((4096, 11008, 32, 32, None, 32000, 1e-6, None, 2048), LLAMA, 6738415616),
    "Llama 2 13B": ((5120, 13824, 40, 40, 40, 32000, 1e-5, None, 4096), LLAMA, 13015864320),
    "Llama 2 70B": ((8192, 28672, 80, 64, 8, 32000, 1e-5, None, 4096), LLAMA, 68976648192),
    "CodeLlama 7B": ((4096, 11008, 32, 32, 32, 32016, 1e-5, 1000000, 16384), LLAMA, 6738546688),
    "TinyLlama": ((2048, 5632, 22, 32, 4, 32000, 1e-5, 10000.0, 2048), LLAMA, 1100048384),
    "Llama 3 8B": ((4096, 14336, 32, 32, 8, 128256, 1e-5, 500000.0, 8192), LLAMA, 8030261248),
    "Llama 3.1 8B": (
        (4096, 14336, 32, 32, 8, 128256, 1e-5, 500000.0, 131072),
        LLAMA | {"rope_scaling": LLAMA3_ROPE | {"factor": 8.0}}, 8030261248,
    ),
    "Llama 3.2 1B": (
        (2048, 8192, 16, 32, 8, 128256, 1e-5, 500000.0, 131072),
        LLAMA | {"rope_scaling": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 64},
        1235814400,
    ),
    "Mistral 7B v0.3": (
        (4096, 14336, 32, 32, 8, 32768, 1e-5, 1000000.0, 32768),
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}, 7248023552,
    ),
    "Qwen2.5 7B": (
        (3584, 18944, 28, 28, 4, 152064, 1e-6, 1000000.0, 131072),
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False,
         "sliding_window": 131072}, 7615616512,
    ),
    "Qwen3 8B": (
        (4096, 12288, 36, 32, 8, 151936, 1e-6, 1000000.0, 40960),
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
         "use_sliding_window": False, "head_dim": 128}, 8190735360,
    ),
    "Yi 6B": ((4096, 11008, 32, 32, 4, 64000, 1e-5, 5000000.0, 4096), LLAMA, 6061035520),
    "Vicuna 7B": ((4096, 11008, 32, 32, 32, 32000, 1e-5, None, 4096), LLAMA, 6738415616),
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_published_configs_map_to_megatron_and_back(family: str) -> None:
    (hidden, ffn, layers, heads, groups, vocab, epsilon, theta, positions), rest, parameters = FAMILIES[family]
    published = {
        **rest, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "rms_norm_eps": epsilon,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocab, "rope_theta": theta,
        "max_position_embeddings": positions, "torch_dtype": "bfloat16", "bos_token_id": 1,
    }  # fmt: skip
    published = {key: value for key, value in published.items() if value is not None or key == "sliding_window"}
    config = config_from_hf(published, family)
    assert config.parameters == parameters
    args = config_to_args(config, Layout(4))
    assert (args.hidden_size, args.ffn_hidden_size, args.num_layers) == (hidden, ffn, layers)
    assert (args.num_attention_heads, args.num_query_groups) == (heads, groups or heads)
    assert args.group_query_attention == (groups not in (None, heads))
    assert args.rotary_base == (theta or 10000) and args.norm_epsilon == args.layernorm_epsilon == epsilon
    assert args.untie_embeddings_and_output_weights != rest.get("tie_word_embeddings", False)
    assert args.use_rope_scaling == ("rope_scaling" in rest) and args.padded_vocab_size % 512 == 0
    written = config_to_hf(config, "bf16")
    assert {key: written[key] for key in published} == published


@pytest.mark.slow
def test_a_process_that_fails_fails_the_run_and_leaves_no_checkpoint(gqa: Path, tmp_path: Path) -> None:
    shutil.copytree(gqa, tmp_path / "hf")
    state = load_file(gqa / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][-1] = 1e6  # on tensor rank 1 alone, whose file process 1 writes
    save_file(state, tmp_path / "hf/model.safetensors")
    words = "--load hf --save out --tensor-model-parallel-size 2 --dtype fp16"
    done = StockLoop(tmp_path).run("process", words, ranks=2, program="convert")
    assert done.code and "[rank 1] error: a weight of magnitude 1e+06 does not fit fp16" in done.log
    assert not (tmp_path / "out").exists()


SOURCES = [
    "Hugging Face, one file", "Hugging Face, shards", "torch tp1 pp1", "torch tp4 pp1", "torch tp2 pp2",
    "torch tp2, TransformerEngine names", "torch tp2, virtual pipeline", "torch tp2, uneven pipeline",
    "torch tp2, names before Megatron-core", "torch_dist",
]  # fmt: skip
TARGETS: dict[str, dict[str, Any]] = {
    "Hugging Face": {"format": "hf"},
    "torch tp1 pp1": {},
    "torch tp4 pp1": {"tensor": 4},
    "torch tp2 pp2": {"tensor": 2, "pipeline": 2},
    "torch tp2, TransformerEngine names": {"tensor": 2, "transformer_impl": "transformer_engine"},
    "torch_dist": {"format": "torch_dist"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write one model in everything that is read."""
    top = tmp_path_factory.mktemp("sources")
    hf = make_llama(top / "hf", "gqa", dtype=torch.bfloat16)
    shards = make_llama(top / "shards", "gqa", dtype=torch.bfloat16, max_shard_size="40KB")
    paths = [hf, shards, *(convert(hf, top / f"{t}{p}", tensor=t, pipeline=p) for t, p in ((1, 1), (4, 1), (2, 2)))]
    paths.append(convert(hf, top / "te", tensor=2, transformer_impl="transformer_engine"))
    for recut in (virtual_pipeline, uneven_pipeline, older_names):
        paths.append(convert(hf, top / recut.__name__, tensor=2))
        for tensor in (0, 1):
            recut(paths[-1], tensor)
    paths.append(convert(hf, top / "dist", format="torch_dist"))
    return dict(zip(SOURCES, paths, strict=True))


@pytest.fixture(scope="module")
def wanted(sources: dict[str, Path]) -> str:
    """Return the digest of the model, as Hugging Face wrote it."""
    return digest(open_checkpoint(sources[SOURCES[0]]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_everything_that_is_read_becomes_everything_that_is_written(
    sources: dict[str, Path], wanted: str, tmp_path: Path, source: str, target: str
) -> None:
    written = convert(sources[source], tmp_path / "target", **TARGETS[target])
    assert digest(open_checkpoint(written)) == wanted


@pytest.mark.parametrize("format", ["hf", "torch", "torch_dist"])
def test_file_written_twice_is_the_same(gqa: Path, tmp_path: Path, format: str) -> None:
    assert digests(convert(gqa, tmp_path / "a", format=format)) == digests(convert(gqa, tmp_path / "b", format=format))
