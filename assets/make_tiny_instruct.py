"""Makes a small Instruct model and conversations for it, to show the recovery of one on.

    python assets/make_tiny_instruct.py DIR    # DIR/model, DIR/train.jsonl and DIR/valid.jsonl

The model is assets/tiny-llama with a chat template. In the conversations a user asks for functions of Python's standard
library, one or more in a row, and the assistant writes them: nothing has to be fetched.
"""

import argparse
import ast
import itertools
import json
import shutil
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from make_tiny_llama import ROOT, TRAIN, VALID

TEMPLATE = """\
{% for m in messages %}<|{{ m['role'] }}|>
{{ m['content'] }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
LONGEST = 400  # characters of a function
TURNS = (1, 2, 3)  # questions of a conversation, by turns


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the model and the conversations; `arguments` is the command line without the program's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where they are made")
    folder = parser.parse_args(arguments).folder
    shutil.copytree(ROOT / "assets" / "tiny-llama", folder / "model", dirs_exist_ok=True)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    for name, modules in (("train", TRAIN), ("valid", VALID)):
        records = list(conversations(modules))
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        print(f"{folder / name}.jsonl: {len(records):,} conversations")


def conversations(modules: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yields conversations about the short functions of modules, which are named by folder; every other has a system
    prompt."""
    library, turns = Path(sysconfig.get_path("stdlib")), itertools.cycle(TURNS)
    number = 0
    for package, stems in modules.items():
        for stem in stems.split():
            path = library / package / f"{stem}.py"
            functions = list(short_functions(path)) if path.is_file() else []
            while functions:
                asked, functions = functions[: (count := next(turns))], functions[count:]
                messages = [{"role": "system", "content": "You write Python."}] if number % 2 else []
                for name, source in asked:
                    messages.append({"role": "user", "content": f"Write {name} of {stem}."})
                    messages.append({"role": "assistant", "content": source})
                number += 1
                yield {"messages": messages}


def short_functions(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and the source of each function of a module that is short and not inside of another."""
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and (source := ast.get_source_segment(text, node)):
            if len(source) <= LONGEST:
                yield node.name, source


if __name__ == "__main__":
    main()
