"""figures.py."""

from __future__ import annotations

import json

import pytest
from reverse_toys import run

from reverse_attack import figures


def test_figures_are_drawn(root, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="only the figures need it")
    monkeypatch.setattr(figures, "HEAD_STEPS", 2)
    monkeypatch.setattr(figures, "SHORT", (1, 2))
    monkeypatch.setattr(figures, "BATCH_SIZES", (8, 16))
    assert run(root, figures, f"--results {tmp_path} --head-images 32", 8) == 0
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {f"reverse_{name}" for name in figures.FIGURES}
    numbers = json.loads((tmp_path / "reverse_figures.json").read_text())
    assert len(numbers["heads_compared"]["found"]) == 4
    for losses in numbers["loss_curve"]["found"].values():
        assert len(losses) == figures.LAST_ITERATION + 1 and losses[-1] > losses[0]
    assert run(root, figures, f"--results {tmp_path} --only loss_curve", 4) == 0
    again = json.loads((tmp_path / "reverse_figures.json").read_text())
    assert again["heads_compared"] == numbers["heads_compared"]
    assert again["loss_curve"]["found"] != numbers["loss_curve"]["found"]
