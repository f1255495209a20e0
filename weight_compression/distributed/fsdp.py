"""FSDP2: parameters are gathered coded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState

from weight_compression.config import CompressionConfig
from weight_compression.distributed.collectives import FLOATS, check_config, compressed_all_gather
from weight_compression.distributed.work import FutureWork

__all__ = ["CompressedAllGather"]


class CompressedAllGather(AllGather):
    """The all-gather of a ``fully_shard``-ed module's parameters, sent quantised by entropy and Huffman coded.

    Every rank computes with the same decoded weights, in forward and backward. The shards themselves, which the optimiser
    steps, keep their precision: errors do not add up from step to step. Gradients are reduced as ever.

    Each parameter has its own range and levels on every rank. Shards of less than 1,024 elements are sent as they are.

    Parameters
    ----------
    module : FSDPModule
        What the all-gather is set on; its own parameters are those that no FSDP module inside has.
    config : CompressionConfig, optional
        How weights are quantised and coded, c = 5 by default.

    Examples
    --------
    >>> for module in model.modules():  # doctest: +SKIP
    ...     if isinstance(module, FSDPModule):
    ...         module.set_custom_all_gather(CompressedAllGather(module))

    Notes
    -----
    Called by FSDP, it raises TypeError if the module's parameters have more than one dtype, which FSDP gathers as bytes,
    ValueError if a tensor subclass gathers something else than its values, and what
    :func:`~weight_compression.distributed.compressed_all_reduce` raises.

    With ``reshard_after_forward`` a number, backward gathers what forward decoded, and that is coded once more.

    On CUDA devices a gather that FSDP does not ask for asynchronously keeps the calling thread waiting.
    """

    def __init__(self, module: FSDPModule, config: CompressionConfig | None = None) -> None:
        if not isinstance(module, FSDPModule):
            raise TypeError(f"module: expected one that fully_shard was called with, got {type(module).__name__}")
        self._module, self._config = module, check_config(config)

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # Other threads write it, which are not in inference mode where this one may be.
        with torch.inference_mode(False):
            return torch.empty(tuple(size), dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        if input_tensor.dtype not in FLOATS:
            raise TypeError(
                f"expected parameters of one dtype in every FSDP module, one of {', '.join(map(str, FLOATS))}, got "
                f"{input_tensor.dtype}"
            )
        future = compressed_all_gather(
            list(output_tensor.view(group.size(), -1)), input_tensor, group, self._config, segments=self._lengths(),
            async_op=True,
        )  # fmt: skip
        assert future is not None
        if async_op:
            return FutureWork(future, lambda _: [output_tensor])
        future.wait()
        return None

    def _lengths(self) -> list[int]:
        """Of the parameters' shards in the buffer that is gathered. torch has no public way to ask."""
        (group,) = self._module._get_fsdp_state()._fsdp_param_groups
        lengths = []
        for parameter in group.fsdp_params:
            resharded = parameter.sharded_state == ShardedState.SHARDED_POST_FORWARD
            data = parameter._sharded_post_forward_param_data if resharded else parameter._sharded_param_data
            assert data is not None
            lengths.append(data.numel())
        return lengths
