"""Training of the self-supervised head on the features of a frozen classifier."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from deepvision import checkpoint
from deepvision.runtime.run_logger import RunLogger, new_run
from reverse_attack import classifier, data, heads
from reverse_attack.classifier import Classifier
from reverse_attack.contrastive import Head, chance, info_nce
from reverse_attack.options import choose_device, write_config
from reverse_attack.views import views
from utils import relpath

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
    similarity: str,
    epochs: int,
    batchsize: int,
    lr: float,
    optim: str,
    seed: int,
) -> Iterator[tuple[Head, float]]:
    """After every epoch the head and its mean training loss."""
    torch.manual_seed(seed)
    head = Head(train.model.last.in_features).to(train.device)
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
            loss = info_nce(head(features), similarity).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        yield head, sum(losses) / len(losses)


@torch.no_grad()
def held_out_loss(head: Head, features: Tensor, similarity: str) -> float:
    """The mean over whole batches of images, so that every view has as many candidates."""
    size = min(JUDGED_BATCH, len(features))
    z = head.eval()(features[: len(features) // size * size])
    return torch.cat([info_nce(batch, similarity) for batch in z.split(size)]).mean().item()


def candidates(features: Tensor) -> int:
    """Among how many views `held_out_loss` has each view find the others of its image."""
    return min(JUDGED_BATCH, len(features)) * features.shape[1] - 1


def train_head(args: Namespace) -> None:
    """Keeps the head of the epoch with the lowest loss on held-out images."""
    device = choose_device(args.device)
    listing = data.list_images(args.dataset, args.data_root, "train")
    trained = classifier.from_args(args, len(listing.classes), device)
    train, val = listing.split(args.seed, args.limit)
    model, seed = trained.model, args.seed
    cached = features_of_views(model, train, k, seed, device) if (k := args.cached_views) else None
    features = ViewFeatures(model, train, args.n_views, device, cached)
    held_out = features_of_views(model, val, args.n_views, seed + 1, device)
    bank = features_of_views(model, train.take(slice(BANK)), 1, seed + 2, device)[:, 0]

    at_chance, best = chance(candidates(held_out)), float("inf")
    folder = new_run(classifier.kind("SSL", args.dataset, trained.arch))
    print(f"Run: {relpath(folder)}")
    write_config(folder, args, device)
    with RunLogger(folder) as book:
        passes = fit(features, args.loss, args.epochs, args.batchsize, args.lr, args.optim, seed)
        for epoch, (head, loss) in enumerate(passes, 1):
            val_loss = held_out_loss(head, held_out, args.loss)
            book.events.scalar("contrastive/train", loss, epoch)
            book.events.scalar("contrastive/held_out", val_loss, epoch)
            line = f"loss {loss:.3f}, held out {val_loss:.3f}, chance {at_chance:.3f}"
            print(f"Epoch {epoch}: {line}", flush=True)
            if val_loss < best:
                best = val_loss
                about = {"loss": args.loss, "n_views": args.n_views, "epoch": epoch}
                about |= {"held_out_loss": val_loss, "chance": at_chance}
                path = folder / "models" / checkpoint.BEST
                heads.save(path, head, bank, trained, **about)
    print(f"Best: {best:.3f} on held-out images, {at_chance - best:.3f} under chance")
