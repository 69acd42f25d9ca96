"""Batches whose every sample follows from (seed, epoch, index).

A resumed run must see the pictures it would have seen. So the order of an epoch is computed, not
drawn (`EpochBatches`), and each sample seeds the random numbers of its own augmentation
(`Reproducible`): neither the number of workers nor the batch at which a run was cut matters.
"""

from __future__ import annotations

import math
import os
import random
import signal
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from deepvision.runtime import memory
from utils import UserError

VALIDATION_BATCH = 100

Key = tuple[int, int]  # (epoch, index)
WHOLE = slice(0, None, 1)


class ResumableBatchSampler:
    """A batch sampler whose order follows from (seed, epoch); yields lists of (epoch, index).

    share: the part of each batch that is yielded; several processes take one each.
    The last partial batch is dropped. Call `set_position` before each epoch; the length is always
    that of a whole epoch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, share: slice = WHOLE) -> None:
        self.n, self.batch_size, self.seed, self.share = n, batch_size, seed, share
        self.set_position(0)

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """The next iteration yields the batches of `epoch` from `start_batch` on."""
        self.epoch, self.start_batch = epoch, start_batch

    def indices(self, epoch: int, batch: int) -> list[int]:
        """The samples of one batch, to name them in a message."""
        start = batch * self.batch_size
        return self._order(epoch)[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        return self.n // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, size = self.epoch, self.batch_size
        order = self._order(epoch).tolist()
        for batch in range(self.start_batch, len(self)):
            whole = order[batch * size : (batch + 1) * size]
            yield [(epoch, index) for index in whole[self.share]]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.n)


class SeededDataset(Dataset):
    """`dataset` under keys (epoch, index): each sample's random numbers follow from (seed, key).

    Python's, NumPy's and torch's generators are seeded before each sample, for the transforms of
    students, too, and put back after each batch, since without workers they are the trainer's own.

    A UserError is returned in the batch's place: raised in a worker, torch would wrap it in that
    worker's traceback. `Batches` raises it.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> list | tuple[Tensor, Tensor] | UserError:
        """Samples, or a whole batch if the data set can write to memory that it is given."""
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        try:
            if shape := getattr(self.dataset, "image_shape", None):
                return self._batch(keys, shape)
            return [self.dataset[index] for index in map(self._seed, keys)]
        except UserError as e:
            return e
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])

    def _batch(self, keys: list[Key], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        images = _room(len(keys), *shape)
        rooms = zip(keys, images.numpy(), strict=True)
        labels = [self.dataset.write(self._seed(key), room) for key, room in rooms]
        return images, torch.tensor(labels)

    def _seed(self, key: Key) -> int:
        epoch, index = key
        random.seed(f"{self.seed} {epoch} {index}")  # a string is hashed: neighbours differ
        np.random.seed(random.getrandbits(32))  # noqa: NPY002 - the generator students use
        # not torch.manual_seed, which would reseed the GPU as well
        torch.default_generator.manual_seed(random.getrandbits(63))
        return index


def _room(*shape: int) -> Tensor:
    """Memory for a batch; a worker's is shared with the trainer, as that of default_collate is."""
    if get_worker_info() is None:
        return torch.empty(shape)
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))
    return torch.empty(0).set_(storage, 0, shape)


class SeededLoader(DataLoader):
    """A DataLoader over `Reproducible`: raises a worker's UserError as it was.

    A data set's `device_transform`, where it has one, makes the images of what the workers deliver.
    """

    def __init__(self, dataset: Dataset, batch_sampler, seed: int, workers: int, **options) -> None:
        super().__init__(
            SeededDataset(dataset, seed),
            batch_sampler=batch_sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            worker_init_fn=worker_init,
            # DataLoader draws a seed for each pass; from here, not from the trainer's numbers
            generator=torch.Generator(),
            **options,
        )
        self.device_transform = getattr(dataset, "device_transform", lambda images: images)
        self.forks = workers > 0

    def __iter__(self) -> Iterator:
        if self.forks:
            memory.release_freed_memory()
            self.forks = False  # the workers stay
        try:
            for batch in super().__iter__():
                if isinstance(batch, UserError):
                    raise batch
                yield self.device_transform(batch[0]), *batch[1:]
        except (ConnectionError, EOFError):  # a worker died while it handed over a batch
            raise UserError(DEAD_WORKER.format(NO_MEMORY)) from None


def worker_init(worker: int) -> None:
    """Ctrl-C and SIGTERM may reach every process of a group; the trainer decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # tells who sent it
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # if a library unblocks it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


DEAD_WORKER = "a process that loads images died ({}): use fewer of them, -j 1 or -j 0"
NO_MEMORY = "memory may have run out, or /dev/shm is full"


def worker_death(error: RuntimeError) -> UserError | None:
    """What to tell of an error with which torch reports a dead worker, at any point of a run."""
    text = str(error)
    if "DataLoader worker" in text and "Caught" not in text:
        return UserError(DEAD_WORKER.format(NO_MEMORY))
    if "shared memory" in text or "No space left on device" in text:
        return UserError(DEAD_WORKER.format("/dev/shm is full"))
    return None


def _collate(samples: list | tuple[Tensor, Tensor] | UserError):
    return default_collate(samples) if isinstance(samples, list) else samples


def training_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    workers: int,
    pin_memory: bool = False,
    share: slice = WHOLE,
) -> SeededLoader:
    """Shuffled batches (N, C, H, W), (N,); `.batch_sampler.set_position(epoch, batch)` steers them.

    Raises:
        UserError: there are fewer images than one batch takes, or a batch has no equal shares.
    """
    if batch_size % share.step:
        raise UserError(f"-b {batch_size} does not divide among {share.step} processes")
    if len(dataset) < batch_size:
        raise UserError(
            f"{len(dataset)} training images do not fill one batch of {batch_size}; "
            f"use -b {len(dataset)} or less"
        )
    sampler = ResumableBatchSampler(len(dataset), batch_size, seed, share)
    return SeededLoader(dataset, sampler, seed, workers, pin_memory=pin_memory)


def validation_batches(
    dataset: Dataset, workers: int, pin_memory: bool = False, share: slice = WHOLE
) -> SeededLoader:
    """All images in order, in batches of 100; transforms that draw, draw the same every time."""
    keys = [(0, index) for index in range(len(dataset))]
    batches = [keys[i : i + VALIDATION_BATCH] for i in range(0, len(keys), VALIDATION_BATCH)]
    if len(batches[-1]) < share.step and len(batches) > 1:  # an image for each process
        batches[-2:] = [batches[-2] + batches[-1]]
    shares = [batch[share] for batch in batches]
    return SeededLoader(dataset, shares, 0, workers, pin_memory=pin_memory)


def fixed_subset_batch(dataset: Dataset, size: int) -> tuple[Tensor, Tensor]:
    """`size` images evenly spread over the set, or all, with their labels: (N, C, H, W), (N,).

    Raises:
        UserError: one of them cannot be read.
    """
    indices = np.linspace(0, len(dataset) - 1, min(size, len(dataset))).astype(int).tolist()
    images, labels = next(iter(SeededLoader(dataset, [[(0, i) for i in indices]], 0, workers=0)))
    return images, labels
