"""Which pixels drive the prediction: gradient maps and Grad-CAM.

The gradient of the predicted class's loss (Simonyan et al., 2014, section 3), and Grad-CAM
(Selvaraju et al., 2017). torch.autograd.grad leaves no gradient in the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deepvision.attacks import frozen_eval_mode


def saliency(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (N, H, W) in [0, 1] and logits (N, K) for x (N, C, H, W).

    A map holds the largest |gradient| over the channels, divided by its maximum.
    """
    with frozen_eval_mode(model):
        x = x.detach().clone().requires_grad_(True)
        logits = model(x)
        loss = F.cross_entropy(logits, logits.argmax(1), reduction="sum")
        (g,) = torch.autograd.grad(loss, x)
    return _to_unit(g.float().abs().amax(1)), logits.detach()


def grad_cam(model: nn.Module, x: Tensor) -> Tensor | None:
    """Grad-CAM maps (N, H, W) in [0, 1] of the predicted class, for x (N, C, H, W).

    relu(sum_k alpha_k A^k), where A^k is the k-th activation map and alpha_k the mean of the
    logit's gradient over it (eq. 1 and 2), enlarged to the image. A is the last feature map of the
    network (see `FeatureMaps`). None if fewer than two convolutions ran, as in a transformer with a
    patch embedding.
    """
    layers = [m for m in model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 4]
    maps = FeatureMaps()
    hooks = [layer.register_forward_hook(maps.convolution_ran) for layer in layers]
    try:
        with frozen_eval_mode(model):
            x = x.detach().clone().requires_grad_(True)  # parameters are frozen: x makes the graph
            with maps:
                # not model(x): a compiled network would not call the hooks
                top = model.forward(x).amax(1)
    finally:
        for hook in hooks:
            hook.remove()
    A, g = maps.last_used_by(top.sum())
    if g is None or maps.convolutions < 2:
        return None
    alpha = g.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
    cam = (alpha * A.detach()).sum(1, keepdim=True).relu().float()  # (N, 1, h, w)
    cam = F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)
    return _to_unit(cam.squeeze(1))


class FeatureMaps(TorchFunctionMode):
    """Records the outputs of convolutions, and what is computed from them in the same shape.

    The last one is the activation after the last convolution's normalisation and nonlinearity, or
    after the shortcut of the last residual block, whether layers work in place or not. A 1 x 1 map
    counts only if there is no larger one: in a squeeze-and-excitation gate it has no position.

    convolutions: how many ran; found: the maps (N, C, h, w) in the order of their computation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions, self.found = 0, []

    def convolution_ran(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        """A forward hook of the network's convolutions."""
        self.convolutions += 1
        if not self.found or output[0, 0].numel() > 1:
            self.found.append(output)

    def last_used_by(self, score: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The last map that the score depends on, and the score's gradient over it."""
        for A in reversed(self.found):
            (g,) = torch.autograd.grad(score, A, retain_graph=True, allow_unused=True)
            if g is not None:
                return A, g
        return None, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tracked = isinstance(output, Tensor) and output.requires_grad
        if tracked and self.found and output.shape == self.found[-1].shape:
            self.found.append(output)
        return output


def _to_unit(maps: Tensor) -> Tensor:
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
