"""Settings: parsed, validated, restored on resume, given a network's defaults."""

import re
from dataclasses import fields

import pytest
import torch

from deepvision.config import (
    GROUPS,
    NOT_RESTORED,
    SETTINGS,
    RunConfig,
    build_parser,
    parse,
    resolve_defaults,
    restore,
    unit_remarks,
)
from deepvision.runtime.errors import explain
from utils import UserError


def test_every_setting_has_one_flag_with_a_sentence():
    flags = {f.name: f.metadata["help"] for f in fields(RunConfig) if f.metadata}
    assert flags.keys() == SETTINGS.keys() - {"data_folder"}
    assert all(len(text) > 10 for text in flags.values())
    assert SETTINGS.keys() >= NOT_RESTORED | GROUPS.keys()


def test_help_names_every_default():
    text = " ".join(build_parser().format_help().split())
    for name, default in SETTINGS.items():
        if default not in (None, False, "") and isinstance(default, (int, float, str)):
            assert f"default {default}" in text, name


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        parse(["data"]).lr = 1.0


@pytest.mark.parametrize("words", [["--use-vit"], ["--use_vit"]])
def test_underscores_in_flags_are_hyphens(words):
    assert parse(["data", *words]).network == "vit"


def test_a_value_keeps_its_underscores():
    assert parse(
        ["data", "--weights=my_file", "-a", "--resume=a_b", "--attack-goal=least_likely"][:2]
    )
    config = parse(["my_data", "--resume=a_b", "-a", "--attack_goal=least_likely"])
    assert (config.data_folder, config.resume, config.attack_goal) == (
        "my_data",
        "a_b",
        "least_likely",
    )


@pytest.mark.parametrize("spelling", ["linf", "l_inf"])
def test_norms_have_two_spellings(spelling):
    assert parse(["d", "-a", "--resume=x", f"--attack-norm={spelling}"]).attack_norm == "linf"


@pytest.mark.parametrize(
    ("words", "device"),
    [
        ([], None),
        (["--gpu=-1"], -1),
        (["--device=1"], 1),
        (["--device", "cpu"], "cpu"),
        (["--gpu=cuda:1"], "cuda:1"),
        (["--use-mps"], "mps"),
    ],
)
def test_devices(words, device):
    assert parse(["data", *words]).device == device


def test_an_epsilon_of_the_unit_interval_gets_one_line():
    config = parse(["data", "-a", "--resume=x", "--attack-eps", "0.03"])
    (line,) = unit_remarks(config)
    assert line.endswith("0.03/255; 0.03 of [0, 1] is --attack-eps=7.65")
    assert not list(unit_remarks(parse(["data", "--at=pgd", "--at-eps=8"])))


def test_defaults_depend_on_the_network_and_named_values_override_them():
    config = resolve_defaults(parse(["data", "--use-scene-net", "--wd=0"]), "scene_net")
    assert (config.lr, config.wd, config.cutmix) == (0.2, 0.0, 0.25)
    assert resolve_defaults(parse(["data"]), "torch_conv").lr == 0.1
    assert resolve_defaults(parse(["data", "--at=pgd"]), "scene_net").cutmix == 0.0


def test_a_recipe_sets_what_the_command_line_does_not_name():
    config = parse(["data", "--use-scene-net", "--recipe=cpu", "-b=64", "--amp=off"])
    config = resolve_defaults(config, "scene_net")
    assert config.augmentation["sizes"] == [96] * 24 + [112] * 10 + [128] * 6
    assert (config.batch_size, config.amp, config.warmup, config.wd) == (64, "off", 1.5, 5e-4)
    assert resolve_defaults(parse(["data"]), "torch_conv").augmentation is None


def test_a_resumed_run_keeps_its_augmentation_and_its_recipe():
    config = parse(["data", "--use-scene-net", "--recipe=cpu", "--epochs=9"])
    saved = resolve_defaults(config, "scene_net").as_dict()
    resumed = restore(parse(["data", "--use-scene-net", "--resume=x", "--recipe=cpu"]), saved)[0]
    assert resolve_defaults(resumed, "scene_net").as_dict() == saved | {"resume": "x"}
    with pytest.raises(UserError, match="the run has --recipe=cpu"):
        restore(parse(["data", "--resume=x", "--recipe=gpu"]), saved)


def test_runs_from_before_the_augmentation_settings_keep_the_courses():
    old = {"lr": 0.2, "wd": 5e-4, "label_smoothing": 0.1, "cutmix": 0.5, "ema": 0.05, "warmup": 5}
    config = resolve_defaults(restore(parse(["data", "--resume=x"]), old)[0], "scene_net")
    assert config.augmentation is None and (config.cutmix, config.warmup) == (0.5, 5)


def test_unnamed_settings_are_restored_and_named_ones_are_reported():
    saved = resolve_defaults(parse(["data", "--lr=0.3", "--at=free", "-b=7"]), "torch_conv")
    saved = saved.as_dict() | {"gpu": 3, "workers": 9, "evaluate": True, "resume": "old"}
    config, changed = restore(parse(["other", "--resume=x", "--lr=0.5", "-b=7"]), saved)
    assert (config.at, config.batch_size, config.lr) == ("free", 7, 0.5)
    assert (config.gpu, config.resume, config.data_folder) == (None, "x", "other")
    assert not config.evaluate and config.workers == parse(["data"]).workers
    assert changed == {"lr": (0.3, 0.5)}


def test_adversarial_training_can_be_turned_off_by_name():
    saved = resolve_defaults(parse(["data", "--pgd"]), "torch_conv").as_dict()
    assert restore(parse(["data", "--resume=x"]), saved)[0].at == "pgd"
    config, changed = restore(parse(["data", "--resume=x", "--pgd=False"]), saved)
    assert config.at is None and changed == {"at": ("pgd", None)}


def test_a_named_setting_that_contradicts_a_restored_one_is_refused():
    saved = resolve_defaults(parse(["data", "--cutmix=0.5"]), "torch_conv").as_dict()
    with pytest.raises(UserError, match="--cutmix mixes images and --at attacks"):
        restore(parse(["data", "--resume=x", "--at=pgd"]), saved)


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": -1},
        {"epochs": 1.5},
        {"epochs": True},
        {"lr": [0.1]},
        {"lr": "fast"},
        {"amp": "fp8"},
        {"compile": "yes"},
        {"save_every": "1h"},
        {"at": "fast"},
        {"resolution": "96,128"},
    ],
    ids=str,
)
def test_invalid_saved_settings_are_refused(bad):
    with pytest.raises(UserError, match=f"setting {next(iter(bad))} = .* is invalid"):
        restore(parse(["data", "--resume=x"]), bad)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["-b=64", "--cache=ram"], r"use a smaller batch size \(-b 32\)$"),
        (["-b=64"], r"\(-b 32\) or --cache=none$"),
        (["-e", "--resume=x"], r"nvidia-smi"),
        (["-a", "--resume=x", "--attack-suite=standard"], r"--attack-images"),
    ],
)
def test_advice_for_a_full_gpu_depends_on_the_command(words, advice):
    config = parse(["data", *words])
    assert re.search(advice, config.memory_advice)
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert re.search(advice, explain(error, config.memory_advice))


def test_the_resume_command_can_be_pasted():
    config = parse(["my data", "--gpu=-1", "-j", "2", "--lr=0.3"])
    command = config.resume_command("../logs/a b/models/checkpoint.pth.tar")
    assert command == (
        "python main.py 'my data' '--resume=../logs/a b/models/checkpoint.pth.tar' "
        "--gpu=-1 --workers=2"
    )
