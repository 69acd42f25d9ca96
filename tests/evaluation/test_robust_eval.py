"""The JSON of a robust evaluation: killed and resumed, of another network, damaged."""

from __future__ import annotations

import json
import re

import pytest
from diagnosed import PIXELS, Healthy, images

from deepvision.attacks import AutoAttack, Progress
from deepvision.evaluation.robust_eval import (
    RobustResult,
    evaluate_robustness,
    run_dir_of_network,
)
from utils import UserError


@pytest.fixture
def attack() -> AutoAttack:
    return AutoAttack(epsilon=8, pixels=PIXELS, steps=4, queries=5, targets=1, batch_size=25)


def test_a_stopped_evaluation_resumes_from_its_file(attack, tmp_path):
    x, y = images()
    expected = evaluate_robustness(Healthy(), x, y, attack).progress
    path, model = tmp_path / "robustness.json", Healthy()

    def stop(module, args):
        if path.exists() and json.loads(path.read_text())["progress"]["done"] == 4:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(model, x, y, attack, path)
    hook.remove()
    assert expected.units > 4
    found = evaluate_robustness(model, x, y, attack, path).progress
    assert found.fell_to == expected.fell_to
    assert json.loads(path.read_text())["progress"]["fell_to"] == expected.fell_to


def test_a_network_finds_the_folder_of_its_evaluation(attack, tmp_path):
    x, y = images()
    for day in ("01", "02"):
        (tmp_path / f"evaluation_exp_2026-01-{day}_00-00-00").mkdir()
    folder = tmp_path / "evaluation_exp_2026-01-01_00-00-00"
    evaluate_robustness(Healthy(), x, y, attack, folder / "autoattack_standard.json")
    (folder / "autoattack_other.json").write_text("{")
    other = Healthy()
    other.templates.data.mul_(2)
    assert run_dir_of_network(Healthy(), tmp_path) == folder
    assert run_dir_of_network(other, tmp_path) is None


def test_a_file_of_something_else_is_refused_in_one_line(attack, tmp_path):
    x, y = images()
    path = tmp_path / "robustness.json"
    evaluate_robustness(Healthy(), x, y, attack, path)
    other = Healthy()
    other.templates.data.mul_(2)
    with pytest.raises(UserError, match="other network"):
        evaluate_robustness(other, x, y, attack, path)
    with pytest.raises(UserError, match="other images"):
        evaluate_robustness(Healthy(), x[1:], y[1:], attack, path)
    path.write_text("{")
    with pytest.raises(UserError, match="not a robustness evaluation"):
        evaluate_robustness(Healthy(), x, y, attack, path)


def test_summary_and_table_say_what_was_measured(attack):
    progress = Progress(["clean", None, "apgd-ce", None], ["apgd-ce", "square"], 2, 2, 400, 8.0)
    result = RobustResult(attack, progress)
    summary = result.summary()
    assert re.search(r"standard, l_inf, ε = 8/255.*4 images: robust accuracy 50\.0 \[", summary)
    assert "clean 75.0 [" in summary and "2.00 s and 100 forward passes per image" in summary
    rows = [line.split(" | ")[:2] for line in result.format_table().splitlines()[2:]]
    assert rows == [["| clean", "1"], ["| apgd-ce", "1"], ["| square", "0"]]
