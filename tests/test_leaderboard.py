"""results/leaderboard.md: its figures are those of the records in results/runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def leaderboard(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import leaderboard

    return leaderboard


def test_the_table_is_that_of_the_records(leaderboard):
    text = (ROOT / "results" / "leaderboard.md").read_text()
    records = [path.parent.name for path in leaderboard.RUNS.glob("*/metrics.jsonl")]
    assert {"simplenet", "scene_net", "simplevit"} <= set(records)
    for name in records:
        assert " | ".join(leaderboard.cells(leaderboard.read_record(name))) in text


def test_an_accuracy_is_that_of_the_most_images(leaderboard):
    rows = [
        {"images": 10, "mirrored_top1": 1.0, "mirrored_top5": 2.0},
        {"images": 30, "mirrored_top1": 3.0},
        {"images": 20, "mirrored_top1": 2.0, "attacked_top1": 5.0},
        {"images": 40, "attacked_top1": 7.0, "attack": "another attack"},
        {"images": 15, "attacked_top1": 4.0, "attack": leaderboard.PGD20},
    ]
    found = leaderboard.evaluated(rows)
    assert (found["mirrored_top1"], found["mirrored_top1_images"]) == (3.0, 30)
    assert (found["mirrored_top5"], found["attacked_top1"], found["pgd20_top1"]) == (2.0, 5.0, 4.0)


def test_the_command_of_a_resumed_run_starts_it_with_its_own_settings(leaderboard):
    config = json.loads((leaderboard.RUNS / "scene_net_43k" / "config.json").read_text())
    assert len(config["history"]) > 1 and "--resume" in config["command"]
    command = leaderboard.read_record("scene_net_43k")["command"]
    assert {"--use-scene-net", "--recipe=cpu", "--epochs=28"} <= set(command.split())
    assert "--resume" not in command
