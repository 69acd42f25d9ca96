"""inference.py: its rows, their costs, and what reaches the defence."""

from __future__ import annotations

import inspect
from argparse import Namespace

import pytest
import torch
from reverse_toys import evaluations, images, make_loss, run, set_of, weights

from reverse_attack import inference
from reverse_attack.inference import measure
from reverse_attack.reversal import Reversal


@pytest.mark.parametrize(
    "line",
    [
        "--norm clean",
        "--norm l_1",
        "--norm l_2 --iter 5",
        "--norm l_inf",
        "--task SSL --norm clean --attack-iter 1 --n-views 2",
        "--task SSL --norm l_1 --attack-iter 1 --batchsize 1 --negatives bank --alpha 2",
        "--task random --norm l_inf",
    ],
)
def test_inference_prints_and_keeps_its_rows(root, line, capsys):
    run_dir = weights(root).parent.parent
    before = len(evaluations(run_dir))
    assert run(root, inference, line, 8) == 0
    out = capsys.readouterr().out
    assert "Perturbation" in out and "| Accuracy (%)" in out and "| Test loss" in out
    rows = evaluations(run_dir)[before:]
    assert len(rows) == (2 if "--task" in line else 1)
    for row in rows:
        assert row["n"] == 8 and 0 <= row["accuracy"] <= 100 and row["test_loss"] > 0
        assert f"{row['perturbation']:<18} | {row['accuracy']:.1f} [" in out
        assert row["forward_passes_per_image"] >= 1 and row["seconds_per_image"] > 0
    assert ("Gain" in out and "fixed" in out) == ("--task" in line)


def test_labels_reach_no_reversed_pixel():
    assert set(inspect.signature(Reversal.__call__).parameters) == {"self", "x", "seed"}
    loss, x = make_loss(), images(6)
    y, outputs = torch.tensor([0, 1, 2, 3, 4, 0]), []

    cpu = torch.device("cpu")
    args = Namespace(norm="linf", task="SSL", batch_size=3, seed=0, device=cpu)

    def defend(pixels, seed):
        outputs.append(Reversal(loss, steps=2)(pixels, seed))
        return outputs[-1]

    for labels in (y, y.flip(0)):
        measure(loss.classifier, x, labels, defend, args)
    assert torch.equal(torch.cat(outputs[:2]), torch.cat(outputs[2:]))


def test_a_row_counts_the_forward_passes_of_the_reversal(root):
    """Steps x views for the reversal, one for the prediction."""
    line = "--task SSL --norm l2 --attack_iter 3 --n_views 2 --random-start --min-crop 0.08"
    assert run(root, inference, line, 8) == 0
    before, after = evaluations(weights(root).parent.parent)[-2:]
    assert before["forward_passes_per_image"] == 1
    assert after["forward_passes_per_image"] == pytest.approx(3 * 2 + 1)
    assert before["attack_set"] == set_of(root, "l_2")[0]


@pytest.mark.parametrize("flags", ["--random-start", "--min-crop 0.08", "--preset paper"])
def test_each_choice_of_the_paper_changes_the_reversal(root, flags):
    losses = []
    for extra in ("", flags):
        line = f"--task SSL --norm l_inf --attack-iter 1 --n-views 2 {extra}"
        assert run(root, inference, line, 8) == 0
        losses.append(evaluations(weights(root).parent.parent)[-1]["test_loss"])
    assert losses[0] != losses[1]
