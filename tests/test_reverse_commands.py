"""Part IV's commands on small drawn images, what they leave, what they refuse."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deepvision import checkpoint
from deepvision.attacks.norms import size
from deepvision.attacks.pgd import PGD
from deepvision.runtime import run_logger
from reverse_attack import (
    attack,
    classifier,
    evaluate,
    figures,
    heads,
    inference,
    protocol,
    reversal,
    train,
)
from reverse_attack.data import list_images
from utils import save_image

CODE = Path(__file__).resolve().parents[1] / "code"
CLASSES, TRAIN, TEST = 4, 40, 16
NORMS = {"l_1": 12.0, "l_2": 0.5, "l_inf": 8.0}
TINY = protocol.Budget(8, 4, (2, 2), (2, 2), 2, 2, 4, 2, 2, 3, 2)


def draw_images(root: Path) -> None:
    """Class folders of stripes, told apart by their direction and colour."""
    rng = np.random.default_rng(0)
    across, down = np.meshgrid(np.arange(32), np.arange(32))
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label in range(CLASSES):
            folder = root / "cifar10" / split / f"kind{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                along = down if label % 2 else across
                stripes = np.sin((along + rng.integers(8)) * (0.8 if label < 2 else 1.6))
                image = (
                    128 + 40 * stripes[..., None] * [1, 0.5, 0.2] + rng.normal(0, 20, (32, 32, 3))
                )
                save_image(folder / f"{i}.png", image.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root with a plain classifier, a head and attack sets, made by the commands."""
    folder = tmp_path_factory.mktemp("reverse")
    draw_images(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_logger, "LOGS", folder / "logs")
        patch.setitem(protocol.PROTOCOLS, "quick", TINY)
        clean = "--task Clean --epochs 6 --batchsize 16 --lr 0.1"
        assert train.main([*clean.split(), *data_root(folder)]) == 0
        assert run(folder, train, "--task SSL --epochs 3 --lr 1e-2 --cached_views 4") == 0
        assert run(folder, attack, "--attack_iters 5 --norm all") == 0
        yield folder


def data_root(folder: Path) -> list[str]:
    return ["--data-root", str(folder)]


def run(root: Path, command, line: str, limit: int = 64) -> int:
    return command.main([*line.split(), *data_root(root), "--limit", str(limit)])


def weights(root: Path, task: str = "clean") -> Path:
    return next((root / "logs").glob(f"cifar10_{task}_*/models/{checkpoint.BEST}"))


def meta(root: Path, norm: str, steps: int = 5) -> dict:
    path = root / "pgd" / norm / f"test_perturbed_{norm}_{steps}.meta.json"
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "--norm clean",
        "--norm l_1",
        "--norm l_2 --iter 5",
        "--norm l_inf",
        "--task SSL --norm clean --attack_iter 1 --n_views 2",
        "--task SSL --norm l_1 --attack_iter 1 --batchsize 1 --negatives bank --alpha 2",
        "--task random --norm l_inf",
    ],
)
def test_inference_prints_and_keeps_its_rows(root, line, capsys):
    kept = weights(root).parent.parent / "evaluations.jsonl"
    before = len(kept.read_text().splitlines()) if kept.exists() else 0
    assert run(root, inference, line, 8) == 0
    out = capsys.readouterr().out
    assert "Perturbation" in out and "| Accuracy (%)" in out and "| Test loss" in out
    rows = [json.loads(row) for row in kept.read_text().splitlines()[before:]]
    assert len(rows) == (2 if "--task" in line else 1)
    for row in rows:
        assert row["n"] == 8 and 0 <= row["accuracy"] <= 100 and row["test_loss"] > 0
        assert f"{row['perturbation']:<18} | {row['accuracy']:.1f} [" in out
    assert ("Gain" in out and "fixed" in out) == ("--task" in line)


def test_robust_training_and_both_losses_of_the_head_run(root, monkeypatch, tmp_path):
    monkeypatch.setattr(run_logger, "LOGS", tmp_path)
    robust = "--task Robust --at fgsm-rs --epochs 1 --arch wrn-10-1 --optim Adam --lr 0.001"
    assert run(root, train, robust) == 0
    heads = "--task SSL --loss Dot --n_views 2 --batchsize 512 --epochs 1 --arch wrn-10-1"
    assert run(root, train, heads) == 0
    path = next(tmp_path.glob(f"cifar10_ssl_wrn-10-1_exp_*/models/{checkpoint.BEST}"))
    content = checkpoint.load(path)
    assert (content["loss"], content["n_views"]) == ("Dot", 2)
    assert content["held_out_loss"] < 3 * content["chance"]


def test_a_head_comes_back_as_it_was_trained_with_its_bank(root):
    args = inference.parse(["--weights", str(weights(root))])
    trained = classifier.from_args(args, CLASSES, torch.device("cpu"))
    head, content = heads.from_args(args, trained), checkpoint.load(weights(root, "ssl"))
    bank = head.loss(trained, 3).bank
    assert torch.equal(bank, content["bank"]) and bank.shape == (64, 64)
    assert head.loss(trained, 3, "batch").bank is None
    assert not any(module.training for module in head.loss(trained, 3).modules())
    for name, value in head.head.state_dict().items():
        assert torch.equal(value, content["state_dict"][name])
    train_set, _ = list_images("cifar10", root, "train").split(0, 64)
    clean = trained.model.features(train_set.x / 255).mean(0)  # the bank: views of these
    assert torch.corrcoef(torch.stack([clean, bank.mean(0)]))[0, 1] > 0.2


def test_evaluate_writes_its_tables_and_verdict(root, tmp_path, capsys):
    assert run(root, evaluate, f"--protocol quick --results {tmp_path}", 8) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "reverse_quick.json").read_text())
    text = (tmp_path / "reverse_quick.md").read_text()
    assert found["verdict"] in out and "Verdict" in text
    plain = ["clean", "PGD-CE", "PGD-margin", "APGD-CE", "Square"]
    plain += ["APGD-CE, torchattacks"] * bool(importlib.util.find_spec("torchattacks"))
    assert list(found["transfer"]) == plain
    rows = [row for columns in found["adaptive"].values() for row in columns.values()]
    assert len(rows) == len(plain) + 3 * 3 + 1
    for name in ("static", "defended"):  # no cell is below the worst case, and it is reached
        assert found["worst_case"][name] <= min(row[name] for row in rows)
        assert {row["n"] for row in rows} == {4} == {found["worst_case"]["n"]}
    aware = found["adaptive"]["PGD-CE"]
    steps, n_views, draws = 2, 2, 2
    assert aware["transfer"]["defence_passes"] == 2 * steps * n_views
    assert aware["BPDA + EOT"]["attack_passes"] == 2 * draws * (2 + 2 * steps * n_views)
    assert aware["aware, λ = 1"]["attack_passes"] == 2 * 2 * (1 + n_views)
    assert str(root) not in text.replace(" ".join(data_root(root)), "").replace(str(tmp_path), "")


def test_figures_are_drawn(root, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="only the figures need it")
    monkeypatch.setattr(figures, "HEAD_STEPS", 2)
    monkeypatch.setattr(figures, "SHORT", (1, 2))
    monkeypatch.setattr(figures, "BATCH_SIZES", (8, 16))
    assert run(root, figures, f"--results {tmp_path} --head_images 32", 8) == 0
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


# ---------------------------------------------------------------------------------------------
# Attack sets
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_attacked_images_fill_their_ball_within_valid_pixels(root, norm):
    folder = root / "pgd" / norm
    x_adv = torch.from_numpy(np.load(folder / f"test_perturbed_X_{norm}_5.npy"))
    y = torch.from_numpy(np.load(folder / f"test_perturbed_y_{norm}_5.npy"))
    clean = list_images("cifar10", root, "test").sample(0, 64)
    x = clean.x / 255
    assert torch.equal(y, clean.y)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    unit = 255 if norm == "l_inf" else 1
    lengths = size(x_adv - x, norm.replace("_", "")).flatten() * unit
    assert lengths.max() <= NORMS[norm] * (1 + 1e-4)
    assert lengths.median() >= 0.95 * NORMS[norm]
    said = meta(root, norm)
    assert said["largest_norm"] == pytest.approx(lengths.max().item(), rel=1e-3)
    assert (said["epsilon"], said["iterations"], said["loss"]) == (NORMS[norm], 5, "ce")
    assert said["attacked_accuracy"] <= said["clean_accuracy"]


def test_accuracy_falls_with_epsilon_to_almost_nothing(root, tmp_path):
    found = []
    for epsilon in (0, 4, 16, 64):
        line = f"--norm l_inf --attack_iters 10 --epsilon {epsilon} --savepath {tmp_path}"
        assert run(root, attack, line) == 0
        found.append(meta(tmp_path, "l_inf", 10)["attacked_accuracy"])
    assert found[0] == meta(tmp_path, "l_inf", 10)["clean_accuracy"] > 70
    assert found == sorted(found, reverse=True)
    assert found[-1] <= 5


def test_every_attack_flag_is_honoured(root, tmp_path, capsys):
    line = "--norm l_2 --attack_iters 3 --attack_type cw --restarts 2 --eval --pgd-alpha 0.1"
    assert run(root, attack, f"{line} --batch_size 5 --savepath {tmp_path}", 12) == 0
    assert "cannot reach" in capsys.readouterr().err
    said = meta(tmp_path, "l_2", 3)
    assert (said["loss"], said["restarts"], said["early_stop"]) == ("margin", 2, True)
    assert (said["step_size"], said["images"]) == (0.1, 12)
    assert run(root, inference, f"--norm l_2 --savepath {tmp_path}", 12) == 0
    assert f"{said['attacked_accuracy']:.1f} [" in capsys.readouterr().out


def test_same_seed_same_set_another_seed_another(root, tmp_path):
    sets = []
    for i, seed in enumerate((3, 3, 4)):
        line = f"--norm l_inf --attack_iters 1 --seed {seed} --savepath {tmp_path / str(i)}"
        assert run(root, attack, line, 8) == 0
        sets.append(np.load(tmp_path / str(i) / "pgd/l_inf/test_perturbed_X_l_inf_1.npy"))
    assert np.array_equal(sets[0], sets[1]) and not np.array_equal(sets[0], sets[2])


def test_the_classifier_stays_as_it_was(root):
    """All commands above leave the very file, and its hash is the one in every set's meta."""
    sums = {meta(root, norm)["checkpoint_sha256"] for norm in NORMS}
    content = checkpoint.load(weights(root, "ssl"))
    assert sums == {content["classifier_sha256"]} == {classifier.sha256(weights(root))}


@pytest.mark.parametrize(
    ("norm", "epsilon", "kind"),
    [
        ("l1", 60.0, "L1PGD"),
        ("l1", 60.0, "SparseL1DescentAttack"),
        ("l2", 2.0, "L2PGD"),
    ],
)
def test_our_attacks_are_at_least_as_strong_as_foolboxs(root, norm, epsilon, kind):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is an optional dependency")
    model = classifier.load(weights(root), "narrow", CLASSES).model
    images = list_images("cifar10", root, "test").sample(0)
    x, y = images.x / 255, images.y
    options = {"rel_stepsize": 0.125, "steps": 20, "random_start": norm == "l2"}
    theirs = getattr(foolbox.attacks, kind)(**options)
    public = foolbox.PyTorchModel(model, bounds=(0, 1))
    _, x_theirs, _ = theirs(public, x, y, epsilons=epsilon)
    pixels, generator = reversal.pixels_of(norm), torch.Generator().manual_seed(0)
    same = {"norm": norm, "epsilon": epsilon, "steps": 20, "random_start": norm == "l2"}
    ours = PGD(**same, pixels=pixels, generator=generator)
    left, expected = (
        (model(v).argmax(1) == y).float().mean() for v in (ours.perturb(model, x, y), x_theirs)
    )
    print(f"{norm}: foolbox's {kind} leaves {expected:.3f}, ours {left:.3f}")
    assert left <= expected + 2 / len(y)


# ---------------------------------------------------------------------------------------------
# What is refused, in one line
# ---------------------------------------------------------------------------------------------


def refused(capsys, status: int) -> str:
    assert status == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_a_set_for_another_checkpoint_is_refused_unless_told(root, tmp_path, capsys):
    content = checkpoint.load(weights(root))
    content["epoch"] = 99
    checkpoint.save(other := tmp_path / "other.pth.tar", content)
    line = f"--norm l_2 --weights {other}"
    assert "another checkpoint" in refused(capsys, run(root, inference, line, 8))
    assert run(root, inference, f"{line} --transfer", 8) == 0
    line = f"--task SSL --weights {other} --head {weights(root, 'ssl')}"
    assert "another classifier" in refused(capsys, run(root, inference, line, 8))
    assert "--task SSL" in refused(capsys, run(root, inference, f"--task SSL --weights {other}", 8))


def test_a_damaged_set_or_one_of_other_classes_is_one_line(root, tmp_path, capsys):
    shutil.copytree(root / "pgd", tmp_path / "pgd")
    labels = tmp_path / "pgd" / "l_1" / "test_perturbed_y_l_1_5.npy"
    line = f"--norm l_1 --savepath {tmp_path}"
    np.save(labels, np.full(64, CLASSES))
    assert "other images" in refused(capsys, run(root, inference, line))
    labels.write_bytes(labels.read_bytes()[:100])
    assert "damaged" in refused(capsys, run(root, inference, line))
    labels.unlink()
    assert "damaged" in refused(capsys, run(root, inference, line))


def test_missing_or_foreign_files_are_one_line(root, tmp_path, capsys):
    missing = f"--weights {tmp_path / 'no.pth.tar'}"
    assert "no checkpoint" in refused(capsys, run(root, attack, missing))
    foreign = f"--arch wrn-10-1 --weights {weights(root)}"
    assert "does not fit" in refused(capsys, run(root, inference, foreign))
    head = f"--task SSL --head {weights(root)}"
    assert "belongs to another" in refused(capsys, run(root, inference, head))
    assert "attack.py --norm l_1 --attack_iters 7" in refused(
        capsys, run(root, inference, "--norm l_1 --iter 7")
    )
    assert "train one with" in refused(capsys, run(root, attack, "--arch preact18"))
    assert "no CIFAR-10" in refused(capsys, run(tmp_path, train, "--task Clean"))
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert "try --download" in refused(capsys, run(tmp_path, attack, ""))
    line = "--dataset miniplaces"
    assert "label file" in refused(capsys, run(tmp_path, attack, line))
    assert "--device" in refused(capsys, run(root, attack, "--device tpu"))


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (attack, "--norm l_3"),
        (attack, "--epsilon -1"),
        (attack, "--norm all --epsilon 8"),
        (inference, "--task ssl"),
        (train, "--task SSL --n_views 4 --cached_views 2"),
        (train, "--task Clean --arch wrn-29-10"),
        (evaluate, "--protocol slow"),
    ],
)
def test_unknown_words_end_with_one_line_and_status_2(command, line, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(line.split())
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_script_runs_from_code_as_the_readme_says(tmp_path):
    command = [sys.executable, "reverse_attack/attack.py", "--data-root", str(tmp_path)]
    done = subprocess.run(command, cwd=CODE, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no CIFAR-10 in") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def test_images_come_shuffled_once_held_out_never_trained_on_and_from_the_cache(root):
    listing = list_images("cifar10", root, "train")
    train_set, held_out = listing.split(seed=1)
    assert len(held_out) == round(0.04 * CLASSES * TRAIN)
    assert len(train_set) + len(held_out) == CLASSES * TRAIN
    assert not torch.equal(train_set.y, train_set.y.sort().values)
    again, same = list_images("cifar10", root, "train").split(seed=2)
    assert torch.equal(held_out.x, same.x)
    assert not torch.equal(train_set.x, again.x)
    seen = {image.numpy().tobytes() for image in train_set.x}
    assert not seen & {image.numpy().tobytes() for image in held_out.x}
    (cache,) = (root / "cache").glob("cifar10-train-*.npy")
    stored = np.load(cache)
    stored[:] = 7  # what the cache says is what is read, until a file changes
    np.save(cache, stored)
    assert (list_images("cifar10", root, "train").split(1)[0].x == 7).all()
    listing.paths[0].touch()
    assert not (list_images("cifar10", root, "train").split(1)[0].x == 7).all()


def test_main_pys_classifiers_can_be_attacked_and_reversed(sample_root, tmp_path, monkeypatch):
    from deepvision.models import registry

    monkeypatch.setattr(run_logger, "LOGS", tmp_path / "logs")
    net = registry.create_model("torch_conv", 10)
    content = {"kind": "torch_conv", "epoch": 1, "state_dict": net.state_dict()}
    checkpoint.save(path := tmp_path / "scene.pth.tar", content)
    common = ["--dataset", "miniplaces", "--data-root", str(sample_root), "--weights", str(path)]
    common += ["--limit", "6"]
    out = ["--savepath", str(tmp_path)]
    assert attack.main(["--norm", "l_2", "--attack_iters", "1", *common, *out]) == 0
    said = meta(tmp_path, "l_2", 1)
    assert said["largest_norm"] == pytest.approx(0.5, rel=1e-3) and said["images"] == 6
    assert train.main(["--task", "SSL", "--epochs", "1", "--n_views", "2", *common]) == 0
    assert inference.main(["--task", "SSL", "--attack_iter", "1", "--n_views", "2", *common]) == 0


def test_the_public_checkpoints_prefix_and_unused_block_are_ignored(tmp_path):
    from reverse_attack import resnets

    torch.manual_seed(1)
    net = resnets.build("wrn-10-2", 10)
    state = {f"module.{k}": v for k, v in net.state_dict().items()}
    state |= {f"module.sub_block1.{k}": v for k, v in net.block1.state_dict().items()}
    torch.save({"state_dict": state, "num_epochs": 3}, path := tmp_path / "public.pt.ckpt")
    model = classifier.load(path, "wrn-10-2", 10).model
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), net.eval()(x))
    assert {k.replace("_", ""): v for k, v in NORMS.items()} == reversal.BUDGETS
