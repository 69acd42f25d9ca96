"""report.py: what it writes for two runs, and what a mistake or a missing part costs."""

import re
import shutil

import pytest
from report_runs import make_course_run, make_our_run

import report
from deepvision import checkpoint
from deepvision.reporting import explorer


@pytest.fixture(scope="module")
def our_run(tmp_path_factory):
    return make_our_run(tmp_path_factory.mktemp("logs") / "torch_conv_exp_2026-01-02_03-04-05")


@pytest.fixture(scope="module")
def made(our_run, sample_root, tmp_path_factory):
    """(folder, page) of the report of our run and a run of the course's code."""
    course_run = make_course_run(tmp_path_factory.mktemp("course") / "CNN_exp_2024-10-11_12-13-14")
    out = tmp_path_factory.mktemp("results") / "both"
    words = [our_run, course_run, "--data", sample_root, "--out", out]
    with pytest.MonkeyPatch.context() as patch:  # tests/reporting/test_page.py has the whole grid
        patch.setattr(explorer, "EPSILONS", (0, 4))
        patch.setattr(explorer, "STEPS", (1, 2))
        assert report.main([str(word) for word in words]) == 0
    return out, (out / "report.html").read_text(encoding="utf-8")


def test_the_report_of_two_runs_is_whole(made):
    out, page = made
    titles = re.findall(r"<h2.*?>(.*?)</h2>", page)
    first, second = "SimpleNet 2026-01-02_03-04-05", "SimpleNet 2024-10-11_12-13-14"
    assert titles == [
        *("Runs", "Results", "Learning curves", f"Robustness: {first}", "Accuracy by class"),
        *(f"Explore attacks: {first}", f"Confusion: {first}", f"Attack and saliency: {first}"),
        *(f"Confusion: {second}", f"Attack and saliency: {second}"),
    ]
    markdown = (out / "report.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"^!\[.*\]\((.*)\)$", markdown, re.M))
    assert linked <= {file.name for file in out.glob("*.png")} and len(linked) == 11
    assert (out / "report.pdf").read_bytes().count(b"/Subtype /Image") == 11


def test_without_data_the_rest_is_made_and_one_line_says_so(our_run, tmp_path, capsys):
    assert report.main([str(our_run), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("SimpleNet: no predictions")]) == 1
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "gone" in page and "Confusion" not in page and "Learning curves" in page


def test_a_folder_that_is_no_run_is_one_line_and_a_box(our_run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / "empty"), str(our_run), "--out", str(tmp_path / "out")]
    assert report.main(words) == 0
    assert len(re.findall("is no run folder", capsys.readouterr().out)) == 1
    assert "is no run folder" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_no_run_folder_at_all_is_an_error(tmp_path, capsys):
    for folders in (["a"], ["a", "b"]):
        words = [str(tmp_path / name) for name in folders]
        assert report.main([*words, "--out", str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2 and not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_costs_only_what_needs_it(our_run, sample_root, tmp_path, capsys):
    folder = shutil.copytree(our_run, tmp_path / "run")
    (folder / "models" / checkpoint.BEST).write_bytes(b"PK not really")
    words = [str(folder), "--data", str(sample_root), "--out", str(tmp_path / "out")]
    assert report.main(words) == 0
    assert "holds no checkpoint that can be read" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<tr><td>parameters</td><td>–</td></tr>" in page


def test_a_folder_that_cannot_be_written_is_one_line(our_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert report.main([str(our_run), "--out", str(tmp_path / "file" / "out")]) == 1
    assert re.match(r"error: cannot make the folder .*\n$", capsys.readouterr().err)
