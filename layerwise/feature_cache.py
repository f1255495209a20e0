"""Step 3 of *train*, remembered: batches that entered a unit once are kept and fed again (thesis, section 6.2.2)."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from layerwise.checkpoint import rng_state, set_rng_state
from layerwise.feednet import Batch, Feednet, read_batch
from layerwise.recordings import DiskRecording, MemoryRecording, Recording, bytes_of
from layerwise.units import Chain, Unit

__all__ = ["FeatureCache"]

PLACES = ("memory", "pinned", "disk")
_PROBED = 64  # samples that are drawn twice
_LOOKED_AT = 8  # samples that are drawn again in every epoch, to see whether data or transforms have changed
_END = object()


class FeatureCache:
    """Keeps the batches that enter a window, so that the units below it run once and not in every epoch.

    The first pass over the data records what enters unit `boundary`; later passes feed the same mini-batches in the same
    order (thesis, section 6.2.2). A deeper window starts from the deepest recording below it. A recording is dropped once a
    parameter or buffer of a unit below it has changed, or the data have.

    Whatever is recorded or not, the batches are the same: all passes over the loader draw from generators of their own,
    which begin in the same state every time, apart from those that training draws from. So neither a byte limit nor an
    interruption changes a result.

    Random augmentation makes another data set of every epoch, and recordings wrong. It is found out: some samples are drawn
    twice, under different states of all generators, and compared. If they differ, nothing is recorded, the loader is read
    as usual and the units below run in every epoch; a warning says so.

    Nothing is recorded of what enters the first unit: that is the loader's own.

    Parameters
    ----------
    where : {"memory", "pinned", "disk"}, default="memory"
        On the device that trains; in page-locked memory of the host, for CUDA devices; or in a file without a name, which
        the system removes however the process ends.
    limit_bytes : int, optional
        Most bytes of all recordings; None means no limit. Recordings that have not been used for longest go first. One
        that does not fit beside the one it is made from is given up, with one warning, and computed in every epoch.
    directory : path, optional
        Where that file is; None means the system's directory for temporary files, which is memory on some systems.
    deterministic : bool, default=False
        Declares that a sample is the same in every epoch, or may be. Samples are not compared then, neither to find out
        augmentation nor to see that data were changed in place.
    shuffle_batches : bool, default=False
        Feed the recorded batches in a new random order every epoch, drawn from torch's generator. They are recorded
        before the first of them is fed, and have to fit.

    Raises
    ------
    ValueError
        If an option is unknown, or does not go with the others.
    FileNotFoundError
        If there is no such directory.

    Notes
    -----
    An iterable that is no DataLoader of a map-style data set is compared by its first batch: if its order is random, and
    not by a generator of its own called ``generator``, that looks like augmentation; declare ``deterministic=True``.
    """

    def __init__(
        self,
        where: str = "memory",
        limit_bytes: int | None = None,
        directory: str | os.PathLike[str] | None = None,
        *,
        deterministic: bool = False,
        shuffle_batches: bool = False,
    ) -> None:
        if where not in PLACES:
            raise ValueError(f"where: expected one of {PLACES}, got {where!r}")
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"limit_bytes: expected at least 0, got {limit_bytes}")
        if directory is not None:
            if where != "disk":
                raise ValueError(f"directory: goes with where='disk', got where={where!r}")
            if not Path(directory).is_dir():
                raise FileNotFoundError(f"directory: {os.fspath(directory)!r} is not a directory; make it first")
        self.where = where
        self.limit_bytes = limit_bytes
        self.directory = directory
        self.deterministic = deterministic
        self.shuffle_batches = shuffle_batches
        self._recordings: dict[int, Recording] = {}  # by boundary, the one used last at the end
        self._unfinished: Recording | None = None
        self._refused: set[int] = set()
        self._warned: set[str] = set()
        self._source: _Source | None = None  # of the recordings
        self._look = b""  # digest of some of its samples
        self._random = False
        self._seed: int | None = None
        self._own: list[Tensor | None] = []  # states in which the loader's own generators begin

    # ---- what the trainer calls ----

    def stream(
        self, feednet: Feednet, loader: Iterable[Any], boundary: int, generators: Sequence[torch.Generator | None] = ()
    ) -> Iterator[Batch]:
        """Every batch of the loader as it enters unit `boundary`.

        `generators` are the loader's own. A batch may be changed in place. One stream is read at a time: an unfinished one
        is not recorded.
        """
        if boundary == 0:
            yield from feednet.stream(loader, 0)
            return
        if self.where == "pinned" and feednet.device.type != "cuda":
            raise ValueError(f"where='pinned' is for CUDA devices; on {feednet.device.type} use where='memory'")
        self._give_up_unfinished()
        self._look_at_source(feednet, loader, generators)
        if self._random:
            yield from feednet.stream(loader, boundary)
            return
        units = feednet.chain.units[: max([boundary, *self._recordings])]
        fingerprints = [_fingerprint(unit) for unit in units]
        self._drop_changed(fingerprints)
        key = fingerprints[:boundary]
        if self.shuffle_batches and boundary not in self._recordings:
            for _ in self._record(feednet, loader, boundary, generators, key):
                pass
        recording = self._used(boundary)
        if recording is None:
            yield from self._record(feednet, loader, boundary, generators, key)
            return
        order = torch.randperm(len(recording)).tolist() if self.shuffle_batches else range(len(recording))
        for i in order:
            yield recording.read(i, feednet.device)

    def state_dict(self) -> dict[str, Any]:
        """What the order of the batches follows from. Recordings are made again."""
        return {"seed": self._seed, "own": self._own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self._source = None
        self._seed, self._own = state["seed"], state["own"]

    @property
    def nbytes(self) -> int:
        """Bytes of all recordings."""
        kept = sum(recording.nbytes for recording in self._recordings.values())
        return kept + (self._unfinished.nbytes if self._unfinished is not None else 0)

    @property
    def boundaries(self) -> list[int]:
        """Units whose inputs are recorded."""
        return sorted(self._recordings)

    def close(self) -> None:
        """Drop all recordings. What is asked for later is recorded anew."""
        self._give_up_unfinished()
        for recording in self._recordings.values():
            recording.close()
        self._recordings.clear()
        self._refused.clear()

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- what recordings are of ----

    def _look_at_source(
        self, feednet: Feednet, loader: Iterable[Any], generators: Sequence[torch.Generator | None]
    ) -> None:
        """Begin anew if loader, data, units, device or precision are not those of before."""
        known = self._source
        source = _Source(loader, feednet)
        if known is not None and source.same(known):
            source = known
        elif not self.deterministic:
            source.choose_samples(generators)
        look = source.draw(generators, 0, _LOOKED_AT) if source.by_number and not self.deterministic else b""
        if source is known and look == self._look:
            return
        self.close()
        self._source, self._look = source, look
        self._random = not self.deterministic and (
            getattr(loader, "augmentation", None) is not None
            or source.draw(generators, 0, _PROBED) != source.draw(generators, 1, _PROBED)
        )
        if self._random:
            self._warn(
                "augmentation",
                "samples differ from one draw to the next, so nothing is recorded and the units below run in every epoch; if "
                "that is no augmentation, or the same augmented samples may be fed in every epoch, give "
                "FeatureCache(deterministic=True)",
            )
        elif self._seed is None or (known is not None and known.loader is not loader):
            # Follows from torch's generator and leaves it as it is.
            self._seed = int.from_bytes(
                hashlib.blake2b(bytes_of(torch.get_rng_state()), digest_size=7).digest(), "little"
            )
            self._own = [None if g is None else g.get_state() for g in generators]

    def _drop_changed(self, fingerprints: list[bytes]) -> None:
        """Drop recordings over units that are not as they were."""
        for boundary, recording in list(self._recordings.items()):
            if recording.key != fingerprints[:boundary]:
                self._drop(boundary)
                self._refused.clear()

    def _drop(self, boundary: int) -> None:
        self._recordings.pop(boundary).close()

    def _used(self, boundary: int) -> Recording | None:
        """The recording, which becomes the one used last."""
        recording = self._recordings.pop(boundary, None)
        if recording is not None:
            self._recordings[boundary] = recording
        return recording

    def _batches(self, loader: Iterable[Any], generators: Sequence[torch.Generator | None]) -> Iterator[Any]:
        """One pass over the loader that always draws the same and leaves the generators of training alone."""
        inside: dict[str, Any] | None = None
        iterator: Iterator[Any] | None = None
        while True:
            outside = rng_state(*generators)
            try:
                if inside is None or iterator is None:
                    assert self._seed is not None
                    _seed_all(self._seed)
                    for generator, state in zip(generators, self._own, strict=True):
                        if generator is not None and state is not None:
                            generator.set_state(state.cpu())
                    iterator = iter(loader)
                else:
                    set_rng_state(inside, *generators)
                batch = next(iterator, _END)
                inside = rng_state(*generators)
            finally:
                set_rng_state(outside, *generators)
            if batch is _END:
                return
            yield batch

    # ---- recording ----

    def _record(
        self,
        feednet: Feednet,
        loader: Iterable[Any],
        boundary: int,
        generators: Sequence[torch.Generator | None],
        key: list[bytes],
    ) -> Iterator[Batch]:
        """Compute the batches, from the deepest recording below if there is one, and keep them if they fit."""
        below = max((b for b in self._recordings if b < boundary), default=0)
        recorded = self._used(below)
        if recorded is not None:
            count: int | None = len(recorded)
            source = (recorded.read(i, feednet.device) for i in range(len(recorded)))
        else:
            count = length_of(loader)
            source = (read_batch(batch, feednet.device) for batch in self._batches(loader, generators))
        if boundary not in self._refused:
            on_disk = self.where == "disk"
            self._unfinished = (
                DiskRecording(key, self.directory) if on_disk else MemoryRecording(key, self.where == "pinned")
            )
        mine = self._unfinished
        try:
            for state, target in source:
                state = feednet.advance(state, below, boundary)
                if mine is not None and mine is self._unfinished:
                    self._keep(mine, (state, target), boundary, below, count)
                yield state, target
            if mine is not None and mine is self._unfinished:
                self._recordings[boundary], self._unfinished = mine, None
        finally:
            if mine is self._unfinished:
                self._give_up_unfinished()

    def _keep(self, recording: Recording, batch: Batch, boundary: int, below: int, count: int | None) -> None:
        """Add a batch to a recording, or give the recording up if it does not fit."""
        size = sum(x.nbytes for x in tree_leaves(batch) if isinstance(x, Tensor))
        # The last batch may be small; the others are taken to be as large as the first.
        expected = size if count is None else max(size, size * (count - 1 - len(recording)))
        if self.limit_bytes is not None:
            beside = self._recordings[below].nbytes if below else 0
            if beside + recording.nbytes + expected > self.limit_bytes:
                return self._refuse(boundary, f"limit_bytes={self.limit_bytes}")
            while self.nbytes + size > self.limit_bytes:
                self._drop(next(b for b in self._recordings if b != below))
        try:
            recording.append(batch)
        except OSError as error:
            self._refuse(boundary, str(error))

    def _refuse(self, boundary: int, reason: str) -> None:
        self._give_up_unfinished()
        self._refused.add(boundary)
        if self.shuffle_batches:
            raise RuntimeError(
                f"shuffle_batches: the features that enter unit {boundary} do not fit: {reason}; give more room, or "
                "shuffle_batches=False, which feeds the same batches whether they fit or not"
            )
        self._warn(
            "room",
            f"the features that enter unit {boundary} do not fit: {reason}; they are computed in every epoch",
        )

    def _give_up_unfinished(self) -> None:
        if self._unfinished is not None:
            self._unfinished.close()
            self._unfinished = None

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"FeatureCache: {message}", RuntimeWarning, stacklevel=2)


# ---- keys ----


def _fingerprint(unit: Unit) -> bytes:
    """Of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in unit.named_tensors():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(bytes_of(tensor))
    return digest.digest()


class _Source:
    """A loader and the feednet that its batches run through."""

    def __init__(self, loader: Iterable[Any], feednet: Feednet) -> None:
        self.loader = loader
        self.chain: Chain = feednet.chain
        self.dataset = getattr(loader, "dataset", None)
        transforms = [
            repr(getattr(self.dataset, name, None)) for name in ("transform", "target_transform", "transforms")
        ]
        self.settings = feednet.device, feednet.amp, length_of(loader), transforms
        self.chosen: list[Any] = []  # numbers of samples, as the loader's batches have them

    def same(self, other: _Source) -> bool:
        alike = self.loader is other.loader and self.chain is other.chain and self.dataset is other.dataset
        return alike and self.settings == other.settings

    @property
    def by_number(self) -> bool:
        """Whether the loader is a DataLoader that reads samples by their numbers."""
        plain = isinstance(self.loader, DataLoader) and type(self.loader).__iter__ is DataLoader.__iter__
        return plain and not isinstance(self.dataset, IterableDataset)

    def choose_samples(self, generators: Sequence[torch.Generator | None]) -> None:
        """Those of the first batches."""
        if not self.by_number:
            if iter(self.loader) is self.loader:
                raise ValueError("loader: expected one that can be read in every epoch, got an iterator")
            return
        assert isinstance(self.loader, DataLoader)
        before = rng_state(*generators)
        try:
            if self.loader.batch_sampler is None:
                self.chosen = list(itertools.islice(self.loader.sampler, _PROBED))
                return
            count = 0
            for numbers in self.loader.batch_sampler:
                self.chosen.append(list(numbers)[: _PROBED - count])
                count += len(self.chosen[-1])
                if count >= _PROBED:
                    break
        finally:
            set_rng_state(before, *generators)

    def draw(self, generators: Sequence[torch.Generator | None], seed: int, count: int) -> bytes:
        """Digest of the chosen samples, transformed and collated under a seed; of `count` alone, if that is fewer."""
        before = rng_state(*generators)
        try:
            _seed_all(seed)
            if not self.by_number:
                return _digest(next(iter(self.loader), None))
            assert isinstance(self.loader, DataLoader)
            few = (
                self.chosen if count >= _PROBED else [c[:count] if isinstance(c, list) else c for c in self.chosen[:1]]
            )
            return _digest([self.loader.collate_fn(_fetch(self.dataset, numbers)) for numbers in few])
        finally:
            set_rng_state(before, *generators)


def _fetch(dataset: Any, numbers: Any) -> Any:
    if not isinstance(numbers, list):
        return dataset[numbers]
    if getattr(dataset, "__getitems__", None):
        return dataset.__getitems__(numbers)
    return [dataset[i] for i in numbers]


def length_of(loader: Any) -> int | None:
    """Batches, if it says how many."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _seed_all(seed: int) -> None:
    """The generators that loaders draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one is what loaders draw from
    random.seed(seed)


def _digest(value: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
            digest.update(bytes_of(leaf))
        elif hasattr(leaf, "__array_interface__"):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        else:
            digest.update(pickle.dumps(leaf))
    return digest.digest()
