"""The READMEs and the pages say the same in both languages, of things that exist, and every command in them works."""

import argparse
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from commands import ROOT, environment

from megatron.pruning.cli.flags import megatron_flags

# In this order the commands run: each page may use what those before it have made.
PAGES = (
    "convert",
    "prune",
    "recover",
    "choose",
    "reconstruct",
    "smollm2",
    "shapes",
    "compress",
    "performance",
    "clusters",
    "how-it-works",
    "extend",
)
CHINESE = {"README": ROOT / "README.md", **{page: ROOT / "docs" / "zh" / f"{page}.md" for page in PAGES}}
ENGLISH = {"README": ROOT / "README_EN.md", **{page: ROOT / "docs" / "en" / f"{page}.md" for page in PAGES}}
BOTH = [*CHINESE.values(), *ENGLISH.values()]
LARGEST_README = 8000  # bytes

# Commands that the test below does not run, and why.
RUN_ELSEWHERE = {
    "bash scripts/quickstart.sh": "it takes minutes, and continuous integration runs it",
    "bash scripts/test.sh": "continuous integration runs it",
}

# Flags of docker, of Slurm with pyxis and of apptainer.
OF_CONTAINERS = {"--rm", "--gpus", "--ipc", "--tag", "--nv"}
OF_CONTAINERS |= {"--nodes", "--container-image", "--container-mounts", "--container-workdir"}
# Variables that the hub's client reads.
OF_THE_HUB = {"HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE"}

LINK = r"!?\[[^\]]*\]\(([^)]+)\)"
CODE = r"`([^`\n]+)`"


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return [block.strip() for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]


def written(text: str) -> str:
    """Return a page without its generated tables."""
    return re.sub(r"\[\[\[cog .*?\[\[\[end\]\]\]", "", text, flags=re.DOTALL)


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


# Both languages -------------------------------------------------------------------------------------------------------


def test_both_languages_have_the_same_pages_in_the_order_of_the_readmes() -> None:
    for language, readme in (("zh", CHINESE["README"]), ("en", ENGLISH["README"])):
        assert {file.stem for file in (ROOT / "docs" / language).glob("*.md")} == set(PAGES)
        assert re.findall(rf"^\| \[.*?\]\(docs/{language}/(.+?)\.md\)", text_of(readme), re.MULTILINE) == [*PAGES]


SAME: dict[str, Callable[[str], object]] = {
    "commands that run": lambda text: blocks(text, "bash"),
    "commands that do not": lambda text: blocks(text, "sh"),
    "generated tables": lambda text: re.findall(r"\[\[\[cog (.*?)\]\]\]", text),
    "flags and names": lambda text: sorted(re.findall(CODE, text)),
    "links and figures": lambda text: sorted(
        link.replace("/zh/", "/en/") for link in re.findall(LINK, text) if "README" not in link
    ),
    "headings": lambda text: re.findall(r"^#+ ", text, re.MULTILINE),
    "rows of tables": lambda text: [row.count(" | ") for row in re.findall(r"^\|.*", text, re.MULTILINE)],
    "numbers": lambda text: sorted(re.findall(r"\b\d+\.\d{2,}\b", text, re.ASCII)),
}


@pytest.mark.parametrize("what", SAME)
@pytest.mark.parametrize("page", ENGLISH)
def test_both_languages_say_the_same(page: str, what: str) -> None:
    assert SAME[what](text_of(CHINESE[page])) == SAME[what](text_of(ENGLISH[page]))


@pytest.mark.parametrize("readme", [CHINESE["README"], ENGLISH["README"]], ids=name_of)
def test_a_readme_stays_small(readme: Path) -> None:
    assert readme.stat().st_size <= LARGEST_README


# What is named exists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", BOTH, ids=name_of)
def test_every_link_leads_somewhere(file: Path) -> None:
    links = [link for link in re.findall(LINK, text_of(file)) if "://" not in link]
    assert [link for link in links if not (file.parent / link).exists()] == []


@pytest.mark.parametrize("file", BOTH, ids=name_of)
def test_every_file_that_is_named_exists(file: Path) -> None:
    names = {word for code in re.findall(CODE, written(text_of(file))) for word in code.split()}
    folders = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name != "runs")
    assert [name for name in names if name.startswith(folders) and not (ROOT / name).exists()] == []
    assert [name for name in names if re.fullmatch(r"\w+\.py", name) and name not in modules()] == []


@functools.cache
def modules() -> set[str]:
    """The names of this project's files of Python."""
    files = list(ROOT.glob("*.py"))
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith("."):  # .venv has tens of thousands
            files += folder.rglob("*.py")
    return {file.name for file in files}


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag that a program here has, or Megatron or torchrun, with hyphens."""
    programs = [*ROOT.glob("*.py"), *(ROOT / "megatron").rglob("*.py")]
    programs += [*(ROOT / "tools").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    found = {flag for program in programs for flag in re.findall(r'"(--[a-z][a-z-]+)"', text_of(program))}
    scripts = {
        flag for script in (ROOT / "scripts").glob("*.sh") for flag in re.findall(r"(--[a-z-]+)\)", text_of(script))
    }
    return found | scripts | set(megatron_flags()) | {"--nproc-per-node", "--help"} | OF_CONTAINERS


@pytest.mark.parametrize("file", BOTH, ids=name_of)
def test_every_flag_that_is_named_is_one(file: Path, flags: set[str]) -> None:
    codes = re.findall(CODE, written(text_of(file)))
    named = {flag.replace("_", "-") for code in codes for flag in re.findall(r"--[a-z][a-z0-9_-]+", code)}
    assert named - flags == set()


@pytest.mark.parametrize("file", BOTH, ids=name_of)
def test_every_variable_that_is_set_is_read_by_a_script(file: Path) -> None:
    text = written(text_of(file))
    commands = "\n".join(blocks(text, "sh") + blocks(text, "bash"))
    named = {*re.findall(r"`([A-Z][A-Z_]+)`", text), *re.findall(r"\b([A-Z_]+)=", commands)}
    scripts = [*(ROOT / "scripts").rglob("*.sh"), *(ROOT / "tools" / "checkpoint_conversion").glob("*.sh")]
    read = {name for script in scripts for name in re.findall(r"\$\{([A-Z_]+)", text_of(script))}
    modules = (ROOT / "megatron").rglob("*.py")
    constants = {name for module in modules for name in re.findall(r"^([A-Z_]+)\b.* = ", text_of(module), re.MULTILINE)}
    assert named - read - constants - OF_THE_HUB == set()


# Generated tables -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that the pages generate their tables with."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("tables")


def a_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", metavar="PATH", help="what is read")
    group = parser.add_argument_group("sizes", "both are needed")
    group.add_argument("--wide", type=int, metavar="N", help="how wide")
    group.add_argument("--kind", choices=("a", "b"), help=argparse.SUPPRESS)
    return parser


TRANSLATED = {"PATH": "读什么", "sizes (both are needed)": "大小二者都要", "--wide": "多宽"}


def test_sections_of_translations_add_up_for_a_script(tables: ModuleType) -> None:
    first, second = ({name: text} for name, text in list(TRANSLATED.items())[:2])
    sections = {"a, b": first, "b": second, "c, b": {"--wide": "多宽"}, "c": {"--other": "另"}}
    assert tables.meanings("b", a_parser(), sections) == TRANSLATED


@pytest.mark.parametrize("name", TRANSLATED)
def test_what_has_no_translation_is_named(tables: ModuleType, name: str) -> None:
    left = {other: text for other, text in TRANSLATED.items() if other != name}
    with pytest.raises(ValueError, match="has no Chinese for these of b: " + re.escape(name)):
        tables.meanings("b", a_parser(), {"b": left})


@pytest.mark.parametrize("name", ["--gone", "--kind", "--help"])
def test_a_translation_of_what_help_does_not_list_is_named(tables: ModuleType, name: str) -> None:
    with pytest.raises(ValueError, match=f"translates what b has not, or has no more: {name}"):
        tables.meanings("b", a_parser(), {"b": {**TRANSLATED, name: "无"}})


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like a fresh clone, with the python that runs this test as its environment."""
    top = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv", "runs"):
            (top / path.name).symlink_to(path)
    (top / ".venv/bin").mkdir(parents=True)
    (top / ".venv/bin/activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    return top


@pytest.mark.timeout(1200)  # seconds: it trains twice, and programs that import Megatron start slowly
@pytest.mark.pages
@pytest.mark.slow
def test_every_command_runs_in_the_order_of_the_pages(fresh: Path) -> None:
    commands = [block for file in ENGLISH.values() for block in blocks(text_of(file), "bash")]
    assert set(RUN_ELSEWHERE) <= set(commands)
    text = "python assets/make_tiny_llama.py --data-only runs/data\n"
    assert sum(command.count(text) for command in commands) == 1
    # A tenth of it: tokenizing takes longer than training.
    less = f"{text}sed -i '31,$d' runs/data/train.jsonl; sed -i '9,$d' runs/data/valid.jsonl\n"
    commands = [command.replace(text, less) for command in commands]
    activate = "source .venv/bin/activate"
    assert f"`{activate}`" in text_of(ENGLISH["README"])
    script = "\n".join(["set -euo pipefail", activate, *(c for c in commands if c not in RUN_ELSEWHERE)])
    small = {"TRAIN_ITERS": "15", "EVAL_ITERS": "1", "EVAL_INTERVAL": "15", "SAVE_INTERVAL": "15", "SEQ_LENGTH": "32"}
    small["TP"] = "1"  # a start takes longer than fifteen steps: the quickstart trains by two ranks
    done = subprocess.run(["bash", "-xc", script], cwd=fresh, env=environment(**small), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    made = "parent parent-hf pruned pruned-7 narrow recovered distilled recovered-tp1 recovered-hf loss.png chosen half"
    made += " reconstructed pruned-reconstructed instruct/recovered-hf/chat_template.jinja"
    assert [name for name in made.split() if not (fresh / "runs" / name).exists()] == []


@pytest.mark.parametrize("file", ENGLISH.values(), ids=name_of)
def test_commands_that_do_not_run_here_are_of_this_project(file: Path, flags: set[str]) -> None:
    for block in blocks(text_of(file), "sh"):
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0
        assert [name for name in re.findall(r"[\w/]+\.(?:sh|py)\b", block) if not (ROOT / name).is_file()] == []
        assert {flag.replace("_", "-") for flag in re.findall(r" (--[a-z][a-z0-9_-]+)", block)} - flags == set()
