"""A teacher that is recorded once, and learned from in any layout: held against the teacher that reads along."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import convert, digests, make_llama, write_documents
from safetensors.numpy import load_file, save_file
from stock_loop import Run, StockLoop

from megatron.pruning.model.layout import Layout
from megatron.pruning.training.teacher_cache import Facts, TeacherCache

pytestmark = pytest.mark.slow

VOCABULARY, SEQUENCE, STEPS, BATCH, K = 101, 32, 3, 4, 8
TRAINING = (
    f"--train-data-path data --valid-data-path data --tokenizer-type NullTokenizer --seq-length {SEQUENCE} "
    f"--global-batch-size {BATCH} --lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --eval-iters 0 "
    f"--log-interval 1 --train-iters {STEPS}"
)
LAYOUTS = {"tp1": (1, 1, 1), "tp2": (2, 1, 1), "pp2": (1, 2, 1), "dp2": (1, 1, 2), "tp2-pp2": (2, 2, 1)}
LEARNED = ("tp1", "tp2", "pp2", "dp2")
WHOLE = f"--kd-top-k {VOCABULARY} --kd-dtype fp32"


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> StockLoop:
    """Make the stock loop in a folder with a text, a student and a teacher."""
    loop = StockLoop(tmp_path_factory.mktemp("recorded"))
    draw = np.random.default_rng(0)
    write_documents(loop.folder / "data", *(draw.integers(0, VOCABULARY - 1, 50) for _ in range(12)))
    for name, variant, layers in (("student", "mha", 2), ("teacher", "llama3", 4)):
        hf = make_llama(loop.folder / f"{name}-hf", variant, layers=layers, vocab=VOCABULARY)
        convert(hf, loop.folder / name, format="torch_dist", layout=Layout(1, 1, 32))
    return loop


def case(loop: StockLoop, name: str, model: str, layout: str, flags: str, micro_batch: int = 1) -> dict[str, Any]:
    """Return one run of the stock loop with the student or the teacher as its model."""
    tensor, pipeline, copies = LAYOUTS[layout]
    words = (loop.folder / model / "megatron_args.txt").read_text()
    words += f" --pretrained-checkpoint {model} --tensor-model-parallel-size {tensor}"
    words += f" --pipeline-model-parallel-size {pipeline} --micro-batch-size {micro_batch} {TRAINING}"
    words += f" --data-cache-path cache/{name} {flags}"
    return {"name": name, "words": words.split(), "ranks": tensor * pipeline * copies}


def record(loop: StockLoop, name: str, layout: str, flags: str, micro_batch: int = 1) -> dict[str, Any]:
    """Return a run that records the teacher."""
    return case(loop, f"record-{name}", "teacher", layout, f"--kd-save {name} {flags}", micro_batch)


@pytest.fixture(scope="module")
def recorded(loop: StockLoop) -> dict[str, Run]:
    """Record the teacher in some layouts."""
    return loop.run_all(
        [
            record(loop, "whole", "tp1", WHOLE, 2),
            record(loop, "whole-tp2-pp2", "tp2-pp2", WHOLE),
            record(loop, "few", "dp2", f"--kd-top-k {K} --kd-temperature 2"),
        ]
    )


@pytest.fixture(scope="module")
def trained(loop: StockLoop, recorded: dict[str, Run]) -> dict[str, Run]:
    """Train from the recorded teacher and beside the one that reads along."""
    for run in recorded.values():
        run.ok()
    cases = [case(loop, f"{layout}-whole", "student", layout, "--kd-load whole --kd-alpha 0.5") for layout in LEARNED]
    cases += [
        case(loop, "online", "student", "tp1", "--teacher-load teacher-hf --kd-alpha 0.5"),
        case(loop, "online-pp2", "student", "pp2", "--teacher-load teacher --kd-alpha 0.5"),
        case(loop, "online-warm", "student", "tp1", "--teacher-load teacher-hf --kd-temperature 2"),
        case(loop, "few", "student", "tp2", "--kd-load few"),
        case(loop, "few-again", "student", "pp2", "--kd-load few --micro-batch-size 2"),
    ]
    return loop.run_all(cases)


def test_whole_vocabulary_trains_as_the_teacher_that_reads_along(trained: dict[str, Run]) -> None:
    wanted = trained["online"].ok()
    for name in (*(f"{layout}-whole" for layout in LEARNED), "online-pp2"):
        found = trained[name].ok()
        for what in ("kd loss", "lm loss"):
            assert found.values(what) == pytest.approx(wanted.values(what), rel=1e-6), (name, what)
        assert found.values("grad norm") == pytest.approx(wanted.values("grad norm"), abs=1.1e-3)


def test_few_tokens_and_the_rest_are_never_above_the_whole_divergence(trained: dict[str, Run]) -> None:
    whole, few, again = (trained[name].ok().values("kd loss") for name in ("online-warm", "few", "few-again"))
    assert whole[1] * 0.3 < few[1] < whole[1]
    assert again == pytest.approx(few, rel=1e-5)
    assert few[STEPS] < few[1]


def test_resumes_and_is_done_once_it_is_done(loop: StockLoop, trained: dict[str, Run]) -> None:
    save = "--kd-load few --ckpt-format torch --save-interval 2 --save"
    runs = loop.run_all([case(loop, "unbroken", "student", "tp1", f"{save} unbroken")])
    again = {"resumed": "--ckpt-step 2", "done": ""}
    runs |= loop.run_all(
        [case(loop, name, "student", "tp1", f"{save} {name} --load unbroken {flags}") for name, flags in again.items()]
    )
    losses = {name: run.ok().values("kd loss") for name, run in runs.items()}
    assert losses["resumed"] == {STEPS: losses["unbroken"][STEPS]} and losses["done"] == {}


def test_every_layout_records_the_same(loop: StockLoop, recorded: dict[str, Run]) -> None:
    folders = [loop.folder / name for name in ("whole", "whole-tp2-pp2")]
    names = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] and len(names[0]) == STEPS * BATCH + 1, names
    assert digests(folders[0])["teacher.json"] == digests(folders[1])["teacher.json"]
    for name in names[0][:-1]:
        one, other = (load_file(folder / name) for folder in folders)
        assert (one["digest"] == other["digest"]).all()
        np.testing.assert_allclose(one["log_probs"], other["log_probs"], atol=2e-5)
        assert (one["tokens"] == other["tokens"]).mean() > 0.99, "but for ties"


def test_recording_goes_on_where_it_was_killed(loop: StockLoop, recorded: dict[str, Run]) -> None:
    whole, part = loop.folder / "few", loop.folder / "part"
    shutil.copytree(whole, part)
    files = sorted(part.glob("samples-*"))
    files[1].unlink()
    kept = files[0].stat().st_mtime_ns
    refused = loop.run_all([case(loop, "early", "student", "tp1", "--kd-load part")])["early"]
    assert f"--kd-load part: 1 of its {len(files)} files are not there: record the rest first" in refused.error
    again = record(loop, "part", "dp2", f"--kd-top-k {K} --kd-temperature 2")
    # Nothing is trained, and the samples of a text may be counted, too.
    words = " ".join(again["words"]).replace("--lr 1e-3 ", "")
    again["words"] = words.replace(f"--train-iters {STEPS}", f"--train-samples {BATCH * STEPS}").split()
    loop.run_all([again])["record-part"].ok()
    assert digests(part) == digests(whole)
    assert files[0].stat().st_mtime_ns == kept, "what was there was recorded again"
    assert files[1].stat().st_mode == (part / "teacher.json").stat().st_mode, "as readable as any file"


def test_mistakes_are_refused_in_one_sentence(loop: StockLoop, recorded: dict[str, Run]) -> None:
    damaged, hostile = loop.folder / "damaged", loop.folder / "hostile"
    shutil.copytree(loop.folder / "few", damaged)
    file = min(damaged.glob("samples-*"))
    file.write_bytes(file.read_bytes()[:-5])
    shutil.copytree(loop.folder / "few", hostile)
    first = min(hostile.glob("samples-*"))
    save_file({**load_file(first), "tokens": np.full_like(load_file(first)["tokens"], 65535)}, first)
    said = json.loads((hostile / "teacher.json").read_text())
    lying = loop.folder / "lying"
    lying.mkdir()
    (lying / "teacher.json").write_text(json.dumps({**said, "samples": 2**60}))
    write_documents(loop.folder / "other", np.arange(600) % 97)
    learn = {
        "--kd-load nowhere": "--kd-load nowhere: there is no teacher.json in it: --kd-save records a teacher",
        "--kd-load few --kd-temperature 1": "--kd-load few: it was recorded with --kd-temperature 2.0, not 1.0",
        "--kd-load few --seq-length 16": "--kd-load few: it was recorded with sequence_length 32, and this run has 16",
        "--kd-load few --train-iters 9": f"--kd-load few: it has {BATCH * STEPS} samples, and this training reads 36",
        "--kd-load few --seed 7": "sample 0 of few is of another text: the training must have the data, the order,",
        "--kd-load few --train-data-path other": "sample 0 of few is of another text: the training must have the data",
        "--kd-load damaged": f"damaged/{file.name} is damaged: Error while deserializing header",
        "--kd-load hostile": f"hostile/{first.name} is damaged: its numbers are no answers",
        "--kd-load lying": "--kd-load lying: lying/teacher.json is damaged: it says",
        "--kd-load few --teacher-load teacher-hf": "--teacher-load and --kd-load cannot be combined: leave one of them",
        "--kd-load few --kd-top-k 4": "--kd-top-k needs --kd-save",
    }
    save = {
        f"--kd-save few --kd-top-k {K}": "--kd-save few: it was begun with temperature 2.0, and this run has 1.0",
        "--kd-save data.idx": "--kd-save data.idx: it is no folder of --kd-save: there is no teacher.json in it",
        "--kd-save new --kd-top-k 0": "--kd-top-k 0 must be 1 or more",
        "--kd-save new --kd-alpha 0.5": "--kd-alpha needs a teacher: give --teacher-load or --kd-load",
    }
    cases = [
        (case(loop, f"mistake-{model}{number}", model, "tp1", flags), sentence)
        for model, kind in (("student", learn), ("teacher", save))
        for number, (flags, sentence) in enumerate(kind.items())
    ]
    stages = "--num-layers-per-virtual-pipeline-stage 1 --kd-save new"
    cases.append((case(loop, "mistake-virtual", "teacher", "pp2", stages), "leave context parallelism and the virtual"))
    runs = loop.run_all([each for each, _ in cases])
    for each, sentence in cases:
        found = runs[each["name"]]
        assert found.code == 1 and sentence in found.error, (each["words"][-6:], found.log[-1500:])
        assert "Traceback" not in found.log
    assert not (loop.folder / "new").exists()


def test_what_found_no_room_may_be_recorded_with_less(tmp_path: Path) -> None:
    """Nothing but teacher.json is there then; with a file, another K is another recording."""
    asked: dict[str, Any] = {"teacher": "0", "vocab_size": 101, "sequence_length": 4, "samples": 2, "temperature": 1.0}
    asked |= {"dtype": "fp16", "reset_position_ids": False, "reset_attention_mask": False, "documents_apart": False}
    for k in (64, 8):
        cache = TeacherCache.create(tmp_path / "answers", Facts(top_k=k, **asked))
    assert TeacherCache.create(tmp_path / "answers", cache.facts).facts.top_k == 8
    answers = np.zeros((2, 4, 8)), np.zeros((2, 4, 8), dtype=int), np.zeros((2, 4))
    cache.write(0, np.zeros((2, 4), dtype=int), *answers)
    with pytest.raises(ValueError, match="it was begun with top_k 8, and this run has 64"):
        TeacherCache.create(tmp_path / "answers", Facts(top_k=64, **asked))
