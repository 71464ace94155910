"""What is exported is loaded by other releases of transformers, and they write the tokens that this one does.

Not part of the suite: `pytest -m consumers`. CONSUMERS names a folder with a folder of packages for each, made by

    python -m pip install --no-deps --target $CONSUMERS/transformers-4.46 transformers==4.46.3 "tokenizers<0.21" \
        "huggingface_hub<1"
    python -m pip install --no-deps --target $CONSUMERS/transformers-4.57 transformers==4.57.6 "tokenizers<0.23" \
        "huggingface_hub<1"
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT
from helpers import convert, prune
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.consumers, pytest.mark.slow]
RELEASES = ("4.46", "4.57")
PROMPT, TOKENS = "def main(", 32
LOADER = """
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


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> Path:
    """Return the folder of a release of transformers."""
    folder = Path(os.environ.get("CONSUMERS", "none")) / f"transformers-{request.param}"
    if not (folder / "transformers").is_dir():
        pytest.skip(f"CONSUMERS has no transformers-{request.param}: this file says how it is made")
    return folder


@pytest.mark.parametrize("cut", ["", "--hidden-size-remain=128 --ffn-hidden-size-remain=256 --drop-layers=3"])
def test_another_transformers_gives_the_same_tokens(release: Path, tmp_path: Path, cut: str) -> None:
    source = ROOT / "assets/tiny-llama"
    if cut:
        source = prune(source, tmp_path / "pruned", *cut.split())
    exported = convert(convert(source, tmp_path / "shards", tensor=2), tmp_path / "hf", format="hf")
    AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path / "tokenizer")  # as transformers 5 spells it
    for file in (tmp_path / "tokenizer").iterdir():
        (exported / file.name).write_bytes(file.read_bytes())
    exported = convert(exported, tmp_path / "again", format="hf")
    given = AutoTokenizer.from_pretrained(exported)(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    wanted = model.generate(given, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
    found = json.loads(
        subprocess.run(
            [sys.executable, "-c", LOADER, str(exported), PROMPT, str(TOKENS)],
            env={**os.environ, "PYTHONPATH": str(release)}, stdout=subprocess.PIPE, check=True, text=True,
        ).stdout.splitlines()[-1]
    )  # fmt: skip
    assert found["version"].startswith(release.name.partition("-")[2])
    assert found["tokens"] == wanted and len(wanted) > given.shape[1]
