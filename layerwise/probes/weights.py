"""The stable rank of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["stable_rank", "stable_ranks"]


def stable_rank(weight: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2: from 1 to the rank of W, without its jumps (figure 6.3); 0 of a zero matrix.

    Parameters
    ----------
    weight : Tensor
        (out, in), or a convolution's (out, in, kh, kw), which is taken as a matrix (out, in kh kw).

    Raises
    ------
    ValueError
        If it has fewer than two axes, or is not finite.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight: expected a matrix or a convolution's kernel, got shape {tuple(weight.shape)}")
    W = weight.detach().flatten(1).double()
    if not torch.isfinite(W).all():
        raise ValueError("weight: expected finite numbers, got infinities or NaN")
    if not W.any():
        return 0.0
    W = W / W.abs().max()  # so that no square overflows or vanishes
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    return float(gram.trace() / torch.linalg.eigvalsh(gram)[-1])


def stable_ranks(module: nn.Module) -> dict[str, float]:
    """The stable rank of every weight matrix in a module, by its name.

    That is every parameter with two axes or more but embeddings, which are tables: of linear and convolutional layers (of
    transposed ones with the output first; of grouped ones as stored, (out, in / groups kh kw)), of attention.
    """
    ranks: dict[str, float] = {}
    seen: set[int] = set()
    for path, part in module.named_modules():
        if isinstance(part, nn.utils.parametrize.ParametrizationList):
            continue  # the weights that it makes count, not what it makes them of
        made = getattr(part, "parametrizations", {})
        dot = f"{path}." if path else ""
        weights = [*part.named_parameters(path, recurse=False), *((dot + name, getattr(part, name)) for name in made)]
        for name, p in weights:
            if id(p) in seen or p.dim() < 2 or isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
                continue
            seen.add(id(p))
            if p.shape[0] == 1 and not isinstance(part, (nn.Linear, _ConvNd)):
                continue  # a table that batches share, such as positions (1, T, C)
            ranks[name] = stable_rank(p.transpose(0, 1) if isinstance(part, _ConvTransposeNd) else p)
    return ranks
