"""The report: what it reads against what was written, what it computes against brute force."""

import base64
import html
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import report
import student_code
from custom_dataloader import MiniPlacesLoader
from deepvision import checkpoint
from deepvision.reporting import analysis, figures, records, sections
from deepvision.reporting.analysis import Predictions
from deepvision.runtime import event_file
from deepvision.runtime.run_logger import RunLogger
from deepvision.training.engine import Metrics
from utils import UserError, load_image

NAMES = ["beach", "bridge", "city", "corridor", "desert", "field", "forest"]


LIGHTS = [{"name": "randomised network", "warns": True}, {"name": "large", "warns": False}]
GRID = [(0, 0, 30.0), (1, 1, 20.0), (1, 5, 10.0), (4, 1, 9.0), (4, 5, 0.0)]
SWEEP = [dict(zip(("epsilon_255", "steps", "top1"), point, strict=True)) for point in GRID]
ATTACK = {"attack": "PGD, 10 steps", "clean_top1": 28.571, "probed": 40}
EVALUATIONS = [
    {"mirrored_top1": 1.0},
    {"mirrored_top1": 44.444},
    {"clean_top1": 28.571, "attacked_top1": 3.125},
    {**ATTACK, "attacked_top1": 9.0, "lights": []},
    {**ATTACK, "attacked_top1": 1.005, "lights": LIGHTS, "sweep": SWEEP},
]


def network(seed):
    torch.manual_seed(seed)
    return student_code.SimpleNet(num_classes=10)


def write_checkpoint(folder, model, **more):
    (folder / "models").mkdir(exist_ok=True)
    content = {"epoch": 3, "model_arch": "CNN", "state_dict": model.state_dict(), **more}
    checkpoint.save(folder / "models" / checkpoint.BEST, content)


@pytest.fixture(scope="module")
def our_run(tmp_path_factory):
    """Three epochs in the words of our own logbook; it recorded a data folder that has moved."""
    folder = tmp_path_factory.mktemp("logs") / "torch_conv_exp_2026-01-02_03-04-05"
    folder.mkdir()
    settings = {"epochs": 3, "batch_size": 64, "lr": 0.05, "warmup": 1.0, "momentum": 0.9}
    settings |= {"wd": 1e-4, "clip_grad": 1.0, "at": None, "seed": 7, "data_folder": "gone"}
    with RunLogger(folder) as book:
        book.config({"kind": "torch_conv", "device": "cpu", "arguments": settings})
        for epoch, top1 in enumerate((31 / 3, 200 / 7, 77 / 3), 1):
            for i in range(4):
                book.log_step(4 * epoch - 4 + i, 2.5 / epoch + 0.1 * i, 0.01 * epoch)
            train, val = Metrics(2.0, top1 / 2, 50.0), Metrics(2.0, top1, 60 + epoch / 7)
            speed = {"images_per_second": 100.0 * epoch, "peak_memory_bytes": 10**9 - epoch}
            book.log_epoch(epoch, train, val, **speed)
    with open(folder / "evaluations.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in EVALUATIONS)
    write_checkpoint(folder, network(0), kind="torch_conv")
    return folder


@pytest.fixture(scope="module")
def course_run(tmp_path_factory):
    """What the course's own code leaves: event files and a checkpoint."""
    folder = tmp_path_factory.mktemp("course") / "CNN_exp_2024-10-11_12-13-14"
    writer = SummaryWriter(folder)
    for i in range(0, 40, 10):
        writer.add_scalar("data/training_loss", 4 - i / 20, i)
        writer.add_scalar("data/learning_rate", i / 400, i)
    for epoch, top1 in ((1, 10.5), (2, 12.25), (3, 12.25)):
        writer.add_scalars("data/top1_accuracy", {"train": top1 + 1, "val": top1}, epoch)
        writer.add_scalars("data/top5_accuracy", {"train": 50, "val": 40 + epoch}, epoch)
    writer.close()
    write_checkpoint(folder, network(1), best_acc1=torch.tensor(12.25))
    return folder


@pytest.fixture(scope="module")
def made(our_run, course_run, sample_root, tmp_path_factory):
    """(folder, page) of the report of both runs."""
    out = tmp_path_factory.mktemp("results") / "both"
    words = [our_run, course_run, "--data", sample_root, "--out", out]
    assert report.main([str(word) for word in words]) == 0
    return out, (out / "report.html").read_text(encoding="utf-8")


def cells(page, row):
    """The cells behind a name in the first column of a table."""
    found = re.search(rf"<tr><td>{re.escape(row)}</td>(.*?)</tr>", page)
    return re.findall(r"<td>(.*?)</td>", found[1])


def test_the_pages_numbers_are_those_of_the_records(made, our_run):
    _, page = made
    rows = [json.loads(line) for line in (our_run / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["val_top1_accuracy"])
    assert cells(page, "best top-1") == [f"{best['val_top1_accuracy']:.2f} %", "12.25 %"]
    assert cells(page, "… with top-5") == [f"{best['val_top5_accuracy']:.2f} %", "42.00 %"]
    assert cells(page, "… after epoch") == ["2", "2"]
    assert cells(page, "final top-1") == [f"{rows[-1]['val_top1_accuracy']:.2f} %", "12.25 %"]
    assert cells(page, "final top-5") == [f"{rows[-1]['val_top5_accuracy']:.2f} %", "43.00 %"]
    assert cells(page, "top-1, mirror-averaged") == ["44.44 %", "–"]
    assert cells(page, "top-1 under default attack") == ["3.12 %", "–"]
    assert cells(page, ATTACK["attack"]) == ["28.57 %", "1.00 %", "randomised network"]
    assert cells(page, "images/s in training") == ["200.0", "–"]
    assert cells(page, "peak memory") == ["1,000 MB", "–"]
    size = f"{sum(p.numel() for p in network(0).parameters()):,}"
    assert cells(page, "parameters") == [size, size]
    assert cells(page, "lr") == ["0.05"]
    (run,) = records.read_runs([our_run])
    assert run.val_top1 == [(row["epoch"], row["val_top1_accuracy"]) for row in rows]  # all digits


def test_a_course_folder_reads_as_it_was_written(course_run):
    (run,) = records.read_runs([course_run])
    assert run.label == "CNN" and run.config == {} and run.data_folder() is None
    assert run.loss == [(i, 4 - i / 20) for i in range(0, 40, 10)]
    assert run.rate == [(i, pytest.approx(i / 400)) for i in range(0, 40, 10)]
    assert run.accuracy["top1_accuracy", "train"] == [(1, 11.5), (2, 13.25), (3, 13.25)]
    assert run.accuracy["top5_accuracy", "val"] == [(1, 41.0), (2, 42.0), (3, 43.0)]
    assert torch.equal(run.network.fc.weight, network(1).fc.weight)
    assert not run.network.training


def test_wall_time_leaves_out_the_time_between_two_processes(tmp_path, monkeypatch):
    """Two processes of 60 and 45 s, a day apart; what -e and -a show much later is no work."""
    now = 1e9
    monkeypatch.setattr(event_file, "time", SimpleNamespace(time=lambda: now))

    def process(start, steps, end, epoch):
        nonlocal now
        now = start
        with RunLogger(tmp_path) as book:
            for now in steps:  # noqa: B007 - the clock that the event file reads
                book.log_step(int(now), 1.0, 0.1)
            now = end
            book.log_epoch(epoch, Metrics(1, 2, 3), Metrics(1, 2, 3))

    process(1e9, [1e9 + 5, 1e9 + 50], 1e9 + 60, epoch=1)
    process(1e9 + 86400, [1e9 + 86410], 1e9 + 86445, epoch=2)
    now = 1.1e9
    with RunLogger(tmp_path) as book:
        book.add_image("Image/Image", torch.zeros(3, 4, 4), 0)
        book.add_curve_point("robustness/top1_accuracy", "5_steps", 50.0, 1)
    assert records.read_runs([tmp_path])[0].seconds == pytest.approx(105)


def test_two_runs_of_a_kind_are_told_apart(our_run, tmp_path):
    twin = tmp_path / "torch_conv_exp_2026-01-02_04-00-00"
    shutil.copytree(our_run, twin)
    labels = [run.label for run in records.read_runs([our_run, twin])]
    assert labels == ["torch_conv 2026-01-02_03-04-05", "torch_conv 2026-01-02_04-00-00"]


# ---------------------------------------------------------------------------------------------
# Against brute force
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers():
    rng = np.random.default_rng(3)
    labels, predictions = rng.integers(0, 6, (2, 300))  # category 6 has no image
    return Predictions(labels, predictions, rng.random(300), NAMES)


def pairs_of(answers):
    return list(zip(answers.labels.tolist(), answers.predictions.tolist(), strict=True))


def test_confusion_and_accuracy_by_category(answers):
    counts = answers.confusion
    pairs = pairs_of(answers)
    for i in range(7):
        of_category = [j for label, j in pairs if label == i]
        assert counts[i].tolist() == [of_category.count(j) for j in range(7)]
        if of_category:
            expected = 100 * of_category.count(i) / len(of_category)
            assert answers.class_accuracy[i] == pytest.approx(expected)
    assert math.isnan(answers.class_accuracy[6])


def test_most_confused_pairs_and_their_examples(answers):
    errors = [pair for pair in pairs_of(answers) if pair[0] != pair[1]]
    frequencies = sorted((errors.count(pair) for pair in set(errors)), reverse=True)
    found = answers.most_confused(5)
    assert [n for _, _, n in found] == frequencies[:5]
    assert all(errors.count((i, j)) == n for i, j, n in found)
    i, j, n = found[0]
    examples = answers.examples(i, j, 4).tolist()
    of_pair = [k for k, pair in enumerate(pairs_of(answers)) if pair == (i, j)]
    assert examples == sorted(of_pair, key=lambda k: -answers.confidence[k])[:4]
    assert len(answers.examples(i, j, 999)) == n
    perfect = Predictions(np.arange(7), np.arange(7), np.ones(7), NAMES)
    assert perfect.most_confused(3) == []


def test_the_networks_answers_are_those_to_single_images(sample_root):
    model = network(4).eval()
    found = analysis.Validation(sample_root, 0).ask(model, "net")
    dataset = MiniPlacesLoader(sample_root, None, 10, "val")
    transform = student_code.get_val_transforms()
    for k in range(0, len(dataset), 7):
        x = transform(load_image(dataset.image_folder / dataset.paths[k]))
        with torch.no_grad():
            p = model(x[None]).softmax(1)[0]
        assert found.labels[k] == dataset.labels[k] and found.predictions[k] == p.argmax()
        assert found.confidence[k] == pytest.approx(p.max().item(), rel=1e-4)
    assert len(found.labels) == len(dataset) and found.names[0] == "beach"


def test_flops_by_hand():
    conv = nn.Conv2d(3, 8, 5, stride=2, padding=2)  # 64 x 64 outputs of 8 channels
    assert analysis.count_flops(conv) == 2 * 64 * 64 * 8 * (3 * 5 * 5)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 7))
    assert analysis.count_flops(dense) == 2 * 7 * 3 * 128 * 128
    ours = student_code.SimpleNet(student_code.CustomConv2d)
    assert analysis.count_flops(ours) == analysis.count_flops(student_code.SimpleNet())


def test_smoothing_is_a_weighted_mean_of_what_came_before():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    for n, value in enumerate(figures.smoothed(values, 0.8), 1):
        weights = [0.8 ** (n - 1 - i) for i in range(n)]
        total = sum(w * v for w, v in zip(weights, values, strict=False))
        assert value == pytest.approx(total / sum(weights))


# ---------------------------------------------------------------------------------------------
# Figures and pages
# ---------------------------------------------------------------------------------------------


def test_curves_show_every_run_whole(our_run, course_run):
    runs = records.read_runs([our_run, course_run])
    _, rate, top1, top5 = figures.learning_curves(runs).axes
    for ax, name in ((top1, "top1_accuracy"), (top5, "top5_accuracy")):
        drawn = [list(zip(*line.get_data(), strict=True)) for line in ax.lines]
        for run in runs:
            assert run.accuracy[name, "train"] in drawn and run.accuracy[name, "val"] in drawn
    assert [list(zip(*line.get_data(), strict=True)) for line in rate.lines] == [
        run.rate for run in runs
    ]
    assert len({line.get_color() for line in top1.lines}) == 2


def test_the_sweep_has_a_curve_for_each_number_of_steps():
    lines = figures.sweep(SWEEP).axes[0].lines
    curves = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in lines}
    assert curves == {"1 step": [(0, 30), (1, 20), (4, 9)], "5 steps": [(0, 30), (1, 10), (4, 0)]}


def test_photographs_keep_their_shape_and_their_pixels():
    rows = [("a row", [np.zeros((128, 128, 3))] * n, ["x"] * n) for n in (5, 3)]
    drawing = figures.picture_rows(rows)
    assert len(drawing.axes) == 8
    for ax in drawing.axes:
        box = ax.get_window_extent()
        assert (box.width, box.height) == (pytest.approx(128), pytest.approx(128))


def test_a_hundred_categories_fit_the_page():
    labels = np.arange(300) % 100
    many = Predictions(
        labels, np.arange(300) // 3, np.ones(300), [f"category {i}" for i in range(100)]
    )
    names = [t.get_text() for t in figures.class_accuracy({"net": many}).axes[0].get_yticklabels()]
    assert len(names) == 30 and "category 0" in names
    assert len(figures.confusion(many).axes[0].texts) == 0


class References(HTMLParser):
    """Everything that a page asks for from elsewhere."""

    def __init__(self, page):
        super().__init__()
        self.pictures, self.others = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "src" and value.startswith("data:image/png;base64,"):
                self.pictures.append(base64.b64decode(value.partition(",")[2]))
            elif name in ("src", "srcset", "data", "action") or (
                name == "href" and not value.startswith("#")
            ):
                self.others.append(value)
        if tag in ("script", "link", "iframe", "object"):
            self.others.append(tag)


def test_the_page_needs_no_other_file_and_has_every_figure(made):
    out, page = made
    references = References(page)
    assert references.others == [] and "url(" not in page and "@import" not in page
    files = {file.read_bytes() for file in out.glob("*.png")}
    assert set(references.pictures) == files and len(files) == 11
    targets = set(re.findall(r'href="#(.*?)"', page))
    assert targets and targets == set(re.findall(r'id="(.*?)"', page))


def test_the_markdown_says_what_the_page_says(made):
    out, page = made
    markdown = (out / "report.md").read_text(encoding="utf-8")
    tables = [line for line in markdown.splitlines() if line.startswith("| ")]
    rows = [[re.sub(r"\\(.)", r"\1", cell) for cell in line[2:-2].split(" | ")] for line in tables]
    shown = [
        re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>.*?</tr>", page)
    ]
    rows = [row for row in rows if row[-1] != "---:"]
    assert rows == [[html.unescape(cell) for cell in row] for row in shown]
    linked = set(re.findall(r"^!\[.*\]\((.*)\)$", markdown, re.M))
    assert linked == {file.name for file in out.glob("*.png")}


def test_the_pdf_has_every_figure(made):
    pdf = (made[0] / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and pdf.count(b"/Subtype /Image") == 11


def test_what_a_run_is_called_cannot_break_the_page(our_run, tmp_path):
    twin = tmp_path / "<b>me & you"
    shutil.copytree(our_run, twin)
    section = sections.summary(records.read_runs([twin]))
    page = report.Document("<title>", "", [section]).html()
    assert "&lt;b&gt;me &amp; you" in page and "<b>me" not in page


# ---------------------------------------------------------------------------------------------
# What is missing or broken
# ---------------------------------------------------------------------------------------------


def test_without_data_the_rest_is_made_and_one_line_says_so(our_run, tmp_path, capsys):
    assert report.main([str(our_run), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("torch_conv: nothing on")]) == 1
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "gone" in page and "Confusion" not in page and "Learning curves" in page
    names = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert names == ["curves.png", "sweep_torch_conv.png"]


def test_a_network_that_recognises_nothing_has_no_strips(our_run, sample_root, tmp_path):
    (run,) = records.read_runs([our_run])
    study = sections.study(run, sample_root, 0)
    study.answers.predictions = (study.answers.labels + 1) % 10
    section = sections.explanations(study, sections.FigureWriter(tmp_path))
    assert section.blocks[0].text == "No image was recognised." and not list(tmp_path.iterdir())


def test_images_that_the_run_left_out_stay_out(our_run, sample_root):
    (run,) = records.read_runs([our_run])
    everything = MiniPlacesLoader(sample_root, None, 10, "val")
    run.config["left_out"] = everything.paths[:3]
    assert len(sections.study(run, sample_root, 0).answers.labels) == len(everything) - 3


def test_other_data_than_the_networks_is_one_line(our_run, sample_root, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(sample_root, root)
    first = (root / "train.txt").read_text().split()[0]
    with open(root / "val.txt", "a") as file:
        file.write(f"{first} 10\n")
    (run,) = records.read_runs([our_run])
    with pytest.raises(UserError, match="has 11 categories and the network of torch_conv tells 10"):
        sections.study(run, root, 0)


def spoil(name, text):
    def spoilt(folder):
        (folder / name).write_text(text)

    return spoilt


BROKEN = [
    (spoil("metrics.jsonl", '{"epoch": 1'), r"metrics\.jsonl is damaged"),
    (spoil("metrics.jsonl", "[1]\n"), r"metrics\.jsonl is damaged: expected an object"),
    (spoil("metrics.jsonl", '{"epoch": 1, "val_top1_accuracy": "x"}'), r"is no row of it"),
    (spoil("config.json", "\0"), r"config\.json is damaged"),
    (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff"), r"cannot read .*metrics"),
    (shutil.rmtree, r"there is no run folder"),
    (lambda f: [shutil.rmtree(f), f.mkdir()], r"holds no validation accuracy: it is no run folder"),
]


@pytest.mark.parametrize(("spoilt", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_folder_is_one_line(our_run, tmp_path, capsys, spoilt, message):
    folder = tmp_path / "run"
    shutil.copytree(our_run, folder)
    spoilt(folder)
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert re.search(message, err) and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_same_folder_twice_is_one_line(our_run, tmp_path, capsys):
    assert report.main([str(our_run), f"{our_run}/models/..", "--out", str(tmp_path / "out")]) == 1
    assert "is named twice" in capsys.readouterr().err


def test_a_damaged_checkpoint_costs_only_what_needs_it(our_run, sample_root, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(our_run, folder)
    (folder / "models" / checkpoint.BEST).write_bytes(b"PK not really")
    words = [str(folder), "--data", str(sample_root), "--out", str(tmp_path / "out")]
    assert report.main(words) == 0
    assert "holds no checkpoint that can be read" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert cells(page, "parameters") == ["–"]


def test_a_folder_that_cannot_be_written_is_one_line(our_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert report.main([str(our_run), "--out", str(tmp_path / "file" / "out")]) == 1
    assert re.match(r"error: cannot make the folder .*\n$", capsys.readouterr().err)


def test_the_convolutions_table(tmp_path):
    file = tmp_path / "conv.json"
    assert sections.convolution(file) is None
    ways = {"torch": {"ms": 1234.5, "ratio": 1.0, "saved_bytes": 2_000_000, "peak_bytes": None}}
    about = {"command": "c", "commit": "d", "date": "e", "device": "f"}
    file.write_text(json.dumps({"training": {"batch 64": ways}, **about}))
    assert sections.convolution(file).blocks[0].rows == [["torch", "1,234", "1.00", "2", "–"]]
    file.write_text('{"training": 3}')
    with pytest.raises(UserError, match="is damaged"):
        sections.convolution(file)
    assert Path(report.RESULTS / "conv_benchmark.json").exists()
