"""Which pixels a network's answer hangs on. Torch alone.

The gradient of the most confident class's loss (Simonyan et al., 2014, section 3), and Grad-CAM
(Selvaraju et al., 2017). Gradients come from torch.autograd.grad: none is left in the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvision.attacks.pgd import frozen_eval_mode


def saliency(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Maps in [0, 1] and logits for x (N, C, H, W): (N, H, W), (N, K).

    A map holds the largest |gradient| over the channels, divided by its own largest value.
    """
    with frozen_eval_mode(model):
        x = x.detach().clone().requires_grad_(True)
        logits = model(x)
        (g,) = torch.autograd.grad(_own_loss(logits), x)
    return _to_unit(g.float().abs().amax(1)), logits.detach()


def grad_cam(model: nn.Module, x: Tensor) -> Tensor | None:
    """Maps in [0, 1] (N, H, W) of what the last convolution saw of the most confident class.

    relu(sum_k a_k A_k), A_k the k-th map after the convolution and a_k the mean of the logit's
    gradient over it (eq. 1 and 2), enlarged to the image. None for a network with one convolution
    or none, as a transformer that only cuts patches with it.
    """
    layers = [m for m in model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 4]
    if len(layers) < 2:
        return None
    seen = []
    hook = layers[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        with frozen_eval_mode(model):
            # an input that needs a gradient: the parameters, frozen here, would ask for no graph
            # its forward: the call of a network that was compiled before has no place for the hook
            top = model.forward(x.detach().clone().requires_grad_(True)).amax(1)
            (A,) = seen  # (N, C, h, w); past a ReLU that works in place, what it left
            (g,) = torch.autograd.grad(top.sum(), A)
    finally:
        hook.remove()
    a = g.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
    maps = (a * A.detach()).sum(1, keepdim=True).relu().float()  # (N, 1, h, w)
    maps = F.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)
    return _to_unit(maps.squeeze(1))


def _own_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, logits.argmax(1), reduction="sum")


def _to_unit(maps: Tensor) -> Tensor:
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
