"""A drawn data set with a classifier, a head and attack sets, made once by the commands."""

from __future__ import annotations

import pytest
from reverse_toys import draw_images, run

from reverse_attack import attack, train


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reverse")
    draw_images(folder)
    clean = "--task Clean --epochs 6 --batchsize 16 --lr 0.1"
    assert run(folder, train, clean, limit=160) == 0
    assert run(folder, train, "--task SSL --epochs 3 --lr 1e-2 --cached_views 4") == 0
    assert run(folder, attack, "--attack_iters 5 --norm all") == 0
    return folder
