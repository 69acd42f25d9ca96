"""Training of the self-supervised head on the features of a frozen classifier."""

from __future__ import annotations

import copy
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import classifier
import data
from classifier import Classifier, Trained
from contrastive import ContrastiveLoss, Head, chance, info_nce
from logbook import Logbook, new_run
from options import choose_device, write_config
from utils import UserError
from views import views

JUDGED_BATCH = 512  # held-out images that are each other's negatives, whatever --batchsize
BANK = 512  # clean images whose features are the fixed negatives


@torch.no_grad()
def features_of_views(
    model: Classifier, images: data.Images, n: int, seed: int, device: torch.device
) -> Tensor:
    """`(N, n, D)`: features of `n` views of every image."""
    generator = torch.Generator().manual_seed(seed)
    batches = tqdm(
        images.batches(64), total=-(-len(images) // 64), desc="views", leave=False, disable=None
    )
    features = []
    for x, _ in batches:
        seen = views(x.to(device), n, generator)
        features.append(model.features(seen.flatten(0, 1)).unflatten(0, seen.shape[:2]))
    return torch.cat(features)


@dataclass
class ViewFeatures:
    """Batches of features `(B, V, D)` of views of training images, in an order drawn anew.

    From `cached` features `(N, at least V, D)` of views made once, or from views made on the spot.
    """

    model: Classifier
    images: data.Images
    n_views: int
    device: torch.device
    cached: Tensor | None = None

    def __call__(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=generator)
        for i in range(max(1, len(order) // size)):
            chosen = order[i * size : (i + 1) * size]
            if self.cached is None:
                seed = int(torch.randint(2**31, (), generator=generator))
                images = self.images.take(chosen)
                yield features_of_views(self.model, images, self.n_views, seed, self.device)
            else:
                which = torch.rand(len(chosen), self.cached.shape[1], generator=generator)
                which = which.argsort(1)[:, : self.n_views].to(self.device)
                yield self.cached[chosen.to(self.device).unsqueeze(1), which]


def fit(
    train: ViewFeatures,
    held_out: Tensor,
    similarity: str,
    epochs: int,
    batchsize: int,
    lr: float,
    optim: str,
    seed: int,
) -> Iterator[tuple[Head, float, float]]:
    """After every epoch the head, its mean training loss and its loss on held-out features."""
    torch.manual_seed(seed)
    head = Head(held_out.shape[-1]).to(held_out.device)
    optimizer = (
        torch.optim.Adam(head.parameters(), lr)
        if optim == "Adam"
        else torch.optim.SGD(head.parameters(), lr, momentum=0.9)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        losses = []
        for features in train(batchsize, generator):
            head.train()
            z = head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
            loss = info_nce(z, similarity).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        yield head, sum(losses) / len(losses), held_out_loss(head, held_out, similarity)


@torch.no_grad()
def held_out_loss(head: Head, features: Tensor, similarity: str) -> float:
    """The mean over whole batches of images, so that every view has as many candidates."""
    head.eval()
    batches = [
        b for b in features.split(JUDGED_BATCH) if len(b) == min(JUDGED_BATCH, len(features))
    ]
    losses = [
        info_nce(head(b.flatten(0, 1)).unflatten(0, b.shape[:2]), similarity) for b in batches
    ]
    return torch.cat(losses).mean().item()


def candidates(features: Tensor) -> int:
    """Among how many views `held_out_loss` has each view find the others of its image."""
    return min(JUDGED_BATCH, len(features)) * features.shape[1] - 1


def train_head(args: Namespace) -> None:
    """Keeps the head of the epoch with the lowest loss on held-out images."""
    device = choose_device(args.device)
    path = classifier.find(args.weights, args.dataset, args.arch)
    train, val = data.training_images(args.dataset, args.data_root, args.seed, args.limit)
    trained = classifier.load(path, args.arch, len(train.classes), args.bf16)
    model = trained.model.to(device)
    if min(len(train), args.batchsize) * args.n_views < 2:
        raise UserError("one view of one image has nothing to be compared with")
    print(f"Classifier: {os.path.relpath(path)} (frozen)")
    cached = None
    if args.cached_views:
        cached = features_of_views(model, train, args.cached_views, args.seed, device)
    features = ViewFeatures(model, train, args.n_views, device, cached)
    held_out = features_of_views(model, val, args.n_views, args.seed + 1, device)
    bank = features_of_views(model, train.take(slice(BANK)), 1, args.seed + 2, device)[:, 0]

    at_chance = chance(candidates(held_out))
    folder = new_run(classifier.kind("SSL", args.dataset, trained.arch))
    print(f"Run: {os.path.relpath(folder)}")
    best = float("inf")
    write_config(folder, args, device)
    with Logbook(folder) as book:
        passes = fit(
            features,
            held_out,
            args.loss,
            args.epochs,
            args.batchsize,
            args.lr,
            args.optim,
            args.seed,
        )
        for epoch, (head, loss, val_loss) in enumerate(passes, 1):
            book.events.scalar("contrastive/train", loss, epoch)
            book.events.scalar("contrastive/held_out", val_loss, epoch)
            print(
                f"Epoch {epoch}: loss {loss:.3f}, held out {val_loss:.3f}, chance {at_chance:.3f}"
            )
            if val_loss < best:
                best = val_loss
                content = content_of(head, bank, trained, args, epoch, val_loss, at_chance)
                checkpoint.save(folder / "models" / checkpoint.BEST, content)
    print(f"Best: {best:.3f} on held-out images, {at_chance - best:.3f} under chance")


def content_of(
    head: Head,
    bank: Tensor,
    trained: Trained,
    args: Namespace,
    epoch: int,
    val_loss: float,
    at_chance: float,
) -> dict:
    return {
        "epoch": epoch,
        "model_arch": trained.arch,
        "state_dict": copy.deepcopy(head.state_dict()),
        "bank": bank.cpu(),
        "classifier_sha256": trained.sha256,
        "loss": args.loss,
        "n_views": args.n_views,
        "held_out_loss": val_loss,
        "chance": at_chance,
    }


def find_head(path: str | None, trained: Trained, dataset: str) -> tuple[Path, dict]:
    """The file named, else the newest head that was trained on this very classifier.

    Raises:
        UserError: there is none, or it belongs to another classifier.
    """
    if path:
        content = checkpoint.load(path)
        if content.get("classifier_sha256") != trained.sha256:
            raise UserError(
                f"the head {path} was trained on another classifier than {trained.path}"
            )
        return Path(path), content
    for newest in classifier.newest([classifier.kind("SSL", dataset, trained.arch)]):
        content = checkpoint.load(newest)
        if content.get("classifier_sha256") == trained.sha256:
            return newest, content
    raise UserError(
        f"no self-supervised head for {trained.path} yet: train one with "
        "reverse_attack/train.py --task SSL"
    )


def load_head(trained: Trained, path: Path, content: dict) -> tuple[Head, Tensor]:
    """The head and its bank of features, on the CPU.

    Raises:
        UserError: the file does not fit.
    """
    head, bank = Head(trained.model.last.in_features), content.get("bank")
    checkpoint.load_weights(head, content, path)
    fits = isinstance(bank, Tensor) and bank.shape[1:] == (trained.model.last.in_features,)
    if not fits or content.get("loss") not in ("Cosine", "Dot"):
        raise UserError(f"{path} is no self-supervised head of this project")
    return head.eval(), bank


def contrastive_loss(
    trained: Trained,
    head: Head,
    similarity: str,
    n_views: int,
    bank: Tensor | None,
    device: torch.device,
) -> ContrastiveLoss:
    return ContrastiveLoss(trained.model, head, similarity, n_views, bank).to(device).eval()
