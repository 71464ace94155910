"""Conversions are exact: bitwise as files, and as models against LlamaForCausalLM and the stock GPTModel."""

import json
import shutil
from pathlib import Path

import pytest
import show_checkpoint
import torch
from commands import ROOT
from convert import main as convert_main
from helpers import (
    as_bin,
    assert_same_tensors,
    convert,
    digests,
    hf_logits,
    load_whole,
    make_llama,
    set_config,
    tensors,
)
from model_shapes import EACH_SHAPE, SHAPES
from safetensors.torch import load_file, save_file
from stock_loop import StockLoop
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from megatron.pruning.formats import open_checkpoint
from megatron.pruning.formats.format import SaveOptions
from megatron.pruning.formats.huggingface import hf_output, read_hf_config
from megatron.pruning.model.hf_config import config_from_hf, config_to_hf
from megatron.pruning.model.layout import Layout
from megatron.pruning.storage.output import write_files
from megatron.pruning.storage.processes import World
from megatron.pruning.training.hf_model import build

LAYOUTS = [(tensor, pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2)]
STOCK_LAYOUTS = [layout for layout in LAYOUTS if layout != (4, 2)]  # at most 4 ranks to launch


@pytest.fixture(scope="module", params=EACH_SHAPE)
def bf16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Hugging Face checkpoint of each shape, in bfloat16."""
    return make_llama(tmp_path_factory.mktemp("bf16") / "hf", request.param, dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("tensor,pipeline", LAYOUTS)
def test_there_and_back_is_the_identity(bf16: Path, tmp_path: Path, tensor: int, pipeline: int) -> None:
    megatron = convert(bf16, tmp_path / "megatron", tensor=tensor, pipeline=pipeline)
    back = convert(megatron, tmp_path / "back", format="hf")
    assert_same_tensors(tensors(back), tensors(bf16))


def test_there_and_back_through_torch_dist_is_the_identity(bf16: Path, tmp_path: Path) -> None:
    dist = convert(bf16, tmp_path / "dist", format="torch_dist", tensor=2)
    shards = convert(dist, tmp_path / "shards", tensor=4, pipeline=2)
    for name, checkpoint in (("a", dist), ("b", shards), ("c", convert(shards, tmp_path / "d2", format="torch_dist"))):
        assert_same_tensors(tensors(convert(checkpoint, tmp_path / name, format="hf")), tensors(bf16))


def test_digest_is_of_the_model_not_of_its_format(
    gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = [gqa, convert(gqa, tmp_path / "a", tensor=4, pipeline=2)]
    checkpoints += [convert(gqa, tmp_path / "b", format="torch_dist"), make_llama(tmp_path / "other", vocab=102)]
    digests = []
    for checkpoint in checkpoints:
        show_checkpoint.main([str(checkpoint), "--digest", "--weights"])
        printed = capsys.readouterr().out
        digests.append(printed.split("digest")[-1].split()[0])
        assert "66,040" in printed or checkpoint.name == "other"
        q = next(line for line in printed.splitlines() if "layers.3.self_attn.q_proj" in line).split()
        wanted = tensors(gqa)["model.layers.3.self_attn.q_proj.weight"].double().norm()
        assert checkpoint.name == "other" or float(q[-1]) == pytest.approx(float(wanted), rel=1e-5)
    assert len(set(digests[:3])) == 1 and digests[3] != digests[0]


def test_torch_dist_is_what_torch_itself_reads(gqa: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dist = convert(gqa, tmp_path / "dist", format="torch_dist")
    entries = dcp.FileSystemReader(dist / "release").read_metadata().state_dict_metadata
    found = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in entries.items() if hasattr(v, "size")}
    dcp.load(found, checkpoint_id=dist / "release", no_dist=True)
    wanted = tensors(gqa)
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        q, k, v = (wanted[f"{prefix}self_attn.{name}_proj.weight"].view(4, -1, 6, 40) for name in "qkv")
        assert torch.equal(found["decoder.layers.self_attention.linear_qkv.weight"][layer].view(4, 4, 6, 40),
                           torch.cat([q, k, v], 1))  # fmt: skip
        fc1 = torch.cat([wanted[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")])
        assert torch.equal(found["decoder.layers.mlp.linear_fc1.weight"][layer], fc1)
        norm = wanted[f"{prefix}post_attention_layernorm.weight"]
        assert torch.equal(found["decoder.layers.mlp.linear_fc1.layer_norm_weight"][layer], norm)
    assert torch.equal(found["embedding.word_embeddings.weight"][:101], wanted["model.embed_tokens.weight"])


def test_every_bit_pattern_survives(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "gqa", dtype=torch.bfloat16)
    content = (source / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    patterns = bytes(range(256)) * (len(content) // 256 + 1)  # infinities and NaNs of every payload among them
    (source / "model.safetensors").write_bytes(content[:header] + patterns[: len(content) - header])
    back = convert(convert(source, tmp_path / "megatron", tensor=4), tmp_path / "back", format="hf")
    assert_same_tensors(tensors(back), tensors(source))


def test_resharding_equals_converting_directly(llama: Path, tmp_path: Path) -> None:
    direct = convert(llama, tmp_path / "direct", tensor=4, pipeline=1)
    detour = convert(convert(llama, tmp_path / "first", tensor=2, pipeline=2), tmp_path / "detour", tensor=4)
    assert digests(detour) == digests(direct)


@pytest.fixture(scope="module")
def stock_differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Return the logit differences between GPTModel and LlamaForCausalLM by "shape tp pp", of one launch."""
    top = tmp_path_factory.mktemp("stock")
    jobs = {}
    for shape in SHAPES:
        source = make_llama(top / shape, shape)
        tokens = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(0))
        torch.save({"tokens": tokens, "logits": hf_logits(source, tokens)}, top / f"{shape}.pt")
        for tensor, pipeline in STOCK_LAYOUTS:
            name = f"{shape} {tensor} {pipeline}"
            target = convert(source, top / name.replace(" ", "-"), tensor=tensor, pipeline=pipeline)
            jobs[name] = {
                "checkpoint": str(target), "tensor": tensor, "pipeline": pipeline, "logits": str(top / f"{shape}.pt"),
            }  # fmt: skip
    (top / "jobs.json").write_text(json.dumps(list(jobs.values())))
    case = {"name": "logits", "program": "gpt_model_worker", "words": ["jobs.json"], "ranks": 4}
    StockLoop(top).run_all([case])["logits"].ok()
    return dict(zip(jobs, json.loads((top / "jobs.results").read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("tensor,pipeline", STOCK_LAYOUTS)
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_stock_gpt_model_computes_what_hugging_face_computes(
    stock_differences: dict[str, float], shape: str, tensor: int, pipeline: int
) -> None:
    assert stock_differences[f"{shape} {tensor} {pipeline}"] < 1e-5


def test_evaluation_computes_the_exported_model_without_an_export(llama: Path, tmp_path: Path) -> None:
    shards = convert(llama, tmp_path / "m", tensor=2, pipeline=2)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits = build(open_checkpoint(shards), "fp32", "cpu")(tokens).logits
    assert torch.allclose(logits, hf_logits(llama, tokens), atol=1e-5)


def test_sharded_safetensors_in_and_out(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "gqa", max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    files, texts = hf_output(open_checkpoint(source), SaveOptions(), shard_bytes=50_000)
    write_files(files, texts, tmp_path / "out", False, Path.is_dir, World())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(files) > 3
    assert_same_tensors(tensors(tmp_path / "out"), tensors(source))
    tokens = torch.arange(20)[None]
    assert torch.equal(hf_logits(source, tokens), hf_logits(tmp_path / "out", tokens))


def test_pytorch_bin_is_read(gqa: Path, tmp_path: Path) -> None:
    source = make_llama(tmp_path / "bin", "gqa")
    as_bin(source, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    assert_same_tensors(tensors(convert(source, tmp_path / "out", format="hf")), tensors(gqa))


def test_tokenizer_and_config_travel(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "llama3")
    (source / "tokenizer.model").write_bytes(b"\x00tokens")
    (source / "tokenizer_config.json").write_text("{}")
    set_config(eos_token_id=[7, 8])(source)
    back = convert(convert(source, tmp_path / "m", tensor=2), tmp_path / "back", format="hf")
    assert (back / "tokenizer.model").read_bytes() == b"\x00tokens"
    assert (back / "tokenizer_config.json").read_text() == "{}"
    wanted, found = AutoConfig.from_pretrained(source), AutoConfig.from_pretrained(back)
    ignored = {"_name_or_path", "transformers_version"}
    assert {k: v for k, v in wanted.to_dict().items() if k not in ignored} == {
        k: v for k, v in found.to_dict().items() if k not in ignored
    }


def test_a_tokenizer_of_transformers_5_is_spelled_for_4_too(gqa: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(gqa, source)
    shutil.copy(ROOT / "assets/tiny-llama/tokenizer.json", source)
    PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), eos_token="</s>", additional_special_tokens=["<|im_start|>"]
    ).save_pretrained(source)
    assert json.loads((source / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    back = convert(convert(source, tmp_path / "m"), tmp_path / "back", format="hf")
    spelled = json.loads((back / "tokenizer_config.json").read_text())
    assert spelled["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in spelled
    config = json.loads((back / "config.json").read_text())
    assert not {"_name_or_path", "transformers_version"} & config.keys()
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, back))
    text = "One <|im_start|> two</s>"
    assert before(text)["input_ids"] == after(text)["input_ids"]
    assert sorted(before.all_special_tokens) == sorted(after.all_special_tokens) == ["</s>", "<|im_start|>"]


@pytest.mark.parametrize("divisor,tensor,padded", [(128, 1, 128), (128, 4, 512), (1, 2, 102), (7, 4, 112)])
def test_vocabulary_is_padded_and_unpadded(gqa: Path, tmp_path: Path, divisor: int, tensor: int, padded: int) -> None:
    target = convert(gqa, tmp_path / "m", layout=Layout(tensor, 1, divisor))
    rows = 0
    for path in sorted((target / "release").glob("*/model_optim_rng.pt")):
        content = load_whole(path)
        rows += len(content["model"]["embedding.word_embeddings.weight"])
        assert content["args"].padded_vocab_size == padded
    assert rows == padded
    assert len(tensors(convert(target, tmp_path / "hf", format="hf"))["lm_head.weight"]) == 101


@pytest.mark.parametrize("dtype,kind", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_dtype_is_cast_as_torch_casts(gqa: Path, tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    wanted, found = tensors(gqa), tensors(convert(gqa, tmp_path / "out", format="hf", dtype=dtype))
    assert all(torch.equal(wanted[key].to(kind), found[key]) for key in wanted)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == kind


def test_mixed_dtypes_keep_every_value(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "gqa", dtype=torch.bfloat16)
    state = load_file(source / "model.safetensors")
    state["model.layers.1.self_attn.k_proj.weight"] = torch.randn(24, 40)
    state["model.layers.2.mlp.up_proj.weight"] = torch.randn(72, 40).half()
    state["model.norm.weight"] = torch.randn(40)
    save_file(state, source / "model.safetensors")
    found = tensors(convert(convert(source, tmp_path / "m", tensor=2), tmp_path / "out", format="hf"))
    assert all(torch.equal(value.float(), found[key].float()) for key, value in state.items())


def test_layers_of_different_dtypes_pass_through_torch_dist(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "gqa")
    state = load_file(source / "model.safetensors")
    for key in ("model.layers.1.input_layernorm.weight", "model.layers.2.mlp.down_proj.weight"):
        state[key] = state[key].bfloat16()
    save_file(state, source / "model.safetensors")
    dist = convert(source, tmp_path / "dist", format="torch_dist")
    found = tensors(convert(dist, tmp_path / "out", format="hf"))
    assert all(torch.equal(value.float(), found[key].float()) for key, value in state.items())


def test_fp16_that_would_overflow_is_refused(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", "gqa")
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"][3] = 1e5
    save_file(state, source / "model.safetensors")
    with pytest.raises(ValueError, match="a weight of magnitude 1e\\+05 does not fit fp16"):
        convert(source, tmp_path / "out", format="hf", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_config_reads_both_spellings_of_transformers() -> None:
    old = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 100, "rope_theta": 5e5, "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }  # fmt: skip
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "dtype": "bfloat16"}
    assert config_from_hf(old, "old") == config_from_hf(new, "new")
    written = config_to_hf(config_from_hf(new, "new"), "bf16")
    assert config_from_hf(written, "written") == config_from_hf(old, "old")


@pytest.mark.parametrize("shape", ["mha", "llama3", "tied"])
def test_exported_config_says_what_transformers_and_vllm_read(tmp_path: Path, shape: str) -> None:
    source = make_llama(tmp_path / "hf", shape)
    exported = convert(convert(source, tmp_path / "m"), tmp_path / "out", format="hf")
    written = json.loads((exported / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["model_type"] == "llama"
    assert written["hidden_act"] == "silu"
    assert not any(written.get(name) for name in ("attention_bias", "mlp_bias", "bias"))
    for name in ("sliding_window", "quantization_config", "qkv_bias", "is_causal", "layer_types"):
        assert written.get(name) is None
    needed = {"rms_norm_eps", "max_position_embeddings", "head_dim", "num_key_value_heads", "tie_word_embeddings"}
    assert needed <= written.keys()
    # Older releases read the rotary settings under their old names, newer ones where transformers 5 puts them.
    wanted, found = (AutoConfig.from_pretrained(path).rope_parameters for path in (source, exported))
    scaling = written["rope_scaling"] or {"rope_type": "default"}
    assert scaling | {"rope_theta": written["rope_theta"]} == found == wanted


def test_source_is_never_changed(gqa: Path, tmp_path: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in gqa.iterdir()}
    convert(convert(gqa, tmp_path / "m", tensor=2), tmp_path / "hf", format="hf")
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in gqa.iterdir()}
    assert read_hf_config(tmp_path / "hf" / "config.json") == read_hf_config(gqa / "config.json")


@pytest.mark.parametrize(
    "source,flags,wanted",
    [
        ("hf", "", "hf"),
        ("torch", "", "torch"),
        ("torch_dist", "", "torch_dist"),
        ("hf", "--tensor-model-parallel-size 2", "torch"),
        ("hf", "--transformer-impl local", "torch"),
        ("torch_dist", "--pipeline-model-parallel-size 2", "torch_dist"),
        ("torch_dist", "--format hf", "hf"),
    ],
)
def test_the_format_is_the_sources_unless_another_is_asked_for(
    gqa: Path, tmp_path: Path, source: str, flags: str, wanted: str
) -> None:
    load = convert(gqa, tmp_path / "source", format=source)
    convert_main(["--load", str(load), "--save", str(tmp_path / "out"), *flags.split()])
    assert open_checkpoint(tmp_path / "out").format == wanted
