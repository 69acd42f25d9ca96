"""The sections of a report: numbers against the records, what is left out and why."""

import json
import shutil

import pytest
from report_runs import ATTACK, make_network

from deepvision.reporting import records, sections
from deepvision.reporting.analysis import analyse
from deepvision.reporting.document import Figure, Table, Text
from deepvision.runtime.provenance import ROOT
from utils import UserError


def cells(table, row):
    return next(cells for name, *cells in table.rows if name == row)


def test_results_are_those_of_the_records(our_run, course_run):
    runs = records.read_runs([our_run, course_run])
    rows = [json.loads(line) for line in (our_run / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["val_top1_accuracy"])
    table, settings = sections.summary(runs).blocks
    assert cells(table, "best top-1") == [f"{best['val_top1_accuracy']:.2f} %", "12.25 %"]
    assert cells(table, "… its top-5") == [f"{best['val_top5_accuracy']:.2f} %", "42.00 %"]
    assert cells(table, "… its epoch") == ["2", "2"]
    assert cells(table, "final top-1") == [f"{rows[-1]['val_top1_accuracy']:.2f} %", "12.25 %"]
    assert cells(table, "final top-5") == [f"{rows[-1]['val_top5_accuracy']:.2f} %", "43.00 %"]
    assert cells(table, "top-1, averaged with the mirror image") == ["44.44 %", "–"]
    assert cells(table, "top-1 under the default attack") == ["3.12 %", "–"]
    assert cells(table, "training images per second") == ["200.0", "–"]
    assert cells(table, "peak memory") == ["1,000 MB", "–"]
    size = f"{sum(p.numel() for p in make_network(0).parameters()):,}"
    assert cells(table, "parameters") == [size, size]
    assert cells(settings, "lr") == ["0.05"]
    (robust, sweep) = sections.robustness(runs[0], FakeWriter()).blocks
    assert cells(robust, ATTACK["attack"]) == ["28.57 %", "1.00 %", "randomised network"]


class FakeWriter:
    """Takes figures without drawing them."""

    def add(self, name, drawing, caption, **options):
        return Figure(name, caption, 1, **options)


def test_a_run_says_what_it_is(our_run, course_run):
    (table,) = sections.provenance(records.read_runs([our_run, course_run])).blocks
    assert cells(table, "network") == ["SimpleNet", "SimpleNet"]
    assert cells(table, "adversarial training") == ["no", "–"]
    assert cells(table, "data folder") == ["scenes", "–"]
    assert cells(table, "classes") == ["10", "–"]
    assert cells(table, "data fingerprint") == ["00c0ffee", "–"]
    assert cells(table, "command") == ["python main.py scenes --epochs=3", "–"]
    assert cells(table, "commit") == ["abc123", "–"]
    assert cells(table, "versions") == ["torch 2.9", "–"]


def test_runs_of_different_data_are_warned_of(our_run, tmp_path):
    twin = shutil.copytree(our_run, tmp_path / "torch_conv_exp_2026-01-02_04-00-00")
    runs = records.read_runs([our_run, twin])
    assert not sections.data_warning(runs)
    runs[1].config = {**runs[1].config, "data": {**runs[1].data, "fingerprint": "1", "train": 9}}
    warning, _ = sections.provenance(runs).blocks
    assert isinstance(warning, Text) and warning.style == "warning"
    assert "different data" in warning.text and "9 training images" in warning.text


def test_a_network_that_is_never_right_has_no_attack(our_run, sample_root, tmp_path):
    (run,) = records.read_runs([our_run])
    a = analyse(run, sample_root, 0)
    a.predictions.predictions = (a.predictions.labels + 1) % 10
    section = sections.explanations(a, sections.FigureWriter(tmp_path))
    assert section.blocks[0].text == "No image is classified correctly."
    assert sections.attack_explorer(a) is None and not list(tmp_path.iterdir())


WAYS = {"torch": {"ms": 1234.5, "ratio": 1.0, "saved_bytes": 2_000_000, "peak_bytes": None}}
ABOUT = {"command": "c", "commit": "d", "date": "e", "device": "f"}


def test_convolutions_are_compared_only_where_asked(our_run, tmp_path):
    runs = records.read_runs([our_run])
    assert sections.convolution(runs, None) is None
    file = tmp_path / "conv.json"
    with pytest.raises(UserError, match="there is no benchmark"):
        sections.convolution(runs, file)
    file.write_text(json.dumps({"training": {"batch 64": WAYS}, **ABOUT}))
    table, _ = sections.convolution(runs, file).blocks
    assert table.rows == [["torch", "1,234", "1.00", "2", "–"]]
    file.write_text('{"training": 3}')
    with pytest.raises(UserError, match="is damaged"):
        sections.convolution(runs, file)
    assert sections.convolution(runs, ROOT / "results" / "conv_benchmark.json")


def test_runs_with_both_convolutions_are_compared(our_run, tmp_path):
    twin = shutil.copytree(our_run, tmp_path / "custom_conv_exp_2026-01-02_04-00-00")
    config = json.loads((twin / "config.json").read_text()) | {"kind": "custom_conv"}
    (twin / "config.json").write_text(json.dumps(config))
    (table,) = sections.convolution(records.read_runs([our_run, twin]), None).blocks
    assert isinstance(table, Table) and cells(table, "peak memory") == ["1,000 MB"] * 2
