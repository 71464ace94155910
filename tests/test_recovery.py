"""A pruned checkpoint trains on in the stock loop: strictly loaded, from the exported model's own loss, downwards."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, check_model, started_by
from helpers import convert, hf_loss, make_llama, prune, write_repeated
from stock_loop import StockLoop

from megatron.pruning.model.layout import Layout

pytestmark = pytest.mark.slow

SEQUENCE = 32
PRUNED = ["--hidden-size-remain=32", "--num-attention-heads-remain=4", "--ffn-hidden-size-remain=40"]
SAMPLE = np.random.default_rng(0).integers(0, 128, SEQUENCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a parent and data in which every sample is the same, so that the first loss is known."""
    top = tmp_path_factory.mktemp("recovery")
    # No padded vocabulary: its logits would take part in Megatron's softmax and in no other.
    make_llama(top / "hf", "gqa", vocab=128)
    write_repeated(top / "data", SAMPLE, 200)
    return top


def exported_loss(checkpoint: Path) -> float:
    """Return the loss of the checkpoint as Hugging Face computes it, after an export."""
    exported = convert(checkpoint, checkpoint.with_name(f"{checkpoint.name}-hf"), format="hf")
    return hf_loss(exported, np.append(SAMPLE, SAMPLE[0]))


def test_check_model_trains_a_pruned_pipeline_and_resumes(folder: Path) -> None:
    pruned = prune(folder / "hf", folder / "pp2", *PRUNED, "--drop-layers=1,2", "--pipeline-model-parallel-size=2")
    settings = {
        "LOAD_PATH": pruned, "SAVE_PATH": folder / "pp2-trained", "DATA_PATH": folder / "data", "SPLIT": "100,0,0",
        "TOKENIZER_TYPE": "NullTokenizer", "TOKENIZER_MODEL": "none", "SEQ_LENGTH": SEQUENCE, "MICRO_BATCH_SIZE": 2,
        "GLOBAL_BATCH_SIZE": 4, "LR": 1e-2, "LR_WARMUP_ITERS": 1, "EVAL_ITERS": 0,
        "TRAIN_ITERS": 7,
    }  # fmt: skip
    launcher, words = check_model(folder, **settings)
    assert launcher == [*"-m torch.distributed.run --nproc_per_node 2 --nnodes 1 --standalone".split()]
    loop = StockLoop(folder)
    first = loop.run("first", " ".join([*words, "--exit-interval 5"]), ranks=2).ok().losses
    assert first[1] == pytest.approx(exported_loss(pruned), abs=1e-5)
    assert first[5] < first[1] - 0.5
    resumed = loop.run("resumed", " ".join(words), ranks=2).ok().losses
    assert sorted(resumed) == [6, 7] and resumed[6] < first[5]
    # What a later export needs has followed the weights.
    for name in ("huggingface/config.json", "prune_plan.json"):
        assert (folder / "pp2-trained" / name).read_bytes() == (pruned / name).read_bytes()
    assert exported_loss(folder / "pp2-trained") < resumed[7]


@pytest.mark.parametrize("gpus,text,processes", [(8, "text", 8), (8, "", 1), (0, "text", 1)])
def test_a_text_is_read_by_all_gpus(tmp_path: Path, gpus: int, text: str, processes: int) -> None:
    launcher, words = started_by("prune_llama.sh", "prune_llama.py", tmp_path, gpus, LOAD_PATH="x", DATA_PATH=text)
    started = int(launcher[launcher.index("--nproc_per_node") + 1]) if launcher else 1
    assert started == processes and ("--reconstruct" in words) == bool(text)


@pytest.mark.parametrize("flag", ["--context-parallel-size=4", "--context-parallel-size 4"])
def test_ranks_of_context_parallelism_are_no_copies(folder: Path, tmp_path: Path, flag: str) -> None:
    settings = {
        "LOAD_PATH": folder / "hf", "DATA_PATH": "text", "TOKENIZER_MODEL": "none", "SAVE_PATH": tmp_path / "new",
        "GLOBAL_BATCH_SIZE": 6, "MICRO_BATCH_SIZE": 2, "TP": 1,
    }  # fmt: skip
    launcher, words = check_model(tmp_path, 8, *flag.split(), **settings)
    assert launcher[launcher.index("--nproc_per_node") + 1] == "8"
    assert words[words.index("--micro-batch-size") + 1] == "2"
    with pytest.raises(ValueError, match="GLOBAL_BATCH_SIZE 3 is not a multiple of the 2 data-parallel copies"):
        check_model(tmp_path, 0, *flag.split(), **settings | {"GLOBAL_BATCH_SIZE": 3, "GPUS_PER_NODE": 8})


def test_texts_with_weights_may_stand_on_several_lines(folder: Path, tmp_path: Path) -> None:
    settings = {"LOAD_PATH": folder / "hf", "TOKENIZER_MODEL": "none", "SAVE_PATH": tmp_path / "new"}
    _, words = check_model(tmp_path, **settings, DATA_PATH="\n  0.7 a\n  0.3 b\n", VALID_DATA_PATH="c")
    at = words.index("--train-data-path")
    assert words[at : at + 5] == ["--train-data-path", "0.7", "a", "0.3", "b"]


@pytest.mark.parametrize(
    "gpus,nodes,layout,batch,started",
    [
        (8, 4, (8, 4), 4, 8),  # a model larger than a machine
        (8, 4, (8, 2), 4, 8),  # two copies, each on two machines
        (8, 2, (2, 1), 6, 6),  # as many copies as the batch divides into
        (8, 1, (2, 1), 8, 8),
        (8, 3, (8, 2), 4, "the 16 model ranks of .* do not divide over 3 machines"),
        (8, 1, (8, 2), 4, "cut for 16 model ranks, but there are 8 processes"),
    ],
)
def test_check_model_starts_what_the_gpus_of_all_machines_have_room_for(
    gpus: int, nodes: int, layout: tuple[int, int], batch: int, started: int | str, folder: Path, tmp_path: Path
) -> None:
    settings = {
        "LOAD_PATH": folder / "hf-torch", "DATA_PATH": "text", "TOKENIZER_MODEL": "none", "GLOBAL_BATCH_SIZE": batch,
        "TP": layout[0], "PP": layout[1], "NNODES": nodes, "SAVE_PATH": tmp_path / "new",
    }  # fmt: skip
    if not settings["LOAD_PATH"].exists():
        convert(folder / "hf", settings["LOAD_PATH"])
    if isinstance(started, str):
        with pytest.raises(ValueError, match=started):
            check_model(tmp_path, gpus, **settings)
    else:
        launcher, words = check_model(tmp_path, gpus, **settings)
        assert launcher[launcher.index("--nproc_per_node") + 1] == str(started)
        assert "--cross-entropy-loss-fusion --ckpt-format torch_dist --sequence-parallel --bf16" in " ".join(words)
        assert "--use-distributed-optimizer" not in words, "without a fused Adam it cannot resume"


@pytest.mark.parametrize("given,there", [("auto", True), ("0", False)])
def test_check_model_spreads_the_optimizer_where_it_can_resume(
    given: str, there: bool, folder: Path, tmp_path: Path
) -> None:
    settings = {
        "LOAD_PATH": folder / "hf-torch", "DATA_PATH": "text", "TOKENIZER_MODEL": "none", "GLOBAL_BATCH_SIZE": 8,
        "SAVE_PATH": tmp_path / "new", "PYTHONPATH": ROOT / "tests/te_stand_in", "DISTRIBUTED_OPTIMIZER": given,
    }  # fmt: skip
    if not settings["LOAD_PATH"].exists():
        convert(folder / "hf", settings["LOAD_PATH"])
    _, words = check_model(tmp_path, 8, **settings)
    flags = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    assert (flags in " ".join(words)) is there and "--sequence-parallel" not in words


@pytest.mark.parametrize(
    "gpus,dtype,flags",
    [(0, "", set()), (8, "", {"--bf16"}), (8, "fp16", {"--fp16"}), (8, "fp32", set()), (0, "bf16", {"--bf16"})],
)
def test_check_model_trains_in_the_dtype_that_is_asked_for(
    gpus: int, dtype: str, flags: set[str], folder: Path, tmp_path: Path
) -> None:
    settings = {"LOAD_PATH": folder / "hf", "DATA_PATH": "text", "TOKENIZER_MODEL": "none", "DTYPE": dtype}
    _, words = check_model(tmp_path, gpus, **settings, SAVE_PATH=tmp_path / "new")
    assert {"--bf16", "--fp16"} & {*words} == flags
    with pytest.raises(ValueError, match="DTYPE half is none of bf16, fp16 and fp32"):
        check_model(tmp_path, **{**settings, "DTYPE": "half"}, SAVE_PATH=tmp_path / "new")


@pytest.mark.parametrize("given,there", [({}, ["new/tensorboard"]), ({"TENSORBOARD_PATH": ""}, [])])
def test_check_model_writes_curves_unless_they_are_to_go_nowhere(
    given: dict[str, str], there: list[str], folder: Path, tmp_path: Path
) -> None:
    settings = {"LOAD_PATH": folder / "hf", "DATA_PATH": "text", "TOKENIZER_MODEL": "none", **given}
    _, words = check_model(tmp_path, **settings, SAVE_PATH=tmp_path / "new")
    after = [word for flag, word in itertools.pairwise(words) if flag == "--tensorboard-dir"]
    assert after == [str(tmp_path / name) for name in there]


@pytest.mark.parametrize("format", ["torch", "torch_dist"])
def test_pruned_tensor_parallel_checkpoint_trains_from_its_own_arguments(folder: Path, format: str) -> None:
    shards = convert(folder / "hf", folder / f"parent-{format}", layout=Layout(tensor=2, vocab_divisor=64))
    pruned = prune(shards, folder / f"tp2-{format}", *PRUNED, f"--format={format}")
    trained = folder / f"trained-{format}"
    words = f"""--use-checkpoint-args --norm-epsilon 1e-4 --tensor-model-parallel-size 2 --sequence-parallel
        --load {trained} --pretrained-checkpoint {pruned} --save {trained} --ckpt-format {format}
        --data-path {folder}/data --split 100,0,0
        --tokenizer-type NullTokenizer --vocab-size 128 --seq-length {SEQUENCE} --micro-batch-size 2
        --global-batch-size 4 --train-iters 3 --lr 1e-2 --eval-iters 0 --log-interval 1 --calculate-per-token-loss"""
    done = StockLoop(folder).run(f"trains-{format}", words, ranks=2).ok().losses
    assert done[1] == pytest.approx(exported_loss(pruned), abs=1e-5)
    assert done[3] < done[1]
    # The stock loop's own checkpoint, optimizer and all, is read as well.
    assert exported_loss(trained) < done[3]
