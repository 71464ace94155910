"""Pictures show what is known, with layers as whole numbers and every legend and label beside what is drawn."""

import importlib
import itertools
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import plot_loss
import pytest
from commands import ROOT
from matplotlib.figure import Figure
from matplotlib.text import Text

from megatron.pruning.plan import figure as plan_pictures
from megatron.pruning.plan.measured import Measured, MeasuredShape, measured_figure
from megatron.pruning.plan.plan import Evidence, Plan

KNOWN = {"hidden": (0.8,), "ffn": (0.7,), "heads": (0.6,)}  # importance kept, in every layer the same


def a_plan(layers: int, tensor: int = 1, **evidence: Any) -> Plan:
    """Return a plan that drops the second layer, and half of all but the query groups, in which there are two heads."""
    kept = np.delete(np.arange(layers), 1)
    return Plan(
        layers=kept,
        hidden=np.arange(16),
        groups=(np.arange(4),) * len(kept),
        heads=(np.arange(0, 8, 2),) * len(kept),
        ffn=(np.arange(24),) * len(kept),
        parent_sizes={"layers": layers, "hidden": 32, "ffn": 48, "heads": 8, "groups": 4, "head_dim": 4, "vocab": 99},
        parent_fingerprint="",
        tensor_parallel=tensor,
        evidence=Evidence(**evidence),
    )


def by_layer(layers: int, shares: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    return {axis: share if axis == "hidden" else share * (layers - 1) for axis, share in shares.items()}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn while the test runs, as they are when they become a file."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def titles(figure: Figure) -> list[str]:
    return [axes.get_title("left") for axes in figure.axes]


@pytest.mark.parametrize("layers", [8, pytest.param(80, marks=pytest.mark.slow)])
def test_a_plan_by_scores_shows_what_is_kept_of_each_axis_that_is_cut(layers: int, drawn: list[Figure]) -> None:
    influence = tuple(np.linspace(1, 0.01, layers).tolist())
    kept = by_layer(layers, KNOWN)
    plan = a_plan(layers, 2, criterion="activation", importance_kept=kept, block_influence=influence,
                  balance_tax=by_layer(layers, {"ffn": (0.3,)}))  # fmt: skip
    assert plan_pictures.plan_figure(plan).startswith(b"\x89PNG")
    sizes, blocks, ffn, heads = drawn[0].axes
    assert [label.get_text() for label in sizes.get_yticklabels()] == ["layers", "hidden", "ffn", "heads"]
    assert [text.get_text() for text in sizes.texts] == [
        f"{layers - 1} of {layers}",
        "16 of 32, 80.0% of importance",
        "24 of 48, 70.0% of importance",
        "4 of 8, 60.0% of importance",
    ]
    assert [bar.get_height() for bar in blocks.containers[0]] == pytest.approx(influence)
    assert titles(drawn[0])[2:] == [f"importance kept of {axis} (dashed: share kept, 50%)".replace(" (", f": {share} (")
                                    for axis, share in (("ffn", "70.0%"), ("heads", "60.0%"))]  # fmt: skip
    kept_bars, lost_bars = ffn.containers
    assert [bar.get_x() + bar.get_width() / 2 for bar in kept_bars] == pytest.approx(plan.layers)
    assert [a.get_height() + b.get_height() for a, b in zip(kept_bars, lost_bars, strict=True)] == pytest.approx(
        [0.7 / (1 - 0.3)] * (layers - 1)  # what a free choice would keep
    )
    assert ffn.get_title("right") == "orange: balance tax, 30.00%" and heads.get_title("right") == ""
    assert all(tick == int(tick) for tick in heads.get_xticks())


@pytest.mark.parametrize(
    "criterion,known,panels",
    [("random", {}, ["what remains", "layers kept"]),
     ("magnitude", KNOWN, ["what remains", "importance kept of ffn: 70.0% (dashed: share kept, 50%)",
                           "importance kept of heads: 60.0% (dashed: share kept, 50%)"])],
)  # fmt: skip
def test_a_plan_without_scores_shows_what_it_has(
    criterion: str, known: dict[str, tuple[float, ...]], panels: list[str], drawn: list[Figure]
) -> None:
    plan_pictures.plan_figure(a_plan(8, criterion=criterion, importance_kept=by_layer(8, known)))
    assert titles(drawn[0]) == panels
    assert drawn[0].axes[1].get_title("right") == "grey: dropped"


def test_labels_of_losses_stand_beside_the_plot_and_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    log = tmp_path / "log"
    steps = "".join(f"iteration {i}/ 9 | consumed samples: {8 * i} | lm loss: {3 - 0.1 * i} | \n" for i in range(1, 10))
    log.write_text(f"{steps} validation-0 loss at iteration 9 | lm loss value: 2.5 | \n")
    lines = [f"--line={name}={loss}" for name, loss in (("a", 2.5), ("b", 2.51), ("c", 2.999), ("d", 3.0), ("e", 9))]
    plot_loss.main([f"--run=run={log}", *lines, "--ylim", "2", "3", f"--output={tmp_path / 'x.png'}"])
    axes = drawn[0].axes[0]
    drawn[0].draw_without_rendering()  # so that all positions are of one resolution
    assert axes.get_legend() is None and not drawn[0].legends
    assert all(tick == int(tick) for tick in axes.get_xticks())
    texts = sorted(axes.texts, key=lambda text: Text.get_window_extent(text).y0)
    assert [text.get_text() for text in texts] == [
        "run, training", "a: 2.500", "run, validation: 2.500", "b: 2.510", "c: 2.999", "d: 3.000"
    ]  # fmt: skip
    boxes, plot = [Text.get_window_extent(text) for text in texts], axes.get_window_extent()
    assert all(box.x0 > plot.x1 for box in boxes)
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
    assert boxes[-1].y1 <= drawn[0].bbox.y1


def test_the_picture_of_streaming_is_drawn_again_from_its_results(
    tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    streaming = importlib.import_module("streaming")
    results = ROOT / "benchmarks" / "results" / "streaming-1.1b.json"
    streaming.main([f"--results={results}", f"--figure={tmp_path / 'x.png'}"])
    axes, legend = drawn[0].axes[0], drawn[0].legends[0]
    drawn[0].draw_without_rendering()
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert {bars.get_label() for bars in axes.containers} == {streaming.BARS[name] for name in
                                                              ("seconds", "by_hand_seconds")}  # fmt: skip
    with pytest.raises(SystemExit):
        streaming.main([f"--results={results}"])


@pytest.mark.parametrize("scale", [1, 3000])
def test_the_sizes_of_measured_shapes_are_written_apart(scale: int, drawn: list[Figure]) -> None:
    def shape(parameters: int, operations: int, loss: float) -> MeasuredShape:
        sizes = {"layers": 8, "hidden": 128, "ffn": 320, "heads": 8, "groups": 4, "head_dim": 20, "vocab": 1024}
        return MeasuredShape(sizes=sizes, parameters=parameters * scale, memory=2 * parameters * scale,
                             operations=operations * scale, losses={0: loss})  # fmt: skip

    shapes = [shape(1_738_880, 3_215_616, 3.1), shape(1_726_336, 3_190_528, 3.2), shape(1_693_552, 3_157_728, 3.4)]
    picture = measured_figure(Measured(job={}, parent=shape(2_419_360, 4_511_040, 2.6), shapes=shapes))
    width, _ = drawn[0].get_size_inches()
    assert plt.imread(BytesIO(picture)).shape[1] == 200 * width
    drawn[0].draw_without_rendering()
    for axes in drawn[0].axes:
        left, right = axes.get_xlim()
        written = [
            label.get_window_extent() for label in axes.get_xticklabels() if left <= label.get_position()[0] <= right
        ]
        assert len(written) >= 2 and all(a.x1 < b.x0 for a, b in itertools.pairwise(written))


def test_no_figure_stays_open(drawn: list[Figure]) -> None:
    before = plt.get_fignums()
    plan_pictures.plan_figure(a_plan(3))
    assert drawn and plt.get_fignums() == before
