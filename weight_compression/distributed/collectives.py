"""all_reduce, broadcast and all_gather of coded values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from weight_compression.config import CompressionConfig
from weight_compression.distributed.channel import channel_of
from weight_compression.distributed.jobs import Job, start_handing, start_reduction
from weight_compression.distributed.plan import Ownership, make_owned_pieces, make_pieces

__all__ = ["check_config", "compressed_all_gather", "compressed_all_reduce", "compressed_broadcast"]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def compressed_all_reduce(
    tensor: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.AVG,
    group: dist.ProcessGroup | None = None,
    config: CompressionConfig | None = None,
    *,
    segments: Sequence[int] | None = None,
    async_op: bool = False,
) -> torch.futures.Future[torch.Tensor] | None:
    """The mean or sum of all ranks' tensors, in place, sent quantised by entropy and Huffman coded.

    Every rank adds up a part of the elements (reduce-scatter) in float32 (float64 for float64), in the order of ranks, its
    own values exact and the others' as decoded; sums are coded again and sent to all (all-gather). All ranks, the one that
    has added up included, end with the same decoded bits. The error of the mean is at most half a bin of the coded mean plus
    the mean over ranks of half a bin of what each of the others sent. In a group of one rank nothing changes.

    Parameters
    ----------
    tensor : torch.Tensor
        float32, float64, float16 or bfloat16, of the same shape on all ranks, on the CPU (gloo) or a CUDA device (NCCL).
    op : torch.distributed.ReduceOp, default AVG
        AVG or SUM.
    group : torch.distributed.ProcessGroup, optional
        The default group if not given. The first call for a group makes two more of the same ranks, which all of them have
        to take part in.
    config : CompressionConfig, optional
    segments : sequence of int, optional
        Lengths that the flat tensor consists of, one behind the other: ranges and levels are chosen for each, as
        layers differ in scale. Those below 1,024 elements are sent as they are.
    async_op : bool, default False
        Return a future of the tensor instead of waiting.

    Returns
    -------
    torch.futures.Future or None

    Raises
    ------
    PayloadError
        If what came is not what was sent; it names the rank. The tensor is then unspecified.
    PeerError
        If another rank failed.
    RuntimeError
        What torch.distributed raises if a rank died or did not answer within the group's timeout.
    ValueError, TypeError
        If an argument is wrong.

    After any but the last two nothing more can be coded on this group: the error is raised again. A rank on which the last
    step fails may be the only one; the others learn of it when they call again.

    Notes
    -----
    NaN and infinity: a part of at most a few million elements that has any is sent exactly.
    """
    channel = channel_of(group)
    config = check_config(config)
    _check_tensor(tensor)
    lengths = [tensor.numel()] if segments is None else _check_segments(segments, tensor)
    flat = tensor.detach().reshape(-1).contiguous()
    numbered = list(enumerate(lengths))

    def finish() -> torch.Tensor:
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view(tensor.shape))
        if tensor.numel():
            torch.autograd.graph.increment_version(tensor)  # kernels write by address: autograd must know
        return tensor

    job = Job(list(flat.split(lengths)), channel, config, finish)
    start_reduction(job, make_pieces(numbered, channel.ranks, Ownership(channel.ranks)), scale_of(op, channel.ranks))
    return _result(job, async_op)


def compressed_broadcast(
    tensor: torch.Tensor,
    src: int,
    group: dist.ProcessGroup | None = None,
    config: CompressionConfig | None = None,
    *,
    async_op: bool = False,
) -> torch.futures.Future[torch.Tensor] | None:
    """A rank's tensor to all, coded. All of them, the sender included, end with the same decoded values.

    Parameters
    ----------
    tensor : torch.Tensor
        As for :func:`compressed_all_reduce`; what is sent on rank `src`, written on all.
    src : int
        Global rank of the sender.
    group, config, async_op
        As for :func:`compressed_all_reduce`.
    """
    channel = channel_of(group)
    _check_tensor(tensor)
    owner = channel.rank_of(src)
    flat = tensor.detach().reshape(-1).contiguous()

    def finish() -> torch.Tensor:
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view(tensor.shape))
        if tensor.numel():
            torch.autograd.graph.increment_version(tensor)
        return tensor

    job = Job([flat], channel, check_config(config), finish)
    start_handing(job, make_owned_pieces([(owner, flat.numel())], channel.ranks), job.values_of)
    return _result(job, async_op)


def compressed_all_gather(
    tensors: Sequence[torch.Tensor],
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    config: CompressionConfig | None = None,
    *,
    segments: Sequence[int] | None = None,
    async_op: bool = False,
) -> torch.futures.Future[Sequence[torch.Tensor]] | None:
    """Every rank's tensor to all, coded: ``torch.distributed.all_gather`` with the same decoded values everywhere.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        One for each rank, contiguous, of the shape of that rank's tensor, which may differ; written.
    tensor : torch.Tensor
        What this rank sends. It may be the one of `tensors` that it is written to.
    segments : sequence of int, optional
        Lengths that every rank's flat tensor consists of, for tensors of the same number of elements; as for
        :func:`compressed_all_reduce`.
    group, config, async_op
        As for :func:`compressed_all_reduce`.
    """
    channel = channel_of(group)
    if len(tensors) != channel.ranks:
        raise ValueError(f"tensors: expected one for each of {channel.ranks} ranks, got {len(tensors)}")
    _check_tensor(tensor)
    for rank, out in enumerate(tensors):
        _check_tensor(out)
        if out.dtype != tensor.dtype or out.device != tensor.device or not out.is_contiguous():
            raise ValueError(
                f"tensors[{rank}]: expected contiguous {tensor.dtype} on {tensor.device}, got {out.dtype} on {out.device} "
                f"with strides {out.stride()}"
            )
    if tensors[channel.rank].shape != tensor.shape:
        raise ValueError(
            f"tensors[{channel.rank}]: expected shape {tuple(tensor.shape)}, that of the tensor sent, got "
            f"{tuple(tensors[channel.rank].shape)}"
        )
    flat = tensor.detach().reshape(-1).contiguous()

    def finish() -> Sequence[torch.Tensor]:
        for out in tensors:
            if out.numel():
                torch.autograd.graph.increment_version(out)
        return tensors

    lengths = [[out.numel()] if segments is None else _check_segments(segments, out) for out in tensors]
    owned = [(rank, length) for rank, of_rank in enumerate(lengths) for length in of_rank]
    outs = [
        part for out, of_rank in zip(tensors, lengths, strict=True) for part in out.detach().view(-1).split(of_rank)
    ]
    first = sum(len(of_rank) for of_rank in lengths[: channel.rank])
    sent = dict(enumerate(flat.split(lengths[channel.rank]), first))
    job = Job(outs, channel, check_config(config), finish)
    start_handing(
        job, make_owned_pieces(owned, channel.ranks), lambda f: sent[f.tensor][f.start : f.stop].to(job.working)
    )
    return _result(job, async_op)


def scale_of(op: dist.ReduceOp.RedOpType, ranks: int) -> float:
    """By which every rank's values are multiplied."""
    if op == dist.ReduceOp.AVG:
        return 1.0 / ranks
    if op == dist.ReduceOp.SUM:
        return 1.0
    raise ValueError(f"op: expected ReduceOp.AVG or ReduceOp.SUM, got {op}")


def _check_segments(segments: Sequence[int], tensor: torch.Tensor) -> list[int]:
    lengths = list(segments)
    if min(lengths, default=0) < 0 or sum(lengths) != tensor.numel():
        raise ValueError(f"segments: expected lengths >= 0 that sum to {tensor.numel()}, got {lengths}")
    return lengths


def _check_tensor(tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"expected one of {', '.join(map(str, FLOATS))}, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"expected a dense tensor on the CPU or a CUDA device, got {tensor.layout} on {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError("expected a tensor that does not require grad; wrap the call in torch.no_grad()")
    if tensor.is_inference():
        raise ValueError(
            "expected a tensor that was not made in torch.inference_mode(): other threads write it; use torch.no_grad()"
        )


def check_config(config: CompressionConfig | None) -> CompressionConfig:
    config = CompressionConfig() if config is None else config
    if not isinstance(config, CompressionConfig):
        raise TypeError(f"config: expected a CompressionConfig, got {type(config).__name__}")
    if config.per_channel:
        raise ValueError(
            "config.per_channel: tensors are sent flat, without channels; group_size gives runs ranges of their own"
        )
    if config.nonfinite != "raise":
        raise ValueError(
            "config.nonfinite: expected 'raise', its default; NaN and infinity are sent exactly in any case"
        )
    return config


def _result(job: Job, async_op: bool) -> torch.futures.Future | None:
    if async_op:
        return job.future
    job.future.wait()
    return None
