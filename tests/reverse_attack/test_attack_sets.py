"""Attack sets: names, the choice of one, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from reverse_toys import CLASSES, evaluations, refused, run, set_of, weights

from deepvision import checkpoint
from reverse_attack import attack, attack_sets, inference
from reverse_attack.attack_sets import AttackSet
from utils import UserError

SHA = "0123456789abcdef", "fedcba9876543210"


def save(root, loss="ce", epsilon=8.0, steps=5, sha256=SHA[0]) -> str:
    """A set of two grey images; returns its name."""
    meta = {"norm": "l_inf", "epsilon": epsilon, "iterations": steps, "loss": loss, "images": 2}
    meta["checkpoint_sha256"] = sha256
    grey = AttackSet(torch.full((2, 3, 4, 4), 0.5), torch.tensor([0, 1]), meta)
    attack_sets.save(grey, root, "linf")
    return attack_sets.name_of(meta)


def select(root, steps=None, part=None, sha256=SHA[0], transfer=False) -> str:
    return attack_sets.select(root, "linf", steps, part, sha256, transfer)[0]


def test_sets_that_differ_in_anything_that_names_them_lie_side_by_side(tmp_path):
    names = {
        save(tmp_path),
        save(tmp_path, loss="margin"),
        save(tmp_path, epsilon=4.0),
        save(tmp_path, steps=6),
        save(tmp_path, sha256=SHA[1]),
    }
    assert len(names) == 5
    found = dict(attack_sets.read_records(tmp_path / "pgd" / "l_inf"))
    assert found.keys() == names
    assert "l_inf_5_pgd_eps8_01234567" in names
    x = attack_sets.load(tmp_path, "linf", save(tmp_path), found[save(tmp_path)]).x
    assert torch.equal(x, torch.full((2, 3, 4, 4), 0.5))


def test_an_ambiguous_choice_is_refused_with_the_names_to_choose_from(tmp_path):
    first = save(tmp_path)
    save(tmp_path, sha256=SHA[1])
    assert select(tmp_path) == first  # the other set is another classifier's
    second, third = save(tmp_path, loss="margin"), save(tmp_path, steps=9)
    with pytest.raises(UserError, match="--set") as error:
        select(tmp_path)
    assert all(name in str(error.value) for name in (first, second, third))
    assert select(tmp_path, steps=9) == third
    assert select(tmp_path, part="cw") == second
    with pytest.raises(UserError, match="3 attack sets fit"):
        select(tmp_path, part="eps8", transfer=True)


def test_transfer_takes_another_classifiers_set_only_where_there_is_no_own_one(tmp_path):
    other = save(tmp_path, sha256=SHA[1])
    with pytest.raises(UserError, match="another checkpoint"):
        select(tmp_path)
    assert select(tmp_path, transfer=True) == other
    assert select(tmp_path, transfer=True) != save(tmp_path) == select(tmp_path, transfer=True)
    with pytest.raises(UserError, match="no attack set called dlr"):
        select(tmp_path, part="dlr")


def test_a_set_under_its_older_name_is_found_by_its_record(root, tmp_path, capsys):
    name, meta = set_of(root, "l_1")
    (folder := tmp_path / "pgd" / "l_1").mkdir(parents=True)
    old = attack_sets.paths(folder, "l_1_5")
    for path, target in zip(attack_sets.paths(root / "pgd" / "l_1", name), old, strict=True):
        shutil.copy(path, target)
    old[2].write_text(json.dumps({k: v for k, v in meta.items() if k != "attack"}))
    assert run(root, inference, f"--norm l_1 --savepath {tmp_path}", 8) == 0
    assert "Attack set: l_1_5 (pgd, l_1, epsilon 12, 5 steps" in capsys.readouterr().out
    assert evaluations(weights(root).parent.parent)[-1]["attack_set"] == "l_1_5"


def test_the_commands_refuse_an_ambiguous_choice_in_one_line(root, tmp_path, capsys):
    for epsilon in (2, 4):
        line = f"--norm l_inf --attack-iters 1 --epsilon {epsilon} --savepath {tmp_path}"
        assert run(root, attack, line, 8) == 0
    line = f"--norm l_inf --savepath {tmp_path}"
    capsys.readouterr()
    assert "2 attack sets fit" in refused(capsys, run(root, inference, line, 8))
    assert run(root, inference, f"{line} --set eps4", 8) == 0
    assert "epsilon 4/255, 1 steps" in capsys.readouterr().out


def test_a_set_for_another_checkpoint_is_refused_without_transfer(root, tmp_path, capsys):
    ckpt = checkpoint.load(weights(root))
    ckpt["epoch"] = 99
    checkpoint.save(other := tmp_path / "other.pth.tar", ckpt)
    line = f"--norm l_2 --weights {other}"
    assert "another checkpoint" in refused(capsys, run(root, inference, line, 8))
    assert run(root, inference, f"{line} --transfer", 8) == 0
    line = f"--task SSL --weights {other} --head {weights(root, 'ssl')}"
    assert "another classifier" in refused(capsys, run(root, inference, line, 8))
    assert "--task SSL" in refused(capsys, run(root, inference, f"--task SSL --weights {other}", 8))


def test_a_damaged_set_or_one_of_other_classes_is_one_line(root, tmp_path, capsys):
    shutil.copytree(root / "pgd", tmp_path / "pgd")
    name = set_of(root, "l_1")[0]
    _, labels, record = attack_sets.paths(tmp_path / "pgd" / "l_1", name)
    line = f"--norm l_1 --savepath {tmp_path}"
    np.save(labels, np.full(64, CLASSES))
    assert "other images" in refused(capsys, run(root, inference, line))
    labels.write_bytes(labels.read_bytes()[:100])
    assert "damaged" in refused(capsys, run(root, inference, line))
    labels.unlink()
    assert "damaged" in refused(capsys, run(root, inference, line))
    record.write_text('{"norm": "l_1"}')
    assert "damaged" in refused(capsys, run(root, inference, line))
