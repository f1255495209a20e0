"""What tests of the DDP hook share: a small training, and the hook's scheme in one process."""

import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weight_compression import compress, decompress
from weight_compression.distributed import entropy_compression_hook
from weight_compression.distributed.plan import EXACT_BELOW, Ownership, make_pieces


class SlowScheme:
    """What all ranks' hooks do, in plain torch and one process. Parameters are numbered as in the model."""

    def __init__(self, sizes, ranks, ownership, *, error_feedback, start_iteration, config=None):
        self.pieces = make_pieces(list(enumerate(sizes)), ranks, ownership)
        self.ranks, self.error_feedback, self.config = ranks, error_feedback, config
        self.left = start_iteration
        self.residuals = [[torch.zeros(numel) for numel in sizes] for _ in range(ranks)]

    def mean(self, gradients):
        """Flat float32 means by parameter, of flat gradients by rank and parameter."""
        if self.left > 0:
            self.left -= 1
            return [sum(g / self.ranks for g in of_ranks) for of_ranks in zip(*gradients, strict=True)]
        means = [torch.empty_like(g) for g in gradients[0]]
        for piece, owner in itertools.product(self.pieces, range(self.ranks)):
            for f in (*piece.coded[owner], *piece.exact[owner]):
                part = slice(f.start, f.stop)
                parts = [of_rank[f.tensor][part] for of_rank in gradients]
                rests = [of_rank[f.tensor][part] for of_rank in self.residuals]
                means[f.tensor][part] = self._mean_of(parts, rests, owner, f.numel >= EXACT_BELOW)
        return means

    def _mean_of(self, parts, rests, owner, coded):
        total = rests[owner].clone() if coded else torch.zeros_like(parts[0])
        for rank, x in enumerate(parts):
            if rank == owner or not coded:
                total.add_(x, alpha=1 / self.ranks)
            else:
                decompress(self._send(x + rests[rank], rests[rank]), total, accumulate=True, scale=1 / self.ranks)
        return decompress(self._send(total, rests[owner])) if coded else total

    def _send(self, x, rest):
        payload = compress(x, self.config)
        if self.error_feedback:
            rest.copy_(decompress(payload, x.clone(), accumulate=True, scale=-1.0))
        return payload


def make_model():
    """Layers below 1,024 elements, of one owner, and of a part for every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 700), nn.Tanh(), nn.Linear(700, 100), nn.Tanh(), nn.Linear(100, 5)
    )


def make_batch(rank, step, n=12):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(n, 20, generator=generator)
    return x, x[:, :5].sin()


def loss_of(model, rank, step):
    x, y = make_batch(rank, step)
    return nn.functional.mse_loss(model(x), y)


def wrap(model, state, hook=entropy_compression_hook, bucket_cap_mb=0.1, **options):
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb, **options)
    ddp.register_comm_hook(state, hook)
    return ddp


def make_optimizer(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.5)


def train(ddp, optimizer, rank, steps, loss=loss_of):
    for step in steps:
        optimizer.zero_grad()
        loss(ddp, rank, step).backward()
        optimizer.step()


def parameters_of(model):
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def train_slowly(scheme, model, optimizer, ranks, steps, losses=loss_of):
    """All ranks' gradients one after the other, and their mean by the scheme."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in steps:
        gradients = []
        for rank in range(ranks):
            model.zero_grad()
            loss = losses(model, rank, step)
            if loss is not None:
                loss.backward()
            gradients.append([torch.zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in parameters])
        for p, mean in zip(parameters, scheme.mean(gradients), strict=True):
            p.grad = mean.view_as(p)
        optimizer.step()


def compare_with_slow_scheme(rank, model, state, steps, losses=loss_of):
    """Train a copy of the model as it was at first, and compare bit by bit."""
    if rank > 0:
        return None
    slow = make_model()
    sizes = [p.numel() for p in slow.parameters()]
    scheme = SlowScheme(
        sizes, dist.get_world_size(), Ownership.from_state_dict(state.state_dict()["owners"]),
        error_feedback=state.error_feedback, start_iteration=state.start_iteration, config=state.config,
    )  # fmt: skip
    train_slowly(scheme, slow, make_optimizer(slow), dist.get_world_size(), steps, losses)
    assert torch.equal(parameters_of(model), parameters_of(slow))
    return scheme
