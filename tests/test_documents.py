"""Documents apart: conversations are packed whole and masked, and are computed as if each were alone, in any layout."""

import itertools
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import convert, hf_logits, load_whole, make_llama, write_documents
from stock_loop import Run, StockLoop

from megatron.pruning.model.layout import Layout

pytestmark = pytest.mark.slow

VOCABULARY, SEQUENCE, STEPS, SAVED, KILLED = 100, 32, 6, 2, 3
TRAINING = (
    f"--tokenizer-type NullTokenizer --seq-length {SEQUENCE} --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 "
    f"--train-iters {STEPS} --lr-decay-style cosine --clip-grad 1.0 --log-interval 1 --eval-iters 0 --weight-decay 0 "
    f"--save-interval {SAVED} --calculate-per-token-loss --data-cache-path cache --ckpt-format torch"
)
Document = tuple[np.ndarray, np.ndarray]  # tokens, and 1 for those that count


def conversations(seed: int, count: int, longest: int = SEQUENCE) -> list[Document]:
    """Draw conversations of random length, of which about half of the tokens count."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(5, longest + 1, size=count)
    masks = [np.append(draw.integers(0, 2, size=length - 1), 1) for length in lengths]
    return [(draw.integers(0, VOCABULARY, size=len(mask)), mask.astype(np.uint8)) for mask in masks]


def write_masked(prefix: Path, documents: list[Document]) -> None:
    """Write conversations as tools/preprocess_data.py does."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    write_documents(prefix, *(tokens for tokens, _ in documents))
    builder = IndexedDatasetBuilder(f"{prefix}_mask.bin", dtype=np.uint8)
    for _, mask in documents:
        builder.add_document(mask, [len(mask)])
    builder.finalize(f"{prefix}_mask.idx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in both formats, and with conversations and a text."""
    path = tmp_path_factory.mktemp("documents")
    make_llama(path / "hf", "gqa", layers=4, vocab=VOCABULARY)
    convert(path / "hf", path / "model", layout=Layout(1, 1, 1))
    write_masked(path / "chat", conversations(0, 40))
    draw = np.random.default_rng(1)
    write_documents(path / "web", *(draw.integers(0, VOCABULARY, size=n) for n in draw.integers(20, 200, size=30)))
    return path


@pytest.fixture(scope="module")
def loop(folder: Path) -> StockLoop:
    return StockLoop(folder)


def words(folder: Path, more: str) -> str:
    flags = (folder / "model/megatron_args.txt").read_text()
    return f"{flags} {TRAINING} --pretrained-checkpoint model {more}"


def losses_alone(folder: Path, documents: list[Document]) -> tuple[float, int]:
    """Return the summed loss of the tokens that count and their number; transformers reads each conversation alone."""
    total, count = 0.0, 0
    for tokens, mask in documents:
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        losses = torch.nn.functional.cross_entropy(
            hf_logits(folder / "hf", ids[:, :-1])[0].double(), ids[0, 1:], reduction="none"
        )
        total += float(losses @ torch.from_numpy(mask[1:]).double())
        count += int(mask[1:].sum())
    return total, count


# The data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 2, 7, 32, 400])
def test_packing_takes_every_token_once_and_cuts_only_what_is_too_long(room: int) -> None:
    from megatron.pruning.training.documents import pack

    lengths = np.random.default_rng(room).integers(1, 60, size=200)
    begins = np.concatenate([[0], np.cumsum(lengths)])
    starts = [int(begins[document]) + offset for document, offset in pack(lengths.astype(np.int32), room)]
    assert starts[0] == 0 and max(np.diff([*starts, begins[-1]])) <= room and min(np.diff(starts)) > 0
    cut = set(starts) - set(begins.tolist())
    within = {
        at for start, length in zip(begins, lengths, strict=False) for at in range(start + room, start + length, room)
    }
    assert cut == within


def dataset(prefix: Path, samples: int | None, **config: Any) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from megatron.pruning.training.documents import TextDataset

    tokenizer = Namespace(eod=7, pad=3, vocab_size=VOCABULARY, unique_identifiers={}, special_tokens_dict={})
    settings = GPTDatasetConfig(
        random_seed=1234, sequence_length=SEQUENCE, blend=([str(prefix)], None), split="1", tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        inter_document_masking=True, path_to_cache=str(prefix.parent / "cache"), **config,
    )  # fmt: skip
    text = IndexedDataset(str(prefix))
    return TextDataset(text, str(prefix), np.arange(len(text)), samples, Split.train, settings)


def test_a_sample_is_whole_conversations_with_their_masks_and_each_comes_once_an_epoch(tmp_path: Path) -> None:
    documents = conversations(3, 50)
    write_masked(tmp_path / "chat", documents)
    known = {tokens.tobytes(): mask for tokens, mask in documents}
    one, two = dataset(tmp_path / "chat", None), dataset(tmp_path / "chat", 60)
    assert len(one) < 60 <= len(two)
    for data in (one, two):
        seen: list[bytes] = []
        for number in range(len(data)):
            sample = data[number]
            begins = sorted(set(sample["cu_seqlens"].tolist()))
            for start, stop in itertools.pairwise(begins):
                tokens, labels = (sample[name][start:stop].numpy() for name in ("tokens", "labels"))
                sizes = [n for n in range(1, stop - start + 1) if tokens[:n].astype(np.int64).tobytes() in known]
                (size,) = sizes or [0]  # what follows the last one is padding
                whole = tokens[:size].astype(np.int64).tobytes()
                assert labels[: size - 1].tolist() == tokens[1:size].tolist()
                assert sample["loss_mask"][start : start + size - 1].tolist() == known[whole][1:].tolist()
                assert not sample["loss_mask"][start + size - 1 : stop].any()
                assert sample["position_ids"][start:stop].tolist() == list(range(stop - start))
                seen.append(whole)
        epochs = len(seen) / len(known)
        assert epochs == (1 if data is one else round(epochs)) and set(seen) == set(known)
    assert not data[None]["loss_mask"].any()


def test_a_conversation_longer_than_the_sequence_goes_on_in_the_next(tmp_path: Path) -> None:
    documents = conversations(4, 30, longest=3 * SEQUENCE)
    write_masked(tmp_path / "chat", documents)
    data = dataset(tmp_path / "chat", None)
    counted = sum(int(data[number]["loss_mask"].sum()) for number in range(len(data)))
    assert counted == sum(int(mask[1:].sum()) for _, mask in documents)


# The training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder: Path, loop: StockLoop) -> Run:
    """A run over conversations in one process."""
    return loop.run("whole", words(folder, "--train-data-path chat --save whole")).ok()


def test_packed_loss_is_that_of_the_conversations_alone(folder: Path, loop: StockLoop) -> None:
    """All of them are in the first step, in the stock loop, beside transformers that reads each alone."""
    documents = conversations(5, 9)
    write_masked(folder / "few", documents)
    samples = len(dataset(folder / "few", None))
    more = f"--train-data-path few --train-iters 1 --micro-batch-size 1 --global-batch-size {samples}"
    run = loop.run("few", words(folder, more)).ok()
    total, count = losses_alone(folder, documents)
    assert run.losses[1] == pytest.approx(total / count, rel=1e-6)
    assert "note: few has a mask: no token attends to another document" in run.log


def test_masked_tokens_give_no_gradient(folder: Path, loop: StockLoop) -> None:
    """Other words of a user, at the end where no word that counts can see them, change no bit of what is learned."""
    draw = np.random.default_rng(6)
    documents = conversations(6, 40, longest=SEQUENCE - 4)
    states, cases = {}, []
    for name in ("one", "other"):
        ends = [
            (np.append(tokens, draw.integers(0, VOCABULARY, 4)), np.append(mask, [0] * 4)) for tokens, mask in documents
        ]
        write_masked(folder / name, [(tokens, mask.astype(np.uint8)) for tokens, mask in ends])
        more = words(folder, f"--train-data-path {name} --save saved_{name}")
        cases.append({"name": name, "words": more.split(), "ranks": 1})
    runs = loop.run_all(cases)
    for name in runs:
        runs[name].ok()
        file = folder / f"saved_{name}" / f"iter_{STEPS:07d}" / "mp_rank_00/model_optim_rng.pt"
        states[name] = load_whole(file)["model"]
    assert runs["one"].losses == runs["other"].losses and len(runs["one"].losses) == STEPS
    assert (folder / "one.bin").read_bytes() != (folder / "other.bin").read_bytes()
    for name, value in states["one"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states["other"][name]), name


LAYOUTS = {
    "tensor": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "pipeline": ("--pipeline-model-parallel-size 4", 4),  # with stages in the middle
    "virtual": ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", 2),
    "data": ("", 2),
}


@pytest.fixture(scope="module")
def layouts(folder: Path, loop: StockLoop) -> dict[str, Run]:
    """A run over the same conversations in every layout."""
    convert(folder / "hf", folder / "virtual", format="torch_dist", layout=Layout(1, 1, 1))
    convert(folder / "hf", folder / "tensor", layout=Layout(2, 1, 1))
    convert(folder / "hf", folder / "pipeline", layout=Layout(1, 4, 1))
    cases = []
    for name, (flags, ranks) in LAYOUTS.items():
        more = f"--train-data-path chat {flags} --pretrained-checkpoint {'model' if name == 'data' else name}"
        format = " --ckpt-format torch_dist" * (name == "virtual")
        cases.append({"name": name, "words": words(folder, more + format).split(), "ranks": ranks})
    return loop.run_all(cases)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(layout: str, layouts: dict[str, Run], whole: Run) -> None:
    run = layouts[layout].ok()
    assert run.losses == pytest.approx(whole.losses, abs=2e-4) and len(run.losses) == STEPS


def test_a_killed_blend_of_text_and_conversations_goes_on_bit_for_bit(folder: Path, loop: StockLoop) -> None:
    blend = "--train-data-path 0.7 web 0.3 chat --valid-data-path chat --eval-iters 1 --eval-interval 4"
    entire = loop.run("entire", words(folder, f"{blend} --save entire --load entire")).ok()
    killed = loop.run("killed", words(folder, f"{blend} --save again --load again"), kill_after=KILLED)
    assert killed.code == -signal.SIGKILL
    again = loop.run("again", words(folder, f"{blend} --save again --load again")).ok()
    assert min(again.losses) == SAVED + 1 and max(again.losses) == STEPS
    assert {step: entire.losses[step] for step in range(SAVED + 3, STEPS + 1)} == {
        step: again.losses[step] for step in range(SAVED + 3, STEPS + 1)
    }
    files = [folder / name / f"iter_{STEPS:07d}" / "mp_rank_00/model_optim_rng.pt" for name in ("entire", "again")]
    one, other = (load_whole(file)["model"] for file in files)
    assert all(torch.equal(one[name], other[name]) for name in one if isinstance(one[name], torch.Tensor))
    assert entire.losses[STEPS] < entire.losses[1]


def test_a_teacher_reads_documents_apart_too(folder: Path, loop: StockLoop) -> None:
    """Itself it has nothing to teach; to another model it says the same in a pipeline, and when it was recorded."""
    convert(
        make_llama(folder / "student-hf", "gqa", layers=4, vocab=VOCABULARY, seed=5),
        folder / "student",
        layout=Layout(1, 1, 1),
    )
    data, pipeline = "--train-data-path chat --train-iters 2", "--pipeline-model-parallel-size 2"
    student = f"{data} --pretrained-checkpoint student"
    keep = f"--kd-save answers --kd-top-k {VOCABULARY} --kd-dtype fp32"
    convert(folder / "student-hf", folder / "student-pp2", layout=Layout(1, 2, 1))
    cases = {
        "self": (f"{data} --teacher-load hf", 1),
        "record": (f"{data} {keep}", 1),
        "along": (f"{student} --teacher-load hf", 1),
        "pipeline": (f"{student}-pp2 --teacher-load hf {pipeline}", 2),
        "recorded": (f"{student} --kd-load answers", 1),
    }
    jobs = [
        {"name": f"teacher_{name}", "words": words(folder, more).split(), "ranks": ranks}
        for name, (more, ranks) in cases.items()
    ]
    runs = loop.run_all(jobs[:2]) | loop.run_all(jobs[2:])
    found = {name: runs[f"teacher_{name}"].ok().values("kd loss") for name in cases}
    assert found["self"].get(1, 0.0) < 1e-6
    assert found["along"][2] > 0.01
    for name in ("pipeline", "recorded"):
        assert found[name] == pytest.approx(found["along"], rel=1e-5), name


def test_transformer_engines_attention_keeps_documents_apart(folder: Path, whole: Run) -> None:
    engine = StockLoop(folder, te=True)
    run = engine.run("te", words(folder, "--train-data-path chat --transformer-impl transformer_engine"), gpu=True).ok()
    assert run.losses == pytest.approx(whole.losses, abs=2e-4) and len(run.losses) == STEPS


# What does not fit ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_sentence(folder: Path, loop: StockLoop) -> None:
    write_masked(folder / "short", conversations(0, 40))
    write_masked(folder / "odd", [(tokens, mask + 1) for tokens, mask in conversations(0, 40)])
    write_masked(folder / "half", conversations(0, 40))
    write_masked(folder / "long", conversations(7, 40, longest=99))
    (folder / "half_mask.bin").unlink()
    write_masked(folder / "fewer", conversations(5, 9))
    for suffix in ("bin", "idx"):
        (folder / f"short_mask.{suffix}").write_bytes((folder / f"fewer_mask.{suffix}").read_bytes())
    cases = {
        "--train-data-path short": "short: short_mask is no mask of it: 9 documents with ",
        "--train-data-path odd": "odd: odd_mask holds 2, and a mask has nothing but 0 and 1",
        "--train-data-path half": "half_mask: there is no half_mask.bin",
        "--train-data-path chat --sft": "--sft: conversations are learned from token files here: make them with tools/",
        "--train-data-path chat --spec megatron.pruning.training.local_layers unfused_layers": (
            "--spec cannot be combined with documents that are kept apart (chat has a mask): leave it out"
        ),
    }
    done = loop.run_all(
        [{"name": f"{i}", "words": words(folder, more).split(), "ranks": 1} for i, more in enumerate(cases)]
    )
    for number, sentence in enumerate(cases.values()):
        assert done[f"{number}"].code == 1 and sentence in done[f"{number}"].error
        assert not done[f"{number}"].losses
    told = loop.run("told", words(folder, "--train-data-path long --train-iters 1")).ok()
    assert "of the 40 documents of long are longer than --seq-length 32 and go on in the next sequence, " in told.log
