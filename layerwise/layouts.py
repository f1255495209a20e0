"""What the axes of a module's output are: features (B, C), tokens (B, T, C), or channels before positions (B, C, ...).

Three axes may be either. The modules that made them tell: the last one whose channels are as many as one of the axes has cells.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

__all__ = ["as_row", "is_sequence", "takes_sequence"]


def is_sequence(modules: Iterable[nn.Module], x: Tensor) -> bool:
    """Whether `x`, which `modules` made, in their order, is (B, C, L), as of a one-dimensional convolution."""
    found = False
    if x.dim() == 3:
        for module in modules:
            before, after = _channels(module)
            if x.shape[1] in before or x.shape[2] in after:
                found = x.shape[1] in before
    return found


def takes_sequence(modules: Iterable[nn.Module], x: Tensor) -> bool:
    """Whether the first of `modules` that looks at channels takes `x` for a sequence (B, C, L)."""
    if x.dim() != 3:
        return False
    convolutions, others = (nn.Conv1d, nn.ConvTranspose1d), (nn.Linear, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
    first = next((m for m in modules if isinstance(m, (*convolutions, *others))), None)
    return isinstance(first, convolutions) and first.in_channels == x.shape[1]


def as_row(x: Tensor) -> Tensor:
    """A sequence (B, C, L) as an image (B, C, 1, L)."""
    return x.unsqueeze(2)


def _channels(module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels that a module gives, if they come before positions; or if they come last."""
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        return (module.out_channels,), ()
    if isinstance(module, (nn.BatchNorm1d, nn.InstanceNorm1d, nn.SyncBatchNorm)):
        return (module.num_features,), ()
    if isinstance(module, nn.GroupNorm):
        return (module.num_channels,), ()
    if isinstance(module, nn.Linear):
        return (), (module.out_features,)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return (), tuple(module.normalized_shape[-1:])
    if isinstance(module, nn.Embedding):
        return (), (module.embedding_dim,)
    if isinstance(module, nn.MultiheadAttention):
        return (), (module.embed_dim,)
    if isinstance(module, nn.RNNBase):
        return (), (getattr(module, "proj_size", 0) or module.hidden_size, 2 * module.hidden_size)
    return (), ()
