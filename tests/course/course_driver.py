"""A driver that uses the assignment's files as the course's does: only by the contract's names.

python course_driver.py DATA: trains a CNN, one on the custom convolution, and a ViT for a few
steps, evaluates, attacks under no_grad, and prints one line for each.
"""

import sys

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from custom_dataloader import MiniPlacesLoader
from student_code import (
    CustomConv2d,
    default_attack,
    default_cnn_model,
    default_visfunction,
    default_vit_model,
    get_train_transforms,
    get_val_transforms,
)
from utils import AverageMeter, LinearWarmupCosineAnnealingLR


def main(root):
    torch.manual_seed(2024)
    train_set = MiniPlacesLoader(
        root, label_file=None, num_classes=100, split="train", transforms=get_train_transforms()
    )
    val_set = MiniPlacesLoader(root, num_classes=100, split="val", transforms=get_val_transforms())
    train_loader = DataLoader(train_set, batch_size=16, shuffle=True, num_workers=1, drop_last=True)
    val_loader = DataLoader(val_set, batch_size=4, shuffle=False)
    assert set(map(type, train_set.get_index_mapping())) == {str}
    criterion = nn.CrossEntropyLoss()
    models = {
        "cnn": default_cnn_model(num_classes=100),
        "custom": default_cnn_model(conv_op=CustomConv2d, num_classes=100),
        "vit": default_vit_model(num_classes=100),
    }
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, weight_decay=0.05)
        scheduler = LinearWarmupCosineAnnealingLR(optimizer, 1, 3)
        losses = AverageMeter()
        model.train()
        for step, (images, target) in enumerate(train_loader):
            loss = criterion(model(images), target)
            losses.update(loss.data.item(), images.size(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if step == 2:
                break
        model.eval()
        attacker = default_attack(criterion)
        images, target = next(iter(val_loader))
        with torch.no_grad():
            adversarial = attacker.perturb(model, images)
            moved = (adversarial - images).abs().max().item()
            grid = np.asarray(default_visfunction(adversarial, n_rows=5))
        print(name, np.isfinite(losses.avg), round(moved, 4), grid.shape[0])


if __name__ == "__main__":  # workers may import this file
    main(sys.argv[1])
