"""Training of the self-supervised head on the features of a frozen classifier."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from deepvision import checkpoint
from deepvision.runtime.run_dir import new_run_dir
from deepvision.runtime.run_logger import RunLogger
from reverse_attack import classifier, heads, options
from reverse_attack.classifier import Classifier, LoadedClassifier
from reverse_attack.contrastive import Head, chance, info_nce
from reverse_attack.data import Images, list_images
from reverse_attack.views import MIN_CROP, views
from utils import relpath

VAL_BATCH = 512  # held-out images that are each other's negatives, for any --batch-size
BANK = 512  # clean images whose features are the fixed negatives
HPARAMS = ("arch", "loss", "n_views", "min_crop", "epochs", "batch_size", "lr", "optim")


@torch.no_grad()
def view_features(
    model: Classifier, images: Images, n: int, seed: int, min_crop: float = MIN_CROP
) -> Tensor:
    """The features (N, n, D) of `n` views of every image."""
    generator = torch.Generator().manual_seed(seed)
    batches = tqdm(
        images.batches(64), total=-(-len(images) // 64), desc="views", leave=False, disable=None
    )
    features = []
    for x, _ in batches:
        batch = views(x.to(model.mean.device), n, generator, min_crop)  # (N, n, 3, H, W)
        features.append(model.features(batch.flatten(0, 1)).unflatten(0, batch.shape[:2]))
    return torch.cat(features)


@dataclass
class ViewFeatures:
    """Shuffled batches of features (B, V, D) of views of training images.

    cached: features (N, at least V, D) of views that were made once; None = new views each time.
    """

    model: Classifier
    images: Images
    n_views: int
    cached: Tensor | None = None
    min_crop: float = MIN_CROP

    def __call__(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The batches of one epoch, in an order drawn from `generator`."""
        order = torch.randperm(len(self.images), generator=generator)
        for i in range(max(1, len(order) // size)):
            indices = order[i * size : (i + 1) * size]
            if self.cached is None:
                seed = int(torch.randint(2**31, (), generator=generator))
                images = self.images.take(indices)
                yield view_features(self.model, images, self.n_views, seed, self.min_crop)
            else:
                which = torch.rand(len(indices), self.cached.shape[1], generator=generator)
                which = which.argsort(1)[:, : self.n_views].to(self.cached.device)
                yield self.cached[indices.to(self.cached.device).unsqueeze(1), which]


def fit(
    train: ViewFeatures,
    similarity: str,
    epochs: int,
    batch_size: int,
    lr: float,
    optim: str,
    seed: int,
) -> Iterator[tuple[Head, float]]:
    """After every epoch, the head and its mean training loss."""
    torch.manual_seed(seed)
    head = Head(train.model.last.in_features).to(train.model.mean.device)
    optimizer = (
        torch.optim.Adam(head.parameters(), lr)
        if optim == "Adam"
        else torch.optim.SGD(head.parameters(), lr, momentum=0.9)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        losses = []
        for features in train(batch_size, generator):
            head.train()
            loss = info_nce(head(features), similarity).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        yield head, sum(losses) / len(losses)


@torch.no_grad()
def held_out_loss(head: Head, features: Tensor, similarity: str) -> float:
    """The mean loss over full batches of features (N, V, D): each view has as many candidates."""
    size = min(VAL_BATCH, len(features))
    z = head.eval()(features[: len(features) // size * size])
    return torch.cat([info_nce(batch, similarity) for batch in z.split(size)]).mean().item()


def count_candidates(features: Tensor) -> int:
    """The number of candidates of each view in `held_out_loss` of features (N, V, D)."""
    return min(VAL_BATCH, len(features)) * features.shape[1] - 1


def train_head(args: Namespace) -> None:
    """Train; save the head of the epoch with the lowest held-out loss."""
    index = list_images(args.dataset, args.data_root, "train")
    loaded = classifier.from_args(args, len(index.classes))
    train, val = index.split(args.seed, args.limit)
    features, held_out, bank = prepare_features(args, loaded, train, val)

    at_chance, best = chance(count_candidates(held_out)), float("inf")
    run_dir = new_run_dir(args.logs, classifier.run_kind("SSL", args.dataset, loaded.arch))
    print(f"Run: {relpath(run_dir)}")
    with RunLogger(run_dir) as logger:
        logger.log_config(options.record(args), {k: getattr(args, k) for k in HPARAMS})
        epochs = fit(
            features, args.loss, args.epochs, args.batch_size, args.lr, args.optim, args.seed
        )
        for epoch, (head, loss) in enumerate(epochs, 1):
            val_loss = held_out_loss(head, held_out, args.loss)
            logger.add_curve_point("contrastive/loss", "train", loss, epoch)
            logger.add_curve_point("contrastive/loss", "held_out", val_loss, epoch)
            losses = f"loss {loss:.3f}, held out {val_loss:.3f}, chance {at_chance:.3f}"
            print(f"Epoch {epoch}: {losses}", flush=True)
            if val_loss < best:
                best = val_loss
                record = {"loss": args.loss, "n_views": args.n_views, "epoch": epoch}
                record |= {"held_out_loss": val_loss, "chance": at_chance}
                record |= {"min_crop": args.min_crop}
                path = run_dir / "models" / checkpoint.BEST
                heads.save(path, head, bank, loaded, **record)
    print(f"Best: {best:.3f} on held-out images, {at_chance - best:.3f} below chance")


def prepare_features(
    args: Namespace, loaded: LoadedClassifier, train: Images, val: Images
) -> tuple[ViewFeatures, Tensor, Tensor]:
    """Training batches, features of held-out views (N, V, D), and the bank (M, D)."""
    model, n, seed, min_crop = loaded.model, args.n_views, args.seed, args.min_crop
    k = args.cached_views
    cached = view_features(model, train, k, seed, min_crop) if k else None
    features = ViewFeatures(model, train, n, cached, min_crop)
    held_out = view_features(model, val, n, seed + 1, min_crop)
    bank = view_features(model, train.take(slice(BANK)), 1, seed + 2, min_crop)[:, 0]
    return features, held_out, bank
