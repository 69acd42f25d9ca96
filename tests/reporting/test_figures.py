"""Figures: every curve whole, every name whole and inside, and what the page shows on hover."""

import numpy as np
import pytest
from report_runs import SWEEP

from deepvision.reporting import figures, records
from deepvision.reporting.analysis import Predictions

LONG = ["swimming pool, outdoor", "subway station, platform", "church, outdoor and very long name"]


def outside(figure):
    """The texts that the edge of the figure cuts."""
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    labels = [t for ax in figure.axes for t in (*ax.get_xticklabels(), *ax.get_yticklabels())]
    texts = labels + [ax.title for ax in figure.axes] + figure.texts
    texts += [t for legend in figure.legends for t in legend.get_texts()]
    words = [t for t in texts if t.get_text().strip("−.0123456789")]  # ticks may lie outside
    boxes = [(t.get_text(), t.get_window_extent()) for t in words]
    return [
        text for text, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1
    ]


def test_curves_show_every_run_whole(our_run, course_run):
    runs = records.read_runs([our_run, course_run])
    _, lr, top1, top5 = figures.learning_curves(runs).axes
    for ax, name in ((top1, "top1_accuracy"), (top5, "top5_accuracy")):
        drawn = [list(zip(*line.get_data(), strict=True)) for line in ax.lines]
        for run in runs:
            assert run.accuracy[name, "train"] in drawn and run.accuracy[name, "val"] in drawn
    assert [list(zip(*line.get_data(), strict=True)) for line in lr.lines] == [
        run.lr for run in runs
    ]
    assert len({line.get_color() for line in top1.lines}) == 2


@pytest.mark.parametrize("panel", [None, *figures.PANELS])
def test_legends_of_three_runs_of_one_network_are_whole(our_run, panel):
    runs = [*records.read_runs([our_run])] * 3
    for run in runs:
        run.label = "SimpleNet on CustomConv2d + fgsm-rs 2026-01-02_03-04-05"
    figure = figures.curve_panel(runs, panel) if panel else figures.learning_curves(runs)
    assert len(figure.legends[0].get_texts()) >= 3 and outside(figure) == []


def test_the_sweep_has_a_curve_for_each_number_of_steps():
    lines = figures.sweep(SWEEP).axes[0].lines
    curves = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in lines}
    assert curves == {"1 step": [(0, 30), (1, 20), (4, 9)], "5 steps": [(0, 30), (1, 10), (4, 0)]}


def test_smoothing_is_a_weighted_mean_of_what_came_before():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    for n, value in enumerate(figures.smoothed(values, 0.8), 1):
        weights = [0.8 ** (n - 1 - i) for i in range(n)]
        total = sum(w * v for w, v in zip(weights, values, strict=False))
        assert value == pytest.approx(total / sum(weights))


@pytest.fixture(scope="module")
def hundred():
    """100 classes with the longest real names among them; class 99 has no image."""
    rng = np.random.default_rng(5)
    labels = np.arange(990) % 99
    predicted = np.where(rng.random(990) < 0.5, labels, rng.integers(0, 99, 990))
    names = [LONG[i % 3] if i < 30 else f"class {i}" for i in range(100)]
    return Predictions(labels, predicted, np.ones(990), names)


def test_a_hundred_classes_show_the_best_and_the_worst(hundred):
    figure = figures.class_accuracy({"net": hundred, "other": hundred})
    ax = figure.axes[0]
    names = [t.get_text().replace("\n", " ") for t in ax.get_yticklabels()]
    assert len(names) == 40 and "class 99" not in names and outside(figure) == []
    assert ax.get_title(loc="left") == "20 best and 20 worst of 99 classes"
    accuracy = np.delete(hundred.class_accuracy, 99)
    x = ax.lines[0].get_xdata() if len(ax.lines[0].get_xdata()) == 40 else ax.lines[1].get_xdata()
    assert sorted(x) == pytest.approx(sorted([*np.sort(accuracy)[:20], *np.sort(accuracy)[-20:]]))


def test_the_confusion_block_has_names_and_numbers(hundred):
    figure = figures.confusion_block(hundred)
    block = figures.block_classes(hundred)
    ax, scale = figure.axes
    names = [t.get_text().replace("\n", " ") for t in ax.get_yticklabels()]
    assert names == [hundred.names[i] for i in block] and outside(figure) == []
    share = 100 * hundred.confusion / np.maximum(hundred.confusion.sum(1, keepdims=True), 1)
    for text in ax.texts:
        j, i = text.get_position()
        assert text.get_text() == f"{share[block[i], block[j]]:.0f}"
    assert scale.get_ylabel() == "% of the images of the true class"


def test_cells_on_the_page_are_those_of_the_matrix(hundred):
    figure = figures.confusion_matrix(hundred)
    hover = figures.cell_hover(figure, hundred, hundred.present)
    assert len(hover["names"]) == 99 and sum(n for *_, n in hover["cells"]) == 990
    for i, j, n in hover["cells"]:
        assert hundred.confusion[i, j] == n
    left, top, width, height = hover["box"]
    box = figure.axes[0].get_window_extent()
    assert left * figure.bbox.width == pytest.approx(box.x0, abs=1)
    assert (1 - top) * figure.bbox.height == pytest.approx(box.y1, abs=1)
    assert width * figure.bbox.width == pytest.approx(box.width, abs=1)
    assert height * figure.bbox.height == pytest.approx(box.height, abs=1)


def test_photographs_keep_their_pixels_and_names_do_not_overlap():
    rows = [("swimming pool, outdoor", [np.zeros((128, 128, 3))] * n, LONG[:1] * n) for n in (5, 3)]
    figure = figures.picture_rows(rows)
    assert len(figure.axes) == 8 and outside(figure) == []
    for ax in figure.axes:
        box = ax.get_window_extent()
        assert (box.width, box.height) == (pytest.approx(128), pytest.approx(128))
    titles = [ax.title.get_window_extent() for ax in figure.axes]
    images = [ax.get_window_extent() for ax in figure.axes]
    for n, title in enumerate(titles):
        others = titles[:n] + titles[n + 1 :] + images
        assert not any(title.overlaps(other) for other in others)
        assert figure.axes[n].title.get_text().replace("\n", " ") == LONG[0]
