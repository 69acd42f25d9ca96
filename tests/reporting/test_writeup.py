"""The write-up: what is filled, what is named as missing, what stays."""

import re

import pytest

import report
from deepvision.reporting.student_text import PLACEHOLDER, missing_parts
from deepvision.reporting.writeup import text_blocks


@pytest.fixture
def written(our_run, tmp_path, capsys):
    out = tmp_path / "writeup"
    words = ["--writeup", str(our_run), "--out", str(out)]
    assert report.main(words) == 0
    return out, words


def test_parts_stand_in_order_and_missing_runs_are_named_with_their_command(written):
    out, _ = written
    markdown = (out / "writeup.md").read_text(encoding="utf-8")
    parts = re.findall(r"^## (.*)$", markdown, re.M)
    assert parts[:3] == ["Contributions", "SimpleNet", "Own convolution compared with PyTorch's"]
    assert parts[3:] == [
        "Own network",
        "Comparison with ResNet-18",
        "Vision transformer",
        "Adversarial attack",
        "Adversarial training (bonus)",
    ]
    missing = "\n".join(missing_parts(markdown))
    for flag in ("--use-custom-conv", "--use-resnet18", "--use-vit", "--pgd", "--benchmark"):
        assert flag in missing
    assert "No run of SimpleNet" not in missing and "28.57 %" in markdown
    for name in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (out / name).is_file()
    assert (out / "writeup.pdf").read_bytes().startswith(b"%PDF-")


def test_the_students_text_stays_and_other_edits_are_kept_in_a_copy(written, capsys):
    out, words = written
    file = out / "writeup.md"
    mine = "We **read** the paper.\n\n- one\n- two"
    file.write_text(file.read_text().replace(PLACEHOLDER, mine, 1))
    assert report.main(words) == 0
    assert mine in file.read_text() and not (out / "writeup_edited.md").exists()
    file.write_text(file.read_text().replace("## SimpleNet", "## My SimpleNet"))
    assert report.main(words) == 0
    assert "## My SimpleNet" in (out / "writeup_edited.md").read_text()
    assert mine in file.read_text() and "## SimpleNet" in file.read_text()


def test_damaged_markers_are_one_line_and_nothing_is_written(written, capsys):
    out, words = written
    file = out / "writeup.md"
    damaged = file.read_text().replace("<!-- end of yours -->", "", 1)
    file.write_text(damaged)
    assert report.main(words) == 1
    assert re.match(r"error: .*writeup\.md: .*do not pair up", capsys.readouterr().err)
    assert file.read_text() == damaged


def test_a_folder_that_is_no_run_is_a_box_and_the_rest_is_made(our_run, tmp_path, capsys):
    out = tmp_path / "out"
    bad = tmp_path / "nothing"
    bad.mkdir()
    assert report.main(["--writeup", str(bad), str(our_run), "--out", str(out)]) == 0
    assert "it is no run folder" in (out / "writeup.md").read_text()


def test_markdown_of_a_text_becomes_plain_lines(tmp_path):
    text = "See [the table](../results/x.md):\n51.9 to **53.0**\n1. one\n- two\n\nNext."
    assert [block.text for block in text_blocks(text, tmp_path)] == [
        "See the table: 51.9 to 53.0\n1. one\n- two",
        "Next.",
    ]
