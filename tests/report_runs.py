"""Run folders for the tests of the report, as our code and the course's code leave them."""

import json

import torch
from torch.utils.tensorboard import SummaryWriter

import student_code
from deepvision import checkpoint
from deepvision.runtime.meters import Metrics
from deepvision.runtime.run_logger import RunLogger

DIAGNOSTICS = [{"name": "randomised network", "warns": True}, {"name": "large", "warns": False}]
GRID = [(0, 0, 30.0), (1, 1, 20.0), (1, 5, 10.0), (4, 1, 9.0), (4, 5, 0.0)]
SWEEP = [dict(zip(("epsilon_255", "steps", "top1"), point, strict=True)) for point in GRID]
ATTACK = {"attack": "PGD, 10 steps", "clean_top1": 28.571, "probed": 40}
EVALUATIONS = [
    {"mirrored_top1": 1.0},
    {"mirrored_top1": 44.444},
    {"clean_top1": 28.571, "attacked_top1": 3.125},
    {**ATTACK, "attacked_top1": 9.0, "lights": []},
    {**ATTACK, "attacked_top1": 1.005, "lights": DIAGNOSTICS, "sweep": SWEEP},
]
SETTINGS = {"epochs": 3, "batch_size": 64, "lr": 0.05, "warmup": 1.0, "momentum": 0.9, "wd": 1e-4}
SETTINGS |= {"clip_grad": 1.0, "at": None, "seed": 7, "data_folder": "gone"}
CONFIG = {
    "kind": "torch_conv",
    "network": "SimpleNet",
    "data": {"folder": "scenes", "classes": 10, "train": 80, "val": 40, "fingerprint": "00c0ffee"},
    "command": "python main.py scenes --epochs=3",
    "commit": "abc123",
    "device": "a CPU",
    "torch": "2.9",
    "arguments": SETTINGS,
}


def make_network(seed):
    torch.manual_seed(seed)
    return student_code.SimpleNet(num_classes=10)


def write_checkpoint(folder, model, **more):
    (folder / "models").mkdir(exist_ok=True)
    content = {"epoch": 3, "model_arch": "CNN", "state_dict": model.state_dict(), **more}
    checkpoint.save(folder / "models" / checkpoint.BEST, content)


def make_our_run(folder):
    """Three epochs written by our own logger; the recorded data folder does not exist."""
    folder.mkdir()
    with RunLogger(folder) as logger:
        logger.log_config(CONFIG, {"network": "torch_conv"})
        for epoch, top1 in enumerate((31 / 3, 200 / 7, 77 / 3), 1):
            for i in range(4):
                logger.log_step(4 * epoch - 4 + i, 2.5 / epoch + 0.1 * i, 0.01 * epoch)
            train, val = Metrics(2.0, top1 / 2, 50.0), Metrics(2.0, top1, 60 + epoch / 7)
            speed = {"images_per_second": 100.0 * epoch, "peak_memory_bytes": 10**9 - epoch}
            logger.log_epoch(epoch, train, val, speed)
    with open(folder / "evaluations.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in EVALUATIONS)
    write_checkpoint(folder, make_network(0), kind="torch_conv")
    return folder


def make_course_run(folder):
    """What the course's code leaves: event files and a checkpoint."""
    writer = SummaryWriter(folder)
    for i in range(0, 40, 10):
        writer.add_scalar("data/training_loss", 4 - i / 20, i)
        writer.add_scalar("data/learning_rate", i / 400, i)
    for epoch, top1 in ((1, 10.5), (2, 12.25), (3, 12.25)):
        writer.add_scalars("data/top1_accuracy", {"train": top1 + 1, "val": top1}, epoch)
        writer.add_scalars("data/top5_accuracy", {"train": 50, "val": 40 + epoch}, epoch)
    writer.close()
    write_checkpoint(folder, make_network(1), best_acc1=torch.tensor(12.25))
    return folder
