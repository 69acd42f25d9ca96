"""Batches whose every sample follows from (seed, epoch, index).

A resumed run must train on the samples it would have trained on. So the order of an epoch is
computed from the seed and the epoch (`ResumableBatchSampler`), and so is a table of the random
numbers of the course's transforms, one row per sample (`uniform_table`). A student's own transforms
draw from generators that are seeded before each sample (`SeededDataset`). Neither the number of
workers nor the batch at which a run was interrupted matters.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from multiprocessing import resource_tracker

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from tqdm import tqdm

from deepvision.runtime import memory
from deepvision.runtime.errors import DEAD_WORKER, NO_MEMORY
from utils import DamagedImageWarning, UserError

CPU = torch.device("cpu")
VALIDATION_BATCH = 100

Key = tuple[int, int]  # (epoch, index)
Fetched = list | tuple[Tensor, Tensor] | UserError  # samples, a whole batch, or why there is none
WHOLE = slice(0, None, 1)


class ResumableBatchSampler:
    """A batch sampler whose order follows from (seed, epoch); yields lists of (epoch, index).

    share: the slice of each batch that this process of a distributed run takes.
    The last partial batch is dropped. Call `set_position` before each epoch; the length is always
    that of a whole epoch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, share: slice = WHOLE) -> None:
        self.n, self.batch_size, self.seed, self.share = n, batch_size, seed, share
        self.set_position(0)

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Make the next iteration yield the batches of `epoch` from `start_batch` on."""
        self.epoch, self.start_batch = epoch, start_batch

    def indices(self, epoch: int, batch: int) -> list[int]:
        """The indices of the samples of one batch, of all processes."""
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

    A data set with an `image_shape` writes whole batches from rows of the epoch's table. For any
    other, the generators of Python, NumPy and torch are seeded before each sample, because
    students' transforms draw from any of them, and restored after each batch, because without
    workers they are the trainer's.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> tuple[Fetched, list[str]]:
        """The samples of a batch of one epoch, and a line for each image that is damaged.

        A UserError is returned in place of the samples: torch would wrap one that a worker raises
        in the worker's traceback. `SeededLoader` raises it.
        """
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        try:
            with _collected_damage() as damage:
                return self._fetch(keys), damage
        except UserError as e:
            return e, []
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])

    def _fetch(self, keys: list[Key]) -> Fetched:
        """Samples, or a whole batch if the data set can write to memory that it is given."""
        if set_epoch := getattr(self.dataset, "set_epoch", None):
            set_epoch(keys[0][0])
        if not (shape := getattr(self.dataset, "image_shape", None)):
            return [self.dataset[index] for index in map(self._seed, keys)]
        transforms, (epoch, _), indices = self.dataset.transforms, keys[0], [i for _, i in keys]
        images = _empty_batch((len(keys), *shape), transforms.dtype)
        u = uniform_table(self.seed, epoch, len(self), transforms.draws)[indices]
        return images, torch.tensor(self.dataset.write(indices, images.numpy(), u))

    def _seed(self, key: Key) -> int:
        """Seed the three generators for one sample; return its index."""
        epoch, index = key
        sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch, index))
        words = [int(word) for word in sequence.generate_state(4, np.uint64)]
        random.seed(words[0] << 64 | words[1])
        np.random.seed(words[2] >> 32)  # noqa: NPY002 - the generator students use
        # not torch.manual_seed, which would reseed the GPU as well
        torch.default_generator.manual_seed(words[3] >> 1)
        return index


@lru_cache(maxsize=2)  # of the training and the validation set
def uniform_table(seed: int, epoch: int, n: int, draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float32 (n, draws): row i makes the augmentation of sample i.

    They follow from (seed, epoch), independent of the epoch's order.
    """
    sequence = np.random.SeedSequence((seed, epoch), spawn_key=(0,))
    return np.random.default_rng(sequence).random((n, draws), np.float32)


@contextlib.contextmanager
def _collected_damage() -> Iterator[list[str]]:
    """Collect the text of `DamagedImageWarning`s; other warnings are shown at the end."""
    damage: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DamagedImageWarning)
        yield damage
    for warning in caught:
        if issubclass(warning.category, DamagedImageWarning):
            damage.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _empty_batch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a batch; a worker's is shared with the trainer, as in default_collate."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(dtype.itemsize * math.prod(shape))
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


class SeededLoader(DataLoader):
    """A DataLoader over `SeededDataset` that works the same under every start method.

    It raises a worker's UserError unchanged, and prints each damaged image once. Where the workers
    write whole batches, the images are made from these on `device` (`transforms.finish`).
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_sampler,
        seed: int,
        workers: int,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(
            SeededDataset(dataset, seed),
            batch_sampler=batch_sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            worker_init_fn=worker_init,
            # DataLoader draws a seed for each pass: from here, not from the trainer's generator
            generator=torch.Generator(),
            pin_memory=device.type == "cuda",
        )
        self.device = device
        self.workers_to_start = workers
        self.reported: set[str] = set()  # damaged images

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        try:
            for batch, damage in self._start_pass():
                if isinstance(batch, UserError):
                    # a copy: an error and the frame that holds it are a cycle, and where workers
                    # are garbage of a cycle, torch waits 5 s for them
                    raise UserError(*batch.args)
                self._report(damage)
                yield self._finish(batch)
        except (ConnectionError, EOFError):  # a worker died while it handed over a batch
            raise UserError(DEAD_WORKER.format(NO_MEMORY)) from None

    def _finish(self, batch: list[Tensor]) -> tuple[Tensor, ...]:
        """A batch with its images made from what the workers wrote, where they wrote it whole."""
        dataset: Dataset = self.dataset.dataset
        if not getattr(dataset, "image_shape", None):
            return tuple(batch)
        return dataset.transforms.finish(batch[0], self.device), *batch[1:]

    def _start_pass(self) -> Iterator:
        """torch's iterator; the first call starts the workers, which stay."""
        if not self.workers_to_start:
            return super().__iter__()
        self.workers_to_start = 0
        memory.release_freed_memory()
        with blocked_signals():
            try:
                return super().__iter__()
            except (pickle.PicklingError, AttributeError, TypeError) as e:
                if "pickle" not in str(e) and "local object" not in str(e):  # Python 3.13's words
                    raise
                raise UserError(
                    f"the transforms cannot be sent to other processes ({e}): define their "
                    "functions and classes at the top level of a module, or use -j 0"
                ) from None

    def _report(self, damage: list[str]) -> None:
        for line in damage:
            if line not in self.reported:
                self.reported.add(line)
                tqdm.write(f"warning: {line}", file=sys.stderr)


def _collate(fetched: tuple[Fetched, list[str]]) -> tuple:
    samples, damage = fetched
    return default_collate(samples) if isinstance(samples, list) else samples, damage


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM while workers start: they inherit the signal mask.

    A signal that was sent meanwhile is delivered at the end. A fork server that starts
    now hands the mask on to the workers that it forks.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # to start it unblocks both signals
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def worker_init(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, except SIGTERM from the trainer; end when the trainer has ended.

    A terminal or a cluster sends both to every process of a group; the batch in work must still
    arrive. The trainer decides when to stop. torch's own workers look for their trainer's death by
    getppid(), which is the fork server where one runs.
    """
    trainer = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(trainer.join,), daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows; it reports the sender
        # libraries may unblock SIGTERM: then any sender ends the worker, but a minute later
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        wait = partial(_wait_for_sigterm, trainer.pid)
        threading.Thread(target=_exit_after, args=(wait,), daemon=True).start()


def _exit_after(wait: Callable[[], None]) -> None:
    wait()
    os._exit(0)


def _wait_for_sigterm(sender: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != sender:
        pass


def training_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    workers: int,
    device: torch.device = CPU,
    share: slice = WHOLE,
) -> SeededLoader:
    """Shuffled batches (N, C, H, W), (N,); `batch_sampler.set_position` chooses epoch and batch.

    device: the trainer's. share: the slice of each batch that this process of a distributed run
    takes.

    Raises:
        UserError: there are fewer images than one batch takes, or the processes cannot share one
            equally.
    """
    if batch_size % share.step:
        raise UserError(f"-b {batch_size} does not divide among {share.step} processes")
    if len(dataset) < batch_size:
        raise UserError(
            f"{len(dataset)} training images do not fill one batch of {batch_size}; "
            f"use -b {len(dataset)} or less"
        )
    sampler = ResumableBatchSampler(len(dataset), batch_size, seed, share)
    return SeededLoader(dataset, sampler, seed, workers, device)


def validation_batches(
    dataset: Dataset, workers: int, device: torch.device = CPU, share: slice = WHOLE
) -> SeededLoader:
    """All images in order, in batches of 100; random transforms repeat in every pass."""
    keys = [(0, index) for index in range(len(dataset))]
    batches = [keys[i : i + VALIDATION_BATCH] for i in range(0, len(keys), VALIDATION_BATCH)]
    if len(batches[-1]) < share.step and len(batches) > 1:  # an image for each process
        batches[-2:] = [batches[-2] + batches[-1]]
    shares = [batch[share] for batch in batches]
    return SeededLoader(dataset, shares, 0, workers, device)


def fixed_subset_batch(dataset: Dataset, size: int) -> tuple[Tensor, Tensor]:
    """`size` images evenly spread over the set, or all, with their labels: (N, C, H, W), (N,).

    Raises:
        UserError: one of them cannot be read.
    """
    indices = np.linspace(0, len(dataset) - 1, min(size, len(dataset))).astype(int).tolist()
    images, labels = next(iter(SeededLoader(dataset, [[(0, i) for i in indices]], 0, workers=0)))
    return images, labels
