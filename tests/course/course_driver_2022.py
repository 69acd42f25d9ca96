"""A driver that uses the assignment's files as the editions 2022 and 2023 do.

python course_driver_2022.py DATA: trains a CNN for two steps on transforms that take the
normalisation, evaluates with saliency maps, and prints one line.
"""

import sys

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

import custom_transforms as transforms
from custom_dataloader import MiniPlacesLoader
from student_code import (
    default_attention,
    default_cnn_model,
    default_visfunction,
    get_train_transforms,
    get_val_transforms,
)

normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
root = sys.argv[1]
torch.manual_seed(2024)
train_set = MiniPlacesLoader(root, split="train", transforms=get_train_transforms(normalize))
val_set = MiniPlacesLoader(root, split="val", transforms=get_val_transforms(normalize))
model, criterion = default_cnn_model(num_classes=100), nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step, (images, target) in enumerate(DataLoader(train_set, batch_size=8, shuffle=True)):
    loss = criterion(model(images), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 1:
        break
images, _ = next(iter(DataLoader(val_set, batch_size=4)))
saliency = default_attention(criterion).explain(model.eval(), images)
grid = np.asarray(default_visfunction(images, vis_output=saliency))
print(np.isfinite(loss.item()), tuple(saliency.shape), grid.shape[0])
