"""The Slurm jobs start the project's own scripts on every node; stand-ins for srun and scontrol run them here."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, environment
from helpers import assert_same_tensors, convert, tensors

from megatron.pruning.formats import open_checkpoint

pytestmark = pytest.mark.slow

# It runs its command on as many "nodes" as it is told, at once, and fails where one fails.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >>"$RECORD/srun"
while [[ $1 == --* ]]; do
    [[ $1 != --ntasks=* ]] || nodes=${1#*=}
    shift
done
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & started+=($!); done
for one in "${started[@]}"; do wait "$one" || failed=1; done
exit "${failed:-0}"
"""
SCONTROL = '#!/bin/bash\n[ "$1 $2 $3" = "show hostnames nodes[0-1]" ] && printf "127.0.0.1\\n127.0.0.2\\n"\n'
# It starts none of the project's programs, but says how each would have been, by node; all else is Python.
DRY = f"""#!/bin/bash
case "$*" in
*show_checkpoint.py* | *-c\\ *) exec {sys.executable} "$@" ;;
*.py*) printf '%s\\n' "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT" "$@" >"$RECORD/node$SLURM_NODEID" ;;
*) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def bin(tmp_path: Path) -> Path:
    """A folder of programs with stand-ins for Slurm's, and for a Python that starts nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("dry-python", DRY)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def submit(bin: Path, job: str, *flags: str, nodes: int = 2, gpus: int | None = 8, **settings: object) -> Path:
    """Run a job as Slurm does, its file copied to elsewhere; return the folder of what was recorded."""
    record = bin.parent / "record"
    record.mkdir(exist_ok=True)
    (bin.parent / "slurm_script").write_bytes((ROOT / f"scripts/slurm/{job}.sbatch").read_bytes())
    given = {
        "PYTHON": bin / "dry-python", "RECORD": record, "PATH": f"{bin}:{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NODELIST": "nodes[0-1]", "SLURM_JOB_ID": 1234567,
        "SLURM_CPUS_PER_TASK": 4, "SLURM_SUBMIT_DIR": ROOT,
        **({} if gpus is None else {"SLURM_GPUS_ON_NODE": gpus}), **settings,
    }  # fmt: skip
    command = ["bash", str(bin.parent / "slurm_script"), *flags]
    done = subprocess.run(command, env=environment(**given), text=True, capture_output=True, cwd=bin.parent)
    if done.returncode:
        raise ValueError(done.stderr)
    return record


def test_every_job_is_here_and_says_how_it_is_submitted() -> None:
    jobs = sorted((ROOT / "scripts/slurm").glob("*.sbatch"))
    assert len(jobs) == 7
    for job in jobs:
        text = job.read_text()
        assert f"sbatch scripts/slurm/{job.name}" in text or f"sbatch --nodes 4 scripts/slurm/{job.name}" in text
        assert f"#SBATCH --job-name={job.stem}\n" in text and "#SBATCH --ntasks-per-node=1\n" in text
        assert subprocess.run(["bash", "-n", str(job)]).returncode == 0


@pytest.mark.parametrize(
    "job,program,flags,settings",
    [
        ("convert", "tools/checkpoint_conversion/convert.py", ["--dtype", "bf16"], {"GPUS_PER_NODE": 8}),
        ("score", "tools/score_importance.py", ["--load", "a b", "--data", "t", "--save", "s"], {}),
        ("prune", "prune_llama.py", ["--scores", "13b.scores"], {"DATA_PATH": "text", "LOAD_PATH": "p"}),
        ("transfer", "tools/checkpoint_conversion/convert.py", ["--overwrite"], {"GPUS_PER_NODE": 8}),
        ("export", "tools/checkpoint_conversion/convert.py", ["--overwrite"], {"GPUS_PER_NODE": 8}),
    ],
)
def test_a_job_starts_its_program_on_both_nodes(bin: Path, job: str, program: str, flags: list, settings: dict) -> None:
    record = submit(bin, job, *flags, **settings)
    for node in (0, 1):
        place, *words = (record / f"node{node}").read_text().splitlines()
        assert place == f"{node} of 2 at 127.0.0.1:34567"
        start = f"-m torch.distributed.run --nproc_per_node 8 --nnodes 2 --node_rank {node} --master_addr 127.0.0.1"
        assert words[: len(start.split())] == start.split() and words[-len(flags) :] == flags
        assert [word for word in words if word.endswith(program)]
    asked = (record / "srun").read_text()
    assert asked.startswith("--ntasks=2\n--ntasks-per-node=1\n--kill-on-bad-exit=1\nbash\n")


def test_training_starts_on_both_nodes_with_all_gpus(bin: Path, gqa: Path, tmp_path: Path) -> None:
    load = convert(gqa, tmp_path / "load", tensor=4)
    settings = {"LOAD_PATH": load, "SAVE_PATH": tmp_path / "new", "DATA_PATH": "text", "TOKENIZER_MODEL": "none"}
    record = submit(bin, "train", "--seed", "5", **settings, GLOBAL_BATCH_SIZE=8, VERBOSE=1)
    for node in (0, 1):
        words = (record / f"node{node}").read_text()
        assert f"--nproc_per_node\n8\n--nnodes\n2\n--node_rank\n{node}\n" in words and words.endswith("--seed\n5\n")
        assert "--tensor-model-parallel-size\n4\n" in words
    with pytest.raises(ValueError, match="cut for 4 model ranks, but there are 6 processes"):
        submit(bin, "train", gpus=3, **settings)


@pytest.mark.parametrize("hours,minutes", [(1.005, "45"), (0.1, None), (None, None)])
def test_training_ends_before_its_job_does(
    bin: Path, gqa: Path, tmp_path: Path, hours: float | None, minutes: str | None
) -> None:
    ends = {} if hours is None else {"SLURM_JOB_END_TIME": int(time.time() + hours * 3600)}
    settings = {"LOAD_PATH": gqa, "SAVE_PATH": tmp_path / "new", "DATA_PATH": "text", "TOKENIZER_MODEL": "none"}
    record = submit(bin, "train", "--seed", "5", **settings, **ends, TP=1, GLOBAL_BATCH_SIZE=16, VERBOSE=1)
    words = (record / "node0").read_text().splitlines()
    found = words[words.index("--exit-duration-in-mins") + 1] if "--exit-duration-in-mins" in words else None
    assert found == minutes and words[-2:] == ["--seed", "5"]


def test_evaluation_is_one_process(bin: Path) -> None:
    words = (submit(bin, "evaluate", "--load", "x", nodes=1, gpus=1) / "node0").read_text().splitlines()[1:]
    assert words == ["tools/evaluate.py", "--load", "x"]


def test_a_container_sees_the_repository_or_what_is_asked_for(bin: Path) -> None:
    for mounts in ("", "/data:/data"):
        more = {"CONTAINER_MOUNTS": mounts} if mounts else {}
        record = submit(bin, "export", nodes=1, gpus=None, CONTAINER_IMAGE="nvcr.io#a/b:1", **more)
        lines = (record / "srun").read_text().splitlines()
        assert {"--container-image=nvcr.io#a/b:1", f"--container-workdir={ROOT}"} <= set(lines)
        assert f"--container-mounts={mounts or f'{ROOT}:{ROOT}'}" in lines


def test_where_one_node_fails_the_job_fails(bin: Path) -> None:
    (bin / "dry-python").write_text('#!/bin/bash\nexit "$NODE_RANK"\n')
    with pytest.raises(ValueError):
        submit(bin, "transfer", GPUS_PER_NODE=1)


def test_two_nodes_convert_together(bin: Path, gqa: Path, tmp_path: Path) -> None:
    names = {"HF_FORMAT_DIR": gqa, "MEGATRON_FORMAT_DIR": tmp_path / "shards", "TP": 2}
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    submit(bin, "convert", PYTHON=sys.executable, MASTER_PORT=port, GPUS_PER_NODE=1, **names)
    assert open_checkpoint(tmp_path / "shards").layout.tensor == 2
    assert_same_tensors(tensors(convert(tmp_path / "shards", tmp_path / "back", "hf")), tensors(gqa))
