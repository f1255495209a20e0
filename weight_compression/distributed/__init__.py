"""Compressed communication on torch.distributed: collectives, DDP hook, model averaging."""

from weight_compression.distributed.averaging import CompressedModelAverager
from weight_compression.distributed.channel import PeerError
from weight_compression.distributed.collectives import (
    compressed_all_gather,
    compressed_all_reduce,
    compressed_broadcast,
)
from weight_compression.distributed.hook import EntropyCompressionState, entropy_compression_hook
from weight_compression.distributed.process_group import CompressedProcessGroup
from weight_compression.distributed.traffic import plot_stats, write_stats

__all__ = [
    "CompressedModelAverager",
    "CompressedProcessGroup",
    "EntropyCompressionState",
    "PeerError",
    "compressed_all_gather",
    "compressed_all_reduce",
    "compressed_broadcast",
    "entropy_compression_hook",
    "plot_stats",
    "write_stats",
]
