"""The methods of the source papers with their settings. Every argument can be changed; what a paper's public code does
otherwise is in its ``code`` variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from layerwise import schedules
from layerwise.decision import AffineHead, DecisionBlock
from layerwise.heads import ConvHead, HeadSpec, LinearHead, PredSimHead
from layerwise.method import Method, OptimizerSpec
from layerwise.regularisers import Regularisation
from layerwise.schedules import Epochs, bottom_up

__all__ = [
    "PRESETS",
    "backprop",
    "dll",
    "greedy",
    "predsim",
    "preset",
    "random_robin",
    "segments",
    "takes",
    "transfer",
]


def greedy(k: int = 1, *, width: int | None = None, epochs: Epochs = 50, code: bool = False, **changes: Any) -> Method:
    """Greedy bottom-up training with heads of k - 1 hidden layers (Belilovsky et al. 2019, CIFAR-10 settings).

    SGD with momentum 0.9, batches of 128; a learning rate of 0.1, a fifth of it every 15 epochs; 50 epochs per unit; weight
    decay 5e-4 (of the public code; the paper gives none for CIFAR-10).

    Parameters
    ----------
    k : int, default=1
        Hidden layers of the problem that each unit's training solves; 1 is a linear head on 2 x 2 averages.
    width : int, optional
        Channels of the head's convolutions; None means the unit's.
    epochs : default=50
        Per unit: a number, one for each, or a function of its number.
    code : bool, default=False
        As the public code: the optimiser, and with it momentum, begins anew at every drop of the rate, and even a linear head
        has batch normalisation before it.
    **changes
        Other fields of :class:`~layerwise.Method`.
    """
    head: HeadSpec = LinearHead(pool=2, batch_norm=code) if k == 1 else ConvHead(k=k, width=width)
    method = Method(
        name=f"greedy{k}" + ("_code" if code else ""),
        schedule=partial(bottom_up, epochs=epochs),
        head=head,
        optimizer=OptimizerSpec(
            "sgd", 0.1, 5e-4, {"momentum": 0.9}, milestones=(15, 30, 45), gamma=0.2, absolute=True, restart=code
        ),
    )
    return replace(method, **changes)


def dll(
    budget: int | float | None = 0.3,
    *,
    variant: str = "main",
    epochs: Epochs | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    input_dropout: float | None = None,
    gradient_dropout: float | None = None,
    max_convs: int | None = None,
    max_channels: int | None = None,
    **changes: Any,
) -> Method:
    """Deep layer-wise learning: one unit after the other, each with a decision block within a memory budget (thesis, 6.7).

    The main variant is that of most rows of table 6.3: AdamW, batches of 128, 300 epochs per unit, a tenth of the learning rate
    after 50 and after 75 % of them; unit i has a learning rate of 3e-3 * 0.8**i and a weight decay of 1e-6 * 1.15**i; dropout
    of 0.8 * 0.95**epoch on a unit's input and of 0.6 on the gradient from its head; decision blocks of up to 4 convolutions.
    The table's other rows have rates of 8e-4 to 1e-2, weight decays of up to 1e-5, gradient dropout of 0.3 or 0.5, one an input
    dropout of 0.5, some up to 3 convolutions, or 150 to 600 epochs. Data were augmented with Cutout and AutoAugment.

    The variant "first" is that of table 6.1: a learning rate of 0.05 and a weight decay of 8e-5 throughout; 30, 40 and 50 epochs
    for the first three units and 60 for each further one; a single affine layer as head; no noise, no budget, batches of 128.
    Of VGG-13, the head was the network's own three affine layers: ``head=AffineHead((4096, 4096))``.

    No code of the thesis is public. What it leaves open is decided so: how decision blocks are searched, see
    :class:`~layerwise.DecisionBlock`; gradient dropout divides what it keeps by 1 - p; "first" uses SGD with a momentum of
    0.9, whose optimiser the thesis does not name.

    Parameters
    ----------
    budget : int, float or None, default=0.3
        Of :class:`~layerwise.DecisionBlock`: bytes, or a fraction of all the memory of full backpropagation. With a budget, a
        head is thrown away when the next window begins, as in algorithm 3; ``keep_heads=True`` keeps them, within the budget.
    variant : {"main", "first"}
        See above.
    epochs, lr, weight_decay : optional
        Other than the variant's; of the first unit.
    input_dropout, gradient_dropout : float, optional
        Other than the variant's.
    max_convs, max_channels : int, optional
        Of decision blocks, which only the main variant has; by default 4, and no limit. Where units need little memory, blocks
        that fill the budget are wide and slow; a limit on their channels makes them faster.
    **changes
        Other fields of :class:`~layerwise.Method`.
    """
    if variant == "first":
        if budget not in (None, 0.3) or max_convs is not None or max_channels is not None:
            raise ValueError(
                "budget, max_convs, max_channels: the variant 'first' has no decision blocks, and no budget"
            )
        method = Method(
            name="dll_first",
            schedule=partial(bottom_up, epochs=(30, 40, 50, 60) if epochs is None else epochs),
            head=AffineHead(),
            optimizer=OptimizerSpec("sgd", _or(lr, 0.05), _or(weight_decay, 8e-5), {"momentum": 0.9}),
            regularisation=Regularisation(input_dropout or 0.0, gradient_dropout=gradient_dropout or 0.0),
        )
    elif variant == "main":
        method = Method(
            name="dll",
            schedule=partial(bottom_up, epochs=300 if epochs is None else epochs),
            head=DecisionBlock(budget, max_convs=4 if max_convs is None else max_convs, max_channels=max_channels),
            optimizer=OptimizerSpec("adamw", _or(lr, 3e-3), _or(weight_decay, 1e-6), milestones=(0.5, 0.75)),
            lr_factor=0.8,
            weight_decay_factor=1.15,
            regularisation=Regularisation(_or(input_dropout, 0.8), 0.95, gradient_dropout=_or(gradient_dropout, 0.6)),
            keep_heads=budget is None,
        )
    else:
        raise ValueError(f"variant: expected 'main' or 'first', got {variant!r}")
    return replace(method, **changes)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def segments(size: int = 2, overlap: int | None = None, *, epochs: Epochs = 300, **options: Any) -> Method:
    """Deep segment-wise learning: a window of `size` units that moves up, `overlap` units staying in it (thesis, 6.5).

    With a size of 2 and an overlap of 1 this is what four rows of table 6.3 are. The settings are those of :func:`dll`; the
    learning rate and the weight decay follow the window's first unit. Figure 6.2, which has neither noise nor budget, is
    ``segments(size, epochs=50, budget=None, input_dropout=0, gradient_dropout=0)`` on pretrained weights.

    Parameters
    ----------
    size : int, default=2
        Units in a window.
    overlap : int, optional
        Units that a window shares with the one before; None means size - 1.
    epochs : default=300
        Per window.
    **options
        Of :func:`dll`.
    """
    shared = size - 1 if overlap is None else overlap
    return replace(
        dll(**options),
        name=f"segments{size}_{shared}",
        schedule=partial(schedules.sliding_windows, epochs=epochs, size=size, overlap=shared),
    )


def random_robin(
    rounds: int = 30,
    epochs: int = 10,
    *,
    shuffle: bool = True,
    seed: int = 0,
    budget: int | float | None = None,
    **options: Any,
) -> Method:
    """Rounds in which every unit trains for a few epochs, in a new random order each (thesis, 6.6.2, algorithm 4).

    The thesis gives no numbers for it. By default a unit gets the 300 epochs of :func:`dll`, 10 a round as in its section
    6.8.2, with the settings of :func:`dll` but for the noise, which it introduces instead of this. There is no budget: the
    heads and optimisers of all units stay in memory.

    Parameters
    ----------
    rounds, epochs : int
        Rounds, and epochs of each unit in each.
    shuffle : bool, default=True
        Random orders; otherwise from the bottom up, which is round robin.
    seed : int, default=0
        Of the orders.
    budget
        Of the decision blocks.
    **options
        Of :func:`dll`.
    """
    return replace(
        dll(budget, **{"input_dropout": 0.0, "gradient_dropout": 0.0, **options}),
        name="random_robin" if shuffle else "round_robin",
        schedule=partial(schedules.robin, rounds=rounds, epochs=epochs, shuffle=shuffle, seed=seed),
    )


def predsim(
    *,
    lr: float = 5e-4,
    beta: float = 0.99,
    epochs: int = 400,
    dropout: float = 0.2,
    max_features: int = 4096,
    code: bool = False,
    **changes: Any,
) -> Method:
    """Local errors: all units at once, each trained by cross-entropy and similarity matching (Nokland and Eidnes; Ma et al.).

    One Adam per unit, no weight decay, batches of 128, 400 epochs; a quarter of the learning rate after 50, 75, 89 and 94 % of
    them. Ma et al. use a learning rate of 5e-4 and a dropout of 0.2 for VGG8 and VGG11 on CIFAR-10 (their table I), 3e-4 and
    0.25 for VGG16 and 19, 3e-4 and 0.3 for ResNets (table V); on CIFAR-100 the dropout is 0.05 to 0.2 and 0.1. Their networks
    have batch normalisation and LeakyReLU with a slope of 0.01.

    Dropout of whole channels follows where the head looks, so that heads see everything: here it is on the input of the next
    unit. A pooling layer belongs to the unit before it, so that the head looks at what is pooled; in the papers' code it lies
    outside of units and the head looks at what is not yet pooled.

    Parameters
    ----------
    lr : float, default=5e-4
        Learning rate.
    beta : float, default=0.99
        Weight of similarity matching; 1 - beta is that of cross-entropy, also of the network's own output.
    epochs : int, default=400
        Of all units.
    dropout : float, default=0.2
        Probability.
    max_features : int, default=4096
        That the classifiers of local heads see. The public code sets 2048 for VGG8b on CIFAR-10, SVHN and STL-10, and 1024 on
        MNIST and its like.
    code : bool, default=False
        As the public code of Nokland and Eidnes: the last two drops come after 87.5 and 93.75 % of the epochs (350 and 375
        of 400). That code also shows at most 20 classes in a batch of CIFAR-100 up to epoch 200, which is up to the loader.
    **changes
        Other fields of :class:`~layerwise.Method`.
    """
    milestones = (0.5, 0.75, 0.875, 0.9375) if code else (0.5, 0.75, 0.89, 0.94)
    method = Method(
        name="predsim" + ("_code" if code else ""),
        schedule=partial(schedules.simultaneous, epochs=epochs),
        head=PredSimHead(max_features),
        loss="predsim",
        loss_options={"beta": beta},
        optimizer=OptimizerSpec("adam", lr, 0.0, milestones=milestones, gamma=0.25),
        regularisation=Regularisation(dropout, 1.0, channelwise=True),
    )
    return replace(method, **changes)


def transfer(
    variant: str = "efficientnetv2",
    *,
    epochs: float | None = None,
    lr: float | None = None,
    budget: int | float | None = None,
    max_convs: int = 4,
    **changes: Any,
) -> Method:
    """Deep layer-wise learning from pretrained weights: higher units train longer and faster (thesis, 6.7.1, table 6.5).

    AdamW, batches of 128, constant rates. Unit i, counted from 0, trains for `epochs` * g**i epochs with a learning rate of
    `lr` * g**i. "efficientnetv2": g = 1.08, 5 epochs (2 on CIFAR-100), 3e-5 (5e-6 on CIFAR-100, 1e-5 on Pets), weight decay
    5e-4 * 0.99**i, no noise. "mobilevit": g = 1.2, 15 epochs (18 on STL-10, Flowers and Pets), 8e-4 (2e-4 on CIFAR-100, STL-10
    and Pets), weight decay 5e-4, dropout of 0.3 on inputs and on gradients.

    No code is public. The table names neither decision blocks nor memory; here they are those of :func:`dll`, without a budget
    unless one is given. It does not say whether dropout decays; here it does, as in table 6.3. Epochs are rounded.

    Parameters
    ----------
    variant : {"efficientnetv2", "mobilevit"}
        See above; by default as on CIFAR-10.
    epochs, lr : float, optional
        Of the first unit, other than the variant's.
    budget, max_convs
        Of :class:`~layerwise.DecisionBlock`.
    **changes
        Other fields of :class:`~layerwise.Method`.
    """
    variants = {
        "efficientnetv2": (1.08, 5, 3e-5, 0.99, Regularisation()),
        "mobilevit": (1.2, 15, 8e-4, 1.0, Regularisation(0.3, 0.95, gradient_dropout=0.3)),
    }
    if variant not in variants:
        raise ValueError(f"variant: expected one of {sorted(variants)}, got {variant!r}")
    growth, first_epochs, first_lr, decay, noise = variants[variant]
    base = first_epochs if epochs is None else epochs
    method = Method(
        name=f"transfer_{variant}",
        schedule=partial(bottom_up, epochs=partial(_growing, base, growth)),
        head=DecisionBlock(budget, max_convs=max_convs),
        optimizer=OptimizerSpec("adamw", _or(lr, first_lr), 5e-4),
        lr_factor=growth,
        weight_decay_factor=decay,
        regularisation=noise,
    )
    return replace(method, **changes)


def _growing(base: float, growth: float, unit: int) -> int:
    return round(base * growth**unit)


def backprop(
    *, epochs: int = 300, lr: float = 1e-3, weight_decay: float = 1e-6, optimizer: str = "adamw", **changes: Any
) -> Method:
    """End-to-end backpropagation, what the others are compared with: the whole chain as one window.

    The schedule of the thesis's baselines (6.7): 300 epochs, a tenth of the learning rate after 50 and after 75 % of them,
    batches of 128. Their rates were found by search; those here are only a start.

    Parameters
    ----------
    epochs, lr, weight_decay
        Of the training.
    optimizer : str, default="adamw"
        Name of an optimiser; "sgd" has a momentum of 0.9.
    **changes
        Other fields of :class:`~layerwise.Method`.
    """
    options = {"momentum": 0.9} if optimizer == "sgd" else {}
    method = Method(
        name="backprop",
        schedule=partial(schedules.whole, epochs=epochs),
        optimizer=OptimizerSpec(optimizer, lr, weight_decay, options, milestones=(0.5, 0.75)),
    )
    return replace(method, **changes)


def _robin(epochs: int, shuffle: bool, **options: Any) -> Method:
    return random_robin(epochs, 1, shuffle=shuffle, **options)


# By name: what makes them, and what it takes beside the number of epochs, per unit or of all together.
PRESETS: dict[str, tuple[Callable[..., Method], tuple[str, ...]]] = {
    "greedy1": (partial(greedy, 1), ("code",)),
    "greedy2": (partial(greedy, 2), ("code",)),
    "greedy3": (partial(greedy, 3), ("code",)),
    "dll": (dll, ("budget",)),
    "dll_first": (partial(dll, variant="first"), ()),
    "segments": (segments, ("budget", "size", "overlap")),
    "round_robin": (partial(_robin, shuffle=False), ("budget",)),
    "random_robin": (partial(_robin, shuffle=True), ("budget",)),
    "predsim": (predsim, ("dropout", "code")),
    "transfer": (transfer, ("budget",)),
    "transfer_mobilevit": (partial(transfer, "mobilevit"), ("budget",)),
    "backprop": (backprop, ()),
}


def takes(name: str, option: str) -> bool:
    """Whether :func:`preset` of this name takes an option."""
    return name in PRESETS and option in PRESETS[name][1]


def preset(name: str, *, epochs: int, **options: Any) -> Method:
    """A method by its name, as on the command line.

    Parameters
    ----------
    name : str
        "greedy1" to "greedy3", "dll", "dll_first", "segments", "round_robin", "random_robin" (rounds of one epoch), "predsim",
        "transfer", "transfer_mobilevit", "backprop".
    epochs : int
        Per unit; of "predsim" and "backprop", in all; of "transfer", of the first unit.
    **options
        ``budget`` of "dll", "segments", the robins and "transfer"; ``size`` and ``overlap`` of "segments"; ``dropout`` of
        "predsim"; ``code`` of "greedy" and "predsim".

    Raises
    ------
    ValueError
        If there is no such name, or it does not take one of the options.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(PRESETS)}")
    for option in options:
        if not takes(name, option):
            takers = [other for other in PRESETS if takes(other, option)]
            raise ValueError(f"{option}: of {', '.join(takers) or 'no method'}, not of {name}")
    return PRESETS[name][0](epochs=epochs, **options)
