"""Loss curves are the same from TensorBoard and from the log of a run, by iterations and by samples."""

import sys
from pathlib import Path

import plot_loss
import pytest
from commands import ROOT, python_path, run
from torch.utils.tensorboard import SummaryWriter

LOSSES = {10: 3.5, 20: 3.25, 30: 3.0}
LOG = (
    " [2026-01-01] iteration {step:8d}/      30 | consumed samples: {samples:12d} | elapsed time per iteration "
    "(ms): 60.1 | learning rate: 1.0E-03 | global batch size:     8 | lm loss: {loss:.6E} | kd loss: {kd:.6E} | loss "
    "scale: 1.0 |\n"
)
EVALUATED = (
    " validation loss at iteration {step} | lm loss value: {loss:.6E} | lm loss PPL: 1.000000E+00 | "
    "kd loss value: {kd:.6E} | kd loss PPL: 1.000000E+00 | \n"
)


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Write the same run as TensorBoard has it and as a log, in which a resume repeats step 20."""
    log = tmp_path / "log.txt"
    text = LOG.format(step=20, samples=160, loss=9.0, kd=9.0)
    with SummaryWriter(str(tmp_path / "events")) as writer:
        writer.add_scalar("lm loss", 9.0, 20, walltime=1)
        writer.add_scalar("lm loss vs samples", 9.0, 160, walltime=1)
        for step, loss in LOSSES.items():
            for suffix, x in (("", step), (" vs samples", 8 * step)):
                for name, value in (("lm loss", loss), ("kd loss", loss - 1)):
                    writer.add_scalar(f"{name}{suffix}", value, x, walltime=1 + step)
                    writer.add_scalar(f"{name} validation{suffix}", value + 0.5, x, walltime=1 + step)
            text += LOG.format(step=step, samples=8 * step, loss=loss, kd=loss - 1)
            text += EVALUATED.format(step=step, loss=loss + 0.5, kd=loss - 0.5)
    log.write_text(text)
    return tmp_path / "events", log


@pytest.mark.parametrize("by_samples,unit", [(False, 1), (True, 8)])
def test_log_and_tensorboard_give_the_same_curves(both: tuple[Path, Path], by_samples: bool, unit: int) -> None:
    for path in both:
        for name, less in (("lm loss", 0.0), ("kd loss", 1.0)):
            curves = plot_loss.read_run(path, by_samples, name)
            assert curves.training == {step * unit: loss - less for step, loss in LOSSES.items()}
            assert curves.validation == {step * unit: loss - less + 0.5 for step, loss in LOSSES.items()}


def test_smoothing_is_the_mean_of_the_last_points() -> None:
    assert plot_loss.smoothed({3: 2.0, 1: 4.0, 2: 0.0, 4: 1.0}, 2) == ([1, 2, 3, 4], [4.0, 2.0, 1.0, 1.5])
    assert plot_loss.smoothed({1: 4.0, 2: 0.0}, 1) == ([1, 2], [4.0, 0.0])


def test_a_figure_is_drawn_and_mistakes_are_said(both: tuple[Path, Path], tmp_path: Path) -> None:
    runs = [f"--run=a={both[0]}", f"--run=b={both[1]}", "--line=parent=2.5", "--sequence-length=256", "--smooth=2"]
    plot_loss.main([*runs, "--ylim", "2", "4", f"--output={tmp_path / 'new' / 'loss.png'}"])
    assert (tmp_path / "new" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "empty.log").write_text("nothing\n")
    for path, complaint in ((tmp_path / "none", "there is no"), (tmp_path / "empty.log", "holds no training loss")):
        with pytest.raises(ValueError, match=complaint):
            plot_loss.main([f"--run=a={path}", f"--output={tmp_path / 'x.png'}"])


def test_help_needs_nothing_that_takes_long_to_import() -> None:
    program = (
        "import sys, plot_loss; plot_loss.parser(); print({'matplotlib', 'torch', 'tensorboard'} & {*sys.modules})"
    )
    done = run(sys.executable, "-c", program, PYTHONPATH=python_path(ROOT / "tools"))
    assert done.stdout == "set()\n", done.stderr
