"""What data-parallel workers exchange, and the ways to average it: gradients of given shapes, and a table of methods.

A further method is one entry: in :data:`ALL_REDUCE` a function that averages in place, in :data:`HOOKS` one that
registers a communication hook, in :data:`TRAINING` one that also has a say in the optimiser. (The annotations of this
module are not postponed, since torch compares a hook's with classes.)
"""

import hashlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import (
    debugging_hooks,
    default_hooks,
    post_localSGD_hook,
    powerSGD_hook,
    quantization_hooks,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel
from trained_networks import Recipe, make_convolutional, make_perceptron

import weight_compression.distributed as wcd
from weight_compression.distributed.choice import MODES, TRIED

# --- gradients


def _shapes_of(network: torch.nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in network.parameters()]


def _resnet_50() -> list[tuple[int, ...]]:
    """25.6M parameters in 161 tensors: He et al. (2016), 1,000 classes."""
    shapes: list[tuple[int, ...]] = []

    def convolution(ins: int, outs: int, side: int) -> None:
        shapes.extend([(outs, ins, side, side), (outs,), (outs,)])  # kernel, batch norm's scale and shift

    convolution(3, 64, 7)
    ins = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            convolution(ins, width, 1)
            convolution(width, width, 3)
            convolution(width, 4 * width, 1)
            if block == 0:
                convolution(ins, 4 * width, 1)
            ins = 4 * width
    return [*shapes, (1000, ins), (1000,)]


def _transformer() -> list[tuple[int, ...]]:
    """101M parameters in 148 tensors: GPT-2 small (12 layers, width 768) with 20,000 tokens and 512 positions."""
    d = 768
    norm: list[tuple[int, ...]] = [(d,), (d,)]
    layer = [*norm, (3 * d, d), (3 * d,), (d, d), (d,), *norm, (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(20_000, d), (512, d), *(layer * 12), *norm]


MODELS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "mlp": lambda: _shapes_of(make_perceptron(784, Recipe(), torch.Generator())),
    "cnn": lambda: _shapes_of(make_convolutional()),
    "25m": _resnet_50,
    "100m": _transformer,
}
HEAVY = 4  # every fourth tensor has heavy tails
SPREAD = 0.5  # standard deviation of the logarithm of its rows' scales
LARGEST, SMALLEST = 1e-1, 1e-4  # tensors' scales


class Gradients:
    """Gradients as training gives them, of one worker, the same in every run.

    Tensor i of worker r is s_i (c_i + e_ir) / sqrt(2): c_i is common to the workers, e_ir their own, both standard
    normal. The scale s_i is log-uniform between :data:`SMALLEST` and :data:`LARGEST`. In every :data:`HEAVY`-th tensor the
    rows have scales too, log-normal of :data:`SPREAD`: a mixture of normals, of kurtosis 3 exp(4 SPREAD^2) = 8.2.

    Attributes
    ----------
    flat : Tensor [n]
        All of them, float32.
    parts : list of Tensor
        Views of `flat`, one per parameter.
    """

    def __init__(self, model: str, rank: int):
        self.shapes = MODELS[model]()
        self.flat = torch.empty(sum(math.prod(shape) for shape in self.shapes))
        self.parts = self.split(self.flat)
        for index, part in enumerate(self.parts):
            part.copy_(self._draw(index, [rank]))

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of `flat`, one per parameter."""
        parts = flat.split([math.prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _draw(self, index: int, ranks: list[int]) -> torch.Tensor:
        """The mean of tensor `index` over the workers `ranks`; in float64 where they are several."""
        shape = self.shapes[index]
        scale, common = torch.Generator().manual_seed(index), torch.Generator().manual_seed(1_000_003 + index)
        s = LARGEST * (SMALLEST / LARGEST) ** torch.rand((), generator=scale)
        if index % HEAVY == HEAVY - 1:
            s = s * torch.exp(SPREAD * torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=scale))
        c = torch.randn(shape, generator=common)
        own = (torch.randn(shape, generator=torch.Generator().manual_seed((r + 2) * 1_000_003 + index)) for r in ranks)
        workers = (s * (c + e) / math.sqrt(2) for e in own)
        if len(ranks) == 1:
            return next(workers)
        return sum(worker.double() for worker in workers) / len(ranks)

    def errors(self, averages: list[torch.Tensor], ranks: int) -> tuple[float, float]:
        """||average - mean|| / ||mean|| against the float64 mean: over all parameters, and in the worst tensor."""
        wrong = right = worst = 0.0
        for index, average in enumerate(averages):
            mean = self._draw(index, list(range(ranks))).double()
            difference = float((average.double() - mean).square().sum())
            total = float(mean.square().sum())
            wrong, right, worst = wrong + difference, right + total, max(worst, difference / total)
        return math.sqrt(wrong / right), math.sqrt(worst)


def digest(tensors: list[torch.Tensor]) -> str:
    """Equal for tensors of equal bits."""
    state = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        state.update(tensor.detach().contiguous().numpy().data)
    return state.hexdigest()


# --- averaging a flat tensor


def _all_reduce(flat: torch.Tensor, parts: list[torch.Tensor]) -> None:
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())


def _all_reduce_cast(dtype: torch.dtype) -> Callable[[torch.Tensor, list[torch.Tensor]], None]:
    """As torch's hooks do: cast, divide, sum in the smaller type, cast back."""

    def average(flat: torch.Tensor, parts: list[torch.Tensor]) -> None:
        small = flat.to(dtype).div_(dist.get_world_size())
        dist.all_reduce(small)
        flat.copy_(small)

    return average


def _coded(flat: torch.Tensor, parts: list[torch.Tensor]) -> None:
    wcd.compressed_all_reduce(flat, segments=[part.numel() for part in parts])


# Each averages over the ranks, in place: flat float32 [n], and its views, one per parameter.
ALL_REDUCE: dict[str, Callable[[torch.Tensor, list[torch.Tensor]], None]] = {
    "float32": _all_reduce,
    "bfloat16": _all_reduce_cast(torch.bfloat16),
    "float16": _all_reduce_cast(torch.float16),
    "coded": _coded,
    "coded as one tensor": lambda flat, parts: wcd.compressed_all_reduce(flat),
}

# --- averaging under DistributedDataParallel

FIRST_CODED_STEP = 2  # PowerSGD's earliest: DDP rebuilds its buckets after the first step


def _in_turn(hook: Callable[[Any, dist.GradBucket], torch.futures.Future]) -> Callable[..., torch.futures.Future]:
    """The hook, one bucket after the other.

    torch's hooks that communicate twice do so from a callback of the first future. With gloo, whose collectives pair up
    by their order, those of two buckets then meet in different orders on different ranks, and the process aborts.
    """

    def wait(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        future = hook(state, bucket)
        future.wait()
        return future

    return wait


class _NestedAllGather:
    """torch.distributed as quantization_hooks.py takes it: futures of all_gather hold a list of lists, NCCL's form."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    @staticmethod
    def all_gather(outputs: list[torch.Tensor], tensor: torch.Tensor, **options: Any) -> SimpleNamespace:
        future = dist.all_gather(outputs, tensor, **options).get_future().then(lambda done: [done.wait() and outputs])
        return SimpleNamespace(get_future=lambda: future)


def _quantization_pertensor(ddp: DistributedDataParallel) -> None:
    quantization_hooks.dist = _NestedAllGather()
    ddp.register_comm_hook(None, _in_turn(quantization_hooks.quantization_pertensor_hook))


def _power_sgd(rank: int) -> Callable[[DistributedDataParallel], None]:
    def register(ddp: DistributedDataParallel) -> None:
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=FIRST_CODED_STEP)
        ddp.register_comm_hook(state, _in_turn(powerSGD_hook.powerSGD_hook))

    return register


def _power_sgd_coded(rank: int) -> Callable[[DistributedDataParallel], None]:
    """The same with coded factors."""

    def register(ddp: DistributedDataParallel) -> None:
        group = wcd.CompressedProcessGroup()
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=rank, start_powerSGD_iter=FIRST_CODED_STEP)
        ddp.register_comm_hook(state, _in_turn(powerSGD_hook.powerSGD_hook))

    return register


def _entropy(**options: Any) -> Callable[[DistributedDataParallel], None]:
    def register(ddp: DistributedDataParallel) -> None:
        ddp.register_comm_hook(
            wcd.EntropyCompressionState(module=ddp, start_iteration=FIRST_CODED_STEP, **options),
            wcd.entropy_compression_hook,
        )

    return register


def _bfloat16_hook(state: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch's hook, which DDP registers with NCCL only, by its name; gloo sums bfloat16 too."""
    return default_hooks.bf16_compress_hook(state, bucket)


HOOKS: dict[str, Callable[[DistributedDataParallel], None]] = {
    "float32": lambda ddp: None,
    "float32 by torch's hook": lambda ddp: ddp.register_comm_hook(None, default_hooks.allreduce_hook),
    "bfloat16": lambda ddp: ddp.register_comm_hook(None, _bfloat16_hook),
    "float16": lambda ddp: ddp.register_comm_hook(None, default_hooks.fp16_compress_hook),
    "PowerSGD 1": _power_sgd(1),
    "PowerSGD 2": _power_sgd(2),
    "PowerSGD 4": _power_sgd(4),
    "quantization_pertensor": _quantization_pertensor,
    "PowerSGD 4 coded": _power_sgd_coded(4),
    "coded": _entropy(),
    "coded without feedback": _entropy(error_feedback=False),
    "auto": _entropy(mode="auto"),
    "no exchange": lambda ddp: ddp.register_comm_hook(None, debugging_hooks.noop_hook),  # what DDP itself takes
}


# Steps before the first that counts, where a method needs more than PowerSGD: 'auto' tries its ways first.
WARM_UP = {"auto": FIRST_CODED_STEP + TRIED * len(MODES) + 2}


class _Given(torch.autograd.Function):
    """A scalar whose gradients are the given ones."""

    @staticmethod
    def forward(ctx, gradients, *parameters):
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx, _):
        return None, *(gradient.detach() for gradient in ctx.gradients)


class GivenGradients(torch.nn.Module):
    """Parameters of the gradients' shapes, which the backward pass gives those gradients at no cost."""

    def __init__(self, gradients: list[torch.Tensor]):
        super().__init__()
        self.gradients = gradients
        self.weights = torch.nn.ParameterList(torch.zeros(g.shape) for g in gradients)

    def forward(self) -> torch.Tensor:
        return _Given.apply(self.gradients, *self.weights)


# A way of exchange, made from gradients: what precedes a step, untimed, and the step, which returns the averages.
Exchange = tuple[Callable[[], None], Callable[[], list[torch.Tensor]]]


def make_all_reduce(average: Callable[[torch.Tensor, list[torch.Tensor]], None], gradients: Gradients) -> Exchange:
    flat = torch.empty_like(gradients.flat)
    parts = gradients.split(flat)

    def prepare() -> None:
        flat.copy_(gradients.flat)

    def step() -> list[torch.Tensor]:
        average(flat, parts)
        return parts

    return prepare, step


def make_ddp(register: Callable[[DistributedDataParallel], None], gradients: Gradients) -> Exchange:
    """A backward pass under DDP: gradients into its buckets of 25 MB, exchange, averages in the parameters' ``grad``."""
    network = GivenGradients(gradients.parts)
    ddp = DistributedDataParallel(network, gradient_as_bucket_view=True, init_sync=False)
    register(ddp)

    def prepare() -> None:
        ddp.zero_grad(set_to_none=True)

    def step() -> list[torch.Tensor]:
        ddp().backward()
        return [weight.grad for weight in network.weights]

    return prepare, step


# --- training


def _hooked(
    register: Callable[[DistributedDataParallel], None],
) -> Callable[[DistributedDataParallel, torch.optim.Optimizer], torch.optim.Optimizer]:
    def prepare(ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        register(ddp)
        return optimizer

    return prepare


def _post_local(
    period: int,
) -> Callable[[DistributedDataParallel, torch.optim.Optimizer], torch.optim.Optimizer]:
    """torch's averaging of models: `period` local steps, then the mean of the parameters."""

    def prepare(ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        state = post_localSGD_hook.PostLocalSGDState(
            None, subgroup=None, start_localSGD_iter=FIRST_CODED_STEP, post_local_gradient_allreduce=False
        )
        ddp.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
        averager = PeriodicModelAverager(period=period, warmup_steps=FIRST_CODED_STEP)
        return PostLocalSGDOptimizer(optimizer, averager)

    return prepare


# Each makes DDP and the optimiser ready, and returns the optimiser to step with.
TRAINING: dict[str, Callable[[DistributedDataParallel, torch.optim.Optimizer], torch.optim.Optimizer]] = {
    **{name: _hooked(register) for name, register in HOOKS.items() if name != "no exchange"},
    "averaging 10": _post_local(10),
}
