"""What is seen of a training: a line a step, and every error; all of it is in the log, whoever ends first."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import watch_training as tool
from commands import ROOT, environment, run
from helpers import convert, make_llama, write_repeated
from stock_loop import stands_in_for_python

NOISE = "".join(f"  attention_{i} ............................. False\n" for i in range(900))
STEP = (
    " [2026-01-02 03:04:05.678901] iteration {step:8d}/     200 | consumed samples: {samples:12d} | elapsed time per "
    "iteration (ms): 500.0 | learning rate: 1.500000E-03 | global batch size:    16 | lm loss: 4.250000E+00 |{kd} loss "
    "scale: 1.0 | grad norm: 1.500 | number of skipped iterations:   {skipped} | number of nan iterations:   0 |\n"
)
VALIDATION = " validation loss at iteration 10{which} | lm loss value: 3.125000E+00 | lm loss PPL: 2.275990E+01 | \n"
SAVED = "  [2026-01-02 03:04:05.6] successfully saved checkpoint from iteration      10 to a b/c [ t 1/1, p 1/1 ]\n"
LOADED = "  successfully loaded checkpoint from runs/pruned [ t 1/1, gtp_remat 1/1, p 1/1 ] at iteration 0\n"


def step(number: int, kd: str = "", skipped: int = 0) -> str:
    return STEP.format(step=number, samples=16 * number, kd=kd, skipped=skipped)


@pytest.mark.parametrize(
    "line,shown",
    [
        (step(8), "step   8/200  32,768 tokens  lm loss 4.2500  lr 1.50e-03  8,192 tokens/s  0:01:36 left"),
        (step(8, " kd loss: 5.000000E-01 |"), "lm loss 4.2500  kd loss 0.5000  lr 1.50e-03"),
        (step(8, skipped=2), "left  number of skipped iterations 2"),
        (VALIDATION.format(which=""), "validation loss after step 10: 3.1250"),
        (
            VALIDATION.format(which="").replace("| \n", "| kd loss value: 5.000000E-01 | kd loss PPL: 1.6E+00 | \n"),
            "validation loss after step 10: 3.1250  kd loss 0.5000",
        ),
        (VALIDATION.format(which=" on test set"), "validation loss after step 10 on test set: 3.1250"),
        (VALIDATION.format(which="").replace("validation", "validation-0"), "validation loss after step 10: 3.1250"),
        (VALIDATION.format(which="").replace("validation", "validation-1"), "after step 10 on text 1: 3.1250"),
        (SAVED, "saved after step 10: a b/c"),
        (LOADED, "starts from runs/pruned at step 0"),
        ("[rank 3] error: no room\n", "[rank 3] error: no room"),
        ("note: without --valid-data-path there is no validation\n", "note: without"),
        ("  attention_dropout ............ 0.0\n", None),
        ("iteration 5 of the planning is over\n", None),
    ],
)
def test_line_of_the_stock_log_is_shown_as_a_person_reads_it(line: str, shown: str | None) -> None:
    found = tool.readable(line.rstrip("\n"), 256)
    assert found is None if shown is None else shown in str(found)


# Programs that stand for a training ----------------------------------------------------------------------------------


def command(folder: Path, program: str) -> list[str]:
    """Return what runs a program of Python as a training, with its log in the folder."""
    (folder / "training.py").write_text(f"import os, signal, sys, time\nfolder = {str(folder)!r}\n{program}")
    watch = [sys.executable, str(ROOT / "tools/watch_training.py"), "--log", str(folder / "logs/node-0.log"), "--"]
    return [*watch, sys.executable, str(folder / "training.py"), "--seq-length", "256"]


def start(folder: Path, program: str) -> "subprocess.Popen[str]":
    """Start it as a terminal does: tests that run in the background have Ctrl-C ignored, and so would it."""
    return subprocess.Popen(
        command(folder, program), env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in tool.FORWARDED],
    )  # fmt: skip


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def test_terminal_has_the_readable_lines_and_the_log_of_all_runs_has_all(tmp_path: Path) -> None:
    program = f"print({NOISE!r} + {step(1)!r}, end=''); print({step(2)!r}, end='', file=sys.stderr)"
    for times in (1, 2):
        done = run(*command(tmp_path, program))
        assert done.returncode == 0 and done.stderr == ""
        first, *steps = done.stdout.splitlines()
        assert first == f"log: {tmp_path}/logs/node-0.log (VERBOSE=1 shows all of it here)"
        assert [line[:12] for line in steps] == ["step   1/200", "step   2/200"]
        log = (tmp_path / "logs/node-0.log").read_text()
        assert log.count(NOISE + step(1) + step(2)) == times and log.count("\n== ") == times


@pytest.mark.parametrize(
    "program,shown,status",
    [
        ("print('error: a sentence', file=sys.stderr); sys.exit(3)", ["error: a sentence"], 3),
        ("def f():\n    raise KeyError('what')\ntry:\n    f()\nexcept KeyError:\n    raise OSError('so') from None",
         ["Traceback (most recent call last):", "OSError: so"], 1),
        ("def f():\n    raise KeyError('what')\ntry:\n    f()\nexcept KeyError as e:\n    raise OSError('so') from e",
         ["KeyError: 'what'", "OSError: so"], 1),
        ("print('[rank1]: Traceback (most recent call last):\\n[rank1]:   File x\\n[rank1]: KeyError: 5\\nTraceback "
         "(most recent call last):\\n  File y\\nChildFailedError: z'); sys.exit(1)", ["KeyError: 5"], 1),
        ("print('last words'); os.kill(os.getpid(), signal.SIGKILL)", ["last words"], 137),
    ],
)  # fmt: skip
def test_failure_reaches_the_terminal_with_its_status(
    program: str, shown: list[str], status: int, tmp_path: Path
) -> None:
    done = run(*command(tmp_path, f"print({NOISE!r})\n{program}"))
    assert done.returncode == status
    lines = done.stdout.splitlines()
    assert set(shown) <= set(lines) and len(lines) < 25 and "ChildFailedError" not in done.stdout
    assert lines[-1] == f"the training ended with status {status}: see {tmp_path}/logs/node-0.log"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_goes_on_to_the_training_whose_lines_come_at_once(number: signal.Signals, tmp_path: Path) -> None:
    program = f"""
def end(number, _):
    print('error: ended by', signal.Signals(number).name)
    sys.exit(7)
for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(one, end)
print({step(1)!r})
while True:
    time.sleep(60)
"""
    watcher = start(tmp_path, program)
    assert watcher.stdout is not None
    lines = [watcher.stdout.readline(), watcher.stdout.readline()]  # while the training goes on
    assert lines[1].startswith("step   1/200")
    watcher.send_signal(number)
    assert f"error: ended by {number.name}\n" in watcher.stdout.read()
    assert watcher.wait() == 7


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_training_ends_with_a_watcher_that_is_killed(tmp_path: Path) -> None:
    program = "open(folder + '/pid', 'w').write(f'{os.getpid()}.')\ntime.sleep(60)\nprint('still here')"
    watcher, file = start(tmp_path, program), tmp_path / "pid"
    wait_for(lambda: file.exists() and file.read_text().endswith("."))
    pid = file.read_text()[:-1]
    watcher.kill()
    watcher.wait()
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    assert "still here" not in (tmp_path / "logs/node-0.log").read_text()


def test_training_goes_on_where_nobody_reads(tmp_path: Path) -> None:
    program = f"print({step(1)!r})\nwhile not os.path.exists(folder + '/closed'):\n    time.sleep(0.02)\n"
    watcher = start(tmp_path, f"{program}print({step(2)!r})\ntime.sleep(0.5)\nprint({step(3)!r})\nprint('the end')")
    assert watcher.stdout is not None
    assert watcher.stdout.readline()
    watcher.stdout.close()
    (tmp_path / "closed").touch()
    assert watcher.wait() == 0
    assert (tmp_path / "logs/node-0.log").read_text().endswith("the end\n")


# check_model.sh ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_check_model_shows_the_first_step_on_the_first_screen(tmp_path: Path) -> None:
    load = convert(make_llama(tmp_path / "hf", vocab=128), tmp_path / "shards")
    write_repeated(tmp_path / "data", np.arange(32), 40)
    settings = {
        "LOAD_PATH": load, "SAVE_PATH": tmp_path / "out", "DATA_PATH": tmp_path / "data", "SPLIT": "100,0,0",
        "TOKENIZER_TYPE": "NullTokenizer", "TOKENIZER_MODEL": "none", "SEQ_LENGTH": 32, "GLOBAL_BATCH_SIZE": 2,
        "TRAIN_ITERS": 2, "LR_WARMUP_ITERS": 1, "EVAL_ITERS": 0, "PYTHON": stands_in_for_python(tmp_path),
    }  # fmt: skip
    script = str(ROOT / "scripts/check_model.sh")
    done = run("bash", script, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("step 1/2  64 tokens  lm loss "))
    assert first < 10 and f"saves every 500 steps to {tmp_path}/out" in lines[0]
    assert f"saved after step 2: {tmp_path}/out" in lines
    log = tmp_path / "out/logs/node-0.log"
    assert f"log: {log} (VERBOSE=1 shows all of it here)" in lines and log.read_text().count("\n") > 900
    # Resumed with everything on the terminal, and a mistake in its sentence.
    done = run("bash", script, "--override-opt-param-scheduler", **settings | {"TRAIN_ITERS": 3}, VERBOSE=1)
    assert done.returncode == 0 and done.stdout.count("\n") > 900 and "iteration        3/" in done.stdout
    done = run("bash", script, **settings | {"DATA_PATH": "nowhere"})
    assert done.returncode == 1 and "error: --data-path nowhere: there is no nowhere.bin" in done.stdout
    assert len(done.stdout.splitlines()) < 10
