"""A process group whose all_reduce is coded, for whatever takes a process group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from weight_compression.config import CompressionConfig
from weight_compression.distributed.channel import channel_of
from weight_compression.distributed.collectives import FLOATS, check_config, compressed_all_reduce
from weight_compression.distributed.plan import EXACT_BELOW
from weight_compression.distributed.work import FutureWork

__all__ = ["CompressedProcessGroup"]


class CompressedProcessGroup(dist.ProcessGroup):
    """The ranks of another group; ``all_reduce`` of floating point sums and means is :func:`compressed_all_reduce`.

    Tensors of less than 1,024 elements are reduced as they are.

    Hooks and wrappers that are given a process group send coded through this one, for example PowerSGD's factors::

        state = PowerSGDState(CompressedProcessGroup(), matrix_approximation_rank=2, start_powerSGD_iter=2)
        ddp_model.register_comm_hook(state, powerSGD_hook)

    All other operations are those of the other group. Over gloo, coded or not, PowerSGD needs a model in one bucket
    (``bucket_cap_mb``): of several, its callbacks call all_reduce in an order that timing decides.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        The default group if not given.
    config : CompressionConfig, optional
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        config: CompressionConfig | None = None,
    ) -> None:
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise ValueError("expected torch.distributed to be initialised: call torch.distributed.init_process_group")
        super().__init__(dist.get_rank(group), dist.get_world_size(group))  # type: ignore[call-arg]
        self._group, self._config = group, check_config(config)
        channel_of(group)  # a collective operation, which belongs where all ranks are

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        # Not "op in (...)": an enumerator on the left does not equal the ReduceOp that torch passes.
        coded = len(tensors) == 1 and (op == dist.ReduceOp.SUM or op == dist.ReduceOp.AVG)
        if not coded or tensors[0].dtype not in FLOATS or tensors[0].numel() < EXACT_BELOW:
            return self._group.allreduce(tensors, opts) if opts is not None else self._group.allreduce(tensors)
        future = compressed_all_reduce(tensors[0], op, self._group, self._config, async_op=True)
        assert future is not None
        return FutureWork(future, lambda value: [value])

    def getBackendName(self) -> str:
        return f"coded {dist.get_backend(self._group)}"


def _pass_on(name: str) -> Any:
    def call(self: CompressedProcessGroup, *args: Any, **options: Any) -> Any:
        return getattr(self._group, name)(*args, **options)

    call.__name__ = name
    return call


for _name in (
    "_allgather_base", "_reduce_scatter_base", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced",
    "allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "recv", "recv_anysource", "reduce",
    "reduce_scatter", "reduce_scatter_tensor_coalesced", "scatter", "send",
):  # fmt: skip
    setattr(CompressedProcessGroup, _name, _pass_on(_name))
