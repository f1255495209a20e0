"""Tensors on their way through the two stages of a channel, in pieces: added up, then handed out."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from weight_compression.config import CompressionConfig
from weight_compression.distributed import messages
from weight_compression.distributed.channel import Channel, Received, Stage, Task
from weight_compression.distributed.plan import Fragment, Piece
from weight_compression.distributed.traffic import Step
from weight_compression.errors import NonFiniteError, PayloadError

__all__ = ["Job", "bytes_of_all_reduce", "start_handing", "start_reduction", "working_dtype"]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which values of `dtype` are averaged."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Job:
    """Tensors on their way, and what became of them.

    Parameters
    ----------
    tensors : list of torch.Tensor
        Flat, contiguous, of one dtype and device; written where pieces come back.
    channel : Channel
    config : CompressionConfig
    finish : callable
        Called when all has been written; what it returns is the future's value.
    residuals : list of torch.Tensor, optional
        Of each tensor, in the working dtype: what earlier jobs did not send. Added to what this one sends.
    numbers : sequence of int, optional
        Under which tensors are counted in `traffic`.
    describe : callable, optional
        The name of tensor i, for errors.
    reject_nonfinite : bool, default False
        Fail on all ranks if a result has NaN or infinity.
    traffic : Step, optional
        Where to count.
    """

    def __init__(
        self,
        tensors: list[torch.Tensor],
        channel: Channel,
        config: CompressionConfig,
        finish: Callable[[], object],
        *,
        residuals: list[torch.Tensor] | None = None,
        numbers: Sequence[int] | None = None,
        describe: Callable[[int], str] = "tensor {}".format,
        reject_nonfinite: bool = False,
        traffic: Step | None = None,
    ) -> None:
        self.tensors, self.channel, self.config, self.residuals = tensors, channel, config, residuals
        self.numbers = range(len(tensors)) if numbers is None else numbers
        self.describe, self.reject_nonfinite, self.traffic = describe, reject_nonfinite, traffic
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.working = working_dtype(tensors[0].dtype) if tensors else torch.float32
        on_device = self.device.type == "cuda"
        self.future: torch.futures.Future = torch.futures.Future(devices=[self.device] if on_device else None)
        self.ready = torch.cuda.current_stream(self.device).record_event() if on_device else None
        self._finish = finish
        self._left = 0
        self._rejection: Exception | None = None
        self._ended = False
        self._lock = threading.Lock()

    def expect(self, pieces: int) -> None:
        """So many pieces have to come back."""
        self._left = pieces
        if pieces == 0:
            self._end(None)

    def values_of(self, fragment: Fragment) -> torch.Tensor:
        """In the working dtype."""
        return self.tensors[fragment.tensor][fragment.start : fragment.stop].to(self.working)

    def residual_of(self, fragment: Fragment) -> torch.Tensor | None:
        if self.residuals is None:
            return None
        return self.residuals[fragment.tensor][fragment.start : fragment.stop]

    def piece_came(self) -> None:
        self._left -= 1  # a job's pieces end in the same stage
        if self._left == 0:
            self._end(self._rejection)

    def reject(self, error: Exception) -> None:
        """Fail when all pieces have come: until then tensors are written."""
        self._rejection = error

    def fail(self, error: BaseException) -> None:
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        if error is None:
            try:
                self.future.set_result(self._finish())
                return
            except Exception as wrong:
                error = wrong
        # Futures take exceptions, and what is not one is not for the thread that waits.
        self.future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))


def start_reduction(job: Job, pieces: Sequence[Piece], scale: float) -> None:
    """Sums of all ranks' values times `scale`, in place."""
    if job.channel.ranks == 1:
        pieces = []  # nothing is sent, so that nothing has to be coded
    if job.traffic is not None:
        job.traffic.add_sent(bytes_of_all_reduce(job.tensors, job.channel.ranks), 0)
    job.expect(len(pieces))
    for piece in pieces:
        job.channel.adding.submit(_Add(job, piece, scale))


def bytes_of_all_reduce(tensors: Sequence[torch.Tensor], ranks: int) -> int:
    """That every rank sends if tensors are reduced as they are."""
    return 2 * (ranks - 1) * sum(x.numel() * x.element_size() for x in tensors) // ranks


def start_handing(job: Job, pieces: Sequence[Piece], values_of: Callable[[Fragment], torch.Tensor]) -> None:
    """The owners' values of all fragments, in place.

    Not on the stage that hands sums out: sums come there when they are ready, which is not the same moment on all ranks.
    """
    job.expect(len(pieces))
    for piece in pieces:
        job.channel.adding.submit(_HandValues(job, piece, values_of))


class _Step(Task):
    """A piece of a job in one of the stages."""

    def __init__(self, job: Job, piece: Piece, stage: Stage) -> None:
        self.job, self.piece, self.device = job, piece, job.device
        self.rank, self.ranks = job.channel.rank, job.channel.ranks
        self.stream = stage.stream(job.device)
        if self.stream is not None:
            for tensor in job.tensors:
                tensor.record_stream(self.stream)
        self.after = job.ready  # what has to have happened on other streams

    def others(self) -> list[int]:
        return [rank for rank in range(self.ranks) if rank != self.rank]

    def encode(self) -> tuple[list[list[int]], list[torch.Tensor]]:
        if self.after is not None:
            torch.cuda.current_stream(self.device).wait_event(self.after)
        lengths: list[list[int]] = [[] for _ in range(self.ranks)]
        parts = [torch.empty(0, dtype=torch.uint8, device=self.device) for _ in range(self.ranks)]
        for rank, packed in self.pack():
            lengths[rank], parts[rank] = packed.lengths, packed.data
        if self.job.traffic is not None:
            sent = sum(part.numel() for part in parts) + 8 * sum(len(lengths[rank]) + 1 for rank in self.others())
            self.job.traffic.add_sent(0, sent)
        return lengths, parts

    def pack(self) -> Iterator[tuple[int, messages.Packed]]:
        """By receiver, what it gets."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        self.job.fail(error)

    def spend(self, coding: float, sending: float) -> None:
        if self.job.traffic is not None:
            self.job.traffic.add_seconds(coding, sending)

    def blaming(self, rank: int, fragments: Sequence[Fragment]) -> messages.Blaming:
        return lambda i: self.blaming_all(rank, fragments[i : i + 1])

    @contextlib.contextmanager
    def blaming_all(self, rank: int, fragments: Sequence[Fragment]) -> Iterator[None]:
        try:
            yield
        except PayloadError as error:
            names = ", ".join(f"{self.job.describe(f.tensor)}[{f.start}:{f.stop}]" for f in fragments)
            raise type(error)(f"from rank {self.job.channel.global_rank(rank)}, {names}: {error}") from error


class _Add(_Step):
    """Every rank sends what it has of other ranks' fragments; their owners add up."""

    def __init__(self, job: Job, piece: Piece, scale: float) -> None:
        super().__init__(job, piece, job.channel.adding)
        self.scale = scale
        self.sends = [piece.payloads(rank) if rank != self.rank else 0 for rank in range(self.ranks)]
        self.expects = [piece.payloads(self.rank) if rank != self.rank else 0 for rank in range(self.ranks)]

    def pack(self) -> Iterator[tuple[int, messages.Packed]]:
        job = self.job
        for rank in self.others():
            coded = self.piece.coded[rank]
            residuals = [job.residual_of(f) for f in coded]
            values = [
                job.values_of(f) if residual is None else residual.add_(job.values_of(f))
                for f, residual in zip(coded, residuals, strict=True)
            ]
            packed = messages.pack(values, [job.values_of(f) for f in self.piece.exact[rank]], job.config)
            if job.residuals is not None:
                keep_rest(packed, values)
            yield rank, packed

    def complete(self, received: Received) -> None:
        job, coded, exact = self.job, self.piece.coded[self.rank], self.piece.exact[self.rank]
        # Of two numbers the sum is the same either way; own values first need no zeros to be added to.
        either = self.ranks == 2 and job.residuals is None
        order = [self.rank, 1 - self.rank] if either else list(range(self.ranks))
        sums = [self._start(f, order[0] == self.rank) for f in coded]
        together = torch.zeros(sum(f.numel for f in exact), dtype=job.working, device=self.device)
        for rank in order:
            if rank == self.rank:
                if rank != order[0]:
                    for total, f in zip(sums, coded, strict=True):
                        total.add_(job.values_of(f), alpha=self.scale)
                if exact:
                    together.add_(torch.cat([job.values_of(f) for f in exact]), alpha=self.scale)
                continue
            packed = messages.Packed(received.data[rank], received.lengths[rank])
            messages.add(packed, sums, self.scale, self.blaming(rank, coded))
            if exact:
                values = torch.empty_like(together)
                with self.blaming_all(rank, exact):
                    messages.read_exact(packed, values)
                together.add_(values, alpha=self.scale)
        job.channel.handing.submit(_HandSums(job, self.piece, sums, together))

    def _start(self, fragment: Fragment, own: bool) -> torch.Tensor:
        """What earlier jobs left, or nothing, and this rank's own values if they are the first.

        Own values become the sum in place, in the job's tensor, where that is of the working dtype: nobody reads them again.
        """
        values, residual = self.job.values_of(fragment), self.job.residual_of(fragment)
        if residual is not None:
            return residual.add_(values, alpha=self.scale) if own else residual
        return values.mul_(self.scale) if own else torch.zeros_like(values)

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        # The other ranks wait for this one's part of the sums.
        self.job.channel.handing.submit(_Failed(self.job, self.piece, error))


class _Hand(_Step):
    """The owners of fragments send them to all."""

    def __init__(self, job: Job, piece: Piece, stage: Stage) -> None:
        super().__init__(job, piece, stage)
        own = piece.payloads(self.rank)
        self.sends = [own if rank != self.rank else 0 for rank in range(self.ranks)]
        self.expects = [piece.payloads(rank) if rank != self.rank else 0 for rank in range(self.ranks)]
        self.own = messages.Packed(torch.empty(0, dtype=torch.uint8, device=self.device), [])

    def pack(self) -> Iterator[tuple[int, messages.Packed]]:
        self.own = self.pack_own()
        for rank in self.others():
            yield rank, self.own

    def pack_own(self) -> messages.Packed:
        raise NotImplementedError

    def complete(self, received: Received) -> None:
        for rank in range(self.ranks):
            own = rank == self.rank
            self._write(rank, self.own if own else messages.Packed(received.data[rank], received.lengths[rank]))
        self.job.piece_came()

    def _write(self, rank: int, packed: messages.Packed) -> None:
        job, coded, exact = self.job, self.piece.coded[rank], self.piece.exact[rank]
        if job.reject_nonfinite and any(length < 0 for length in packed.lengths):
            # All ranks see this, and go on together: the job will have failed, the channel has not.
            job.reject(NonFiniteError(f"NaN or infinity in the sum that rank {job.channel.global_rank(rank)} made"))
        outs = [job.tensors[f.tensor][f.start : f.stop] for f in coded]
        # In the working dtype.
        values = [out if out.dtype == job.working else torch.empty_like(out, dtype=job.working) for out in outs]
        messages.read(packed, values, self.blaming(rank, coded))
        for out, value in zip(outs, values, strict=True):
            if value is not out:
                out.copy_(value)
        if exact:
            together = torch.empty(sum(f.numel for f in exact), dtype=job.working, device=self.device)
            with self.blaming_all(rank, exact):
                messages.read_exact(packed, together)
            for f, part in zip(exact, together.split([f.numel for f in exact]), strict=True):
                job.tensors[f.tensor][f.start : f.stop].copy_(part)
        if job.traffic is not None:
            for f, payload in zip(coded, packed.payloads(), strict=False):
                job.traffic.add_payload(job.numbers[f.tensor], f.numel, payload)
            for f in exact:
                job.traffic.add_exact(job.numbers[f.tensor], f.numel, job.working.itemsize * f.numel)


class _HandSums(_Hand):
    """Of what this rank has added up."""

    def __init__(self, job: Job, piece: Piece, sums: list[torch.Tensor], exact: torch.Tensor) -> None:
        super().__init__(job, piece, job.channel.handing)
        self._sums, self._exact = sums, exact
        if self.stream is not None:
            self.after = torch.cuda.current_stream(self.device).record_event()
            for made in (*sums, exact):
                made.record_stream(self.stream)

    def pack_own(self) -> messages.Packed:
        packed = messages.pack(self._sums, [self._exact] if self._exact.numel() else [], self.job.config)
        if self.job.residuals is not None:
            keep_rest(packed, self._sums)
        return packed


class _HandValues(_Hand):
    """Of what this rank has."""

    def __init__(self, job: Job, piece: Piece, values_of: Callable[[Fragment], torch.Tensor]) -> None:
        super().__init__(job, piece, job.channel.adding)
        self._values_of = values_of

    def pack_own(self) -> messages.Packed:
        own = [[self._values_of(f) for f in of[self.rank]] for of in (self.piece.coded, self.piece.exact)]
        return messages.pack(own[0], own[1], self.job.config)


class _Failed(_Hand):
    """In place of sums that could not be made: makes the stage tell the other ranks."""

    def __init__(self, job: Job, piece: Piece, error: BaseException) -> None:
        super().__init__(job, piece, job.channel.handing)
        self._error = error

    def pack_own(self) -> messages.Packed:
        raise self._error


def keep_rest(packed: messages.Packed, values: Sequence[torch.Tensor]) -> None:
    """What decoding will not give back stays in `values`. After NaN or infinity there is no rest."""
    messages.add(packed, values, -1.0, lambda i: contextlib.nullcontext())
    for value, length in zip(values, packed.lengths, strict=False):
        if length < 0:
            value.zero_()
