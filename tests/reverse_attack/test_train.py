"""train.py: robust training, and both losses of the head."""

from __future__ import annotations

from reverse_toys import run

from deepvision import checkpoint
from deepvision.runtime.jsonl import read_json
from reverse_attack import train


def test_robust_training_and_both_losses_of_the_head_run(root, tmp_path):
    robust = "--task Robust --at fgsm-rs --epochs 1 --arch wrn-10-1 --optim Adam --lr 0.001"
    assert run(root, train, robust, logs=tmp_path) == 0
    heads = "--task SSL --loss Dot --n-views 2 --batchsize 512 --epochs 1 --arch wrn-10-1"
    assert run(root, train, heads, logs=tmp_path) == 0
    path = next(tmp_path.glob(f"cifar10_ssl_wrn-10-1_exp_*/models/{checkpoint.BEST}"))
    content = checkpoint.load(path)
    assert (content["loss"], content["n_views"]) == ("Dot", 2)
    assert content["held_out_loss"] < 3 * content["chance"]
    config = read_json(path.parent.parent / "config.json")
    assert config["command"].startswith("python reverse_attack/train.py --task SSL")
    assert config["arguments"]["n_views"] == 2 and "torch" in config
