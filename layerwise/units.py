"""Step 2 of *train*: a model as a chain of units, each a piece that is trained with a loss of its own.

A unit maps a *state* to a state: the tensor that enters the model, then whatever crosses from one unit to the next. Where
one tensor crosses, the state is that tensor; where several do (a cut through a residual block), a tuple of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layerwise.checkpoint import rng_state, set_rng_state

__all__ = ["Chain", "Unit", "detach_state", "main_tensor"]

State = Any


def main_tensor(state: State) -> Tensor:
    """The tensor of a state that a head looks at: the one computed last."""
    if isinstance(state, Tensor):
        return state
    tensors = [x for x in state if isinstance(x, Tensor)] if isinstance(state, (tuple, list)) else []
    if not tensors:
        raise TypeError(
            f"expected a tensor or a tuple that holds one, got {type(state).__name__}; wrap a model that gives something else in "
            "one whose forward gives its scores"
        )
    return tensors[-1]


def replace_main(state: State, tensor: Tensor) -> State:
    """The state with `tensor` in place of its main tensor."""
    if isinstance(state, Tensor):
        return tensor
    values = list(state)
    values[max(i for i, x in enumerate(values) if isinstance(x, Tensor))] = tensor
    return tuple(values)


def split_constants(state: State, count: int) -> tuple[tuple[Any, ...], State]:
    """The first values of a state, and the rest as a state."""
    if count == 0:
        return (), state
    rest = state[count:]
    return state[:count], rest[0] if len(rest) == 1 else rest


def join_constants(constants: tuple[Any, ...], state: State) -> State:
    """What :func:`split_constants` has split."""
    return (*constants, *(state if isinstance(state, tuple) else (state,))) if constants else state


def resize_constants(constants: tuple[Any, ...], before: int, after: int) -> tuple[Any, ...]:
    """Constants of a batch of one size for a batch of another: those with a row for each sample have equal rows."""

    def resize(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() > 0 and len(x) == before and bool((x == x[:1]).all()):
            return x[:1].expand(after, *x.shape[1:])
        if isinstance(x, int) and not isinstance(x, bool) and x == before:
            raise ValueError(
                f"the number {x} passes from unit to unit, which may be that of the samples: batches have to stay as they are, "
                "or the model has to be cut elsewhere"
            )
        return x

    return constants if before == after else tree_map(resize, constants)


def detach_state(state: State) -> State:
    """The same values, cut off from the graph that made them."""
    if isinstance(state, Tensor):
        return state.detach()
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, state)


@contextmanager
def modes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Every module, and those inside, are in training or eval mode afterwards as they were before."""
    modes = [(inner, inner.training) for module in modules for inner in module.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Unit(nn.Module):
    """A piece of a model: a function of a state, and the modules whose parameters it uses.

    Its parameters are the model's own, not copies: training a unit trains the model, and the model's ``state_dict``
    keeps its names.

    Parameters
    ----------
    name : str
        For tables and errors; of a unit made by :func:`~layerwise.split`, the module that it begins with.
    function : callable
        Maps a state to the next one. It is called in training mode and, unless `eval_function` is given, in eval mode.
    modules : mapping or sequence of Module
        What `function` uses. A mapping's keys are the names by which the model knows them.
    parameters : mapping, optional
        Parameters that it uses and none of `modules` holds, by the names under which the model knows them.
    eval_function : callable, optional
        Called instead of `function` in eval mode.
    constants : int, default=0
        How many of the first values of the state that enters do not depend on what the model's input holds, such as masks.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[State], State],
        modules: Mapping[str, nn.Module] | Sequence[nn.Module],
        *,
        parameters: Mapping[str, nn.Parameter] | None = None,
        eval_function: Callable[[State], State] | None = None,
        constants: int = 0,
    ) -> None:
        super().__init__()
        self.name = name
        self.constants = constants
        if not isinstance(modules, Mapping):
            modules = {str(i): module for i, module in enumerate(modules)}
        self.paths = tuple(modules)
        self.parts = nn.ModuleList(modules.values())
        self.loose_names = tuple(parameters or ())
        self.loose = nn.ParameterList((parameters or {}).values())
        self.__dict__["_function"] = function
        self.__dict__["_eval_function"] = eval_function or function
        self._trainable: tuple[Tensor, ...] = ()
        self._flat = tuple(module for module in self.parts.modules() if module is not self.parts)
        self.frozen = False

    def forward(self, state: State) -> State:
        function: Callable[[State], State] = self.__dict__["_function" if self.training else "_eval_function"]
        return function(state)

    def __getstate__(self) -> dict[str, Any]:
        for function in (self.__dict__["_function"], self.__dict__["_eval_function"]):
            if isinstance(function, FunctionType):
                raise TypeError(
                    f"unit {self.name!r} cannot be copied or pickled: a copy of its function "
                    f"{function.__qualname__!r} would go on using the modules of the original. Give a module or a method of one "
                    "as function, or make the units of the copy anew"
                )
        return self.__dict__

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers under the model's names, each once."""
        seen: set[int] = set()
        yield from zip(self.loose_names, self.loose, strict=True)
        for path, part in zip(self.paths, self.parts, strict=True):
            for kind in (part.named_parameters, part.named_buffers):
                for name, tensor in kind():
                    if id(tensor) not in seen:
                        seen.add(id(tensor))
                        yield (f"{path}.{name}" if path else name), tensor

    @property
    def parameter_count(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.parameters())

    def freeze(self) -> None:
        """Eval mode and no gradients, until :meth:`unfreeze`. What did not want gradients before will not after."""
        if not self.frozen:
            self._trainable = tuple(p for p in self.parameters() if p.requires_grad)
            self.frozen = True
        for p in self._trainable:
            p.requires_grad_(False)
            p.grad = None
        self.eval()

    def unfreeze(self) -> None:
        """Training mode, and gradients for the parameters that had them."""
        if self.frozen:
            for p in self._trainable:
                p.requires_grad_(True)
            self._trainable = ()
            self.frozen = False
        self.train()

    def renew(self) -> None:
        """Take note of parameters that have been replaced."""
        if self.frozen:
            for p in self.parameters():
                p.grad = None
            self._trainable = tuple(self.parameters())

    def guard(self) -> None:
        """Put a frozen unit back into eval mode, whoever called ``train()`` on it or on the model."""
        if self.training or any(module.training for module in self._flat):
            self.eval()

    def extra_repr(self) -> str:
        return f"{self.name!r}, {self.parameter_count:,} parameters"


class Chain:
    """Units in order; calling it computes what the model computes.

    Parameters
    ----------
    units : sequence of Unit
        In order.
    model : Module, optional
        What they were made of.
    has_output : bool, default=True
        Whether the last unit ends with the model's own output, which then serves as its head's.

    Raises
    ------
    ValueError
        If there is no unit, a unit has no parameters, or two share a parameter, a module's buffer or a dropout layer.
    """

    def __init__(self, units: Sequence[Unit], model: nn.Module | None = None, *, has_output: bool = True) -> None:
        self.units = list(units)
        self.model = model
        self.has_output = has_output
        if not self.units:
            raise ValueError("expected at least one unit, got none")
        owners: dict[int, str] = {}
        for unit in self.units:
            if not any(True for _ in unit.parameters()):
                raise ValueError(
                    f"unit {unit.name!r} has no parameters, so that there is nothing to train in it; "
                    "let it join the unit before it"
                )
            for name, tensor in unit.named_tensors():
                if owners.setdefault(id(tensor), unit.name) != unit.name:
                    kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                    raise ValueError(
                        f"{kind} {name!r} is used by units {owners[id(tensor)]!r} and {unit.name!r}; each of them would "
                        "train it for itself. Make one unit of the two and of what lies between, or give each its own"
                    )

        droppers: dict[int, str] = {}
        for unit in self.units:
            for module in {id(m): m for part in unit.parts for m in part.modules()}.values():
                dropper = isinstance(module, nn.modules.dropout._DropoutNd)
                if dropper and droppers.setdefault(id(module), unit.name) != unit.name:
                    raise ValueError(
                        f"units {droppers[id(module)]!r} and {unit.name!r} share a {type(module).__name__}, which cannot be in "
                        "training mode in one of them and not in the other; give each its own"
                    )

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> Unit:
        return self.units[index]

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def __call__(self, state: State) -> State:
        return self.run(state, 0, len(self.units))

    def run(self, state: State, first: int, stop: int) -> State:
        """The state after units first, ..., stop - 1."""
        for unit in self.units[first:stop]:
            state = unit(state)
        return state

    @property
    def names(self) -> list[str]:
        return [unit.name for unit in self.units]

    def modules(self) -> Iterator[nn.Module]:
        """The units' parts."""
        for unit in self.units:
            yield from unit.parts

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all units; none is in two."""
        for unit in self.units:
            yield from unit.parameters()

    def missing(self, model: nn.Module) -> list[str]:
        """Names of the model's trainable parameters that are in no unit."""
        own = {id(p) for p in self.parameters()}
        return [name for name, p in model.named_parameters() if id(p) not in own and p.requires_grad]

    def train(self, mode: bool = True) -> None:
        for unit in self.units:
            unit.train(mode)

    def eval(self) -> None:
        self.train(False)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's, or, of units put together by hand, everything under the unit's number."""
        if self.model is not None:
            return self.model.state_dict()
        return {f"{i}.{k}": v for i, unit in enumerate(self.units) for k, v in unit.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.model is not None:
            self.model.load_state_dict(state)
            return
        for i, unit in enumerate(self.units):
            unit.load_state_dict({k.removeprefix(f"{i}."): v for k, v in state.items() if k.startswith(f"{i}.")})

    @torch.no_grad()
    def check(self, example: State) -> None:
        """Raise ``AssertionError`` unless the chain gives bit for bit what the model gives, in eval mode."""
        if self.model is None:
            return
        with modes_kept([self.model, *self.units]):
            self.model.eval()
            self.eval()
            before = rng_state()
            try:
                expected = self.model(*example) if isinstance(example, tuple) else self.model(example)
                set_rng_state(before)
                got = self._call_on(example)
            finally:
                set_rng_state(before)
        _assert_equal(got, expected)

    def _call_on(self, example: State) -> State:
        try:
            return self(example)
        except (TypeError, ValueError, AttributeError) as error:
            if not isinstance(example, tuple):
                raise
            raise TypeError(
                f"the model takes these {len(example)} inputs, its units do not: optional arguments of its forward have "
                "their defaults in a chain; wrap it in a module whose forward has no defaults for what the loader gives"
            ) from error

    def __repr__(self) -> str:
        rows = [f"  {i}: {unit.name}, {unit.parameter_count:,} parameters" for i, unit in enumerate(self.units)]
        return "\n".join(["Chain of", *rows])


def _assert_equal(got: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        if expected.is_meta and got.shape == expected.shape:
            return
        if got.shape != expected.shape or not ((got == expected) | (got.isnan() & expected.isnan())).all():
            difference = (got - expected).abs().max().item() if got.shape == expected.shape else tuple(got.shape)
            raise AssertionError(
                f"the chained units do not reproduce the model's output: largest difference {difference}. Its forward does "
                "not do the same twice, or depends on values that tracing has fixed; give units by hand"
            )
    elif isinstance(expected, Mapping):
        for key in expected:
            _assert_equal(got[key], expected[key])
    elif isinstance(expected, (tuple, list)):
        for a, b in zip(got, expected, strict=True):
            _assert_equal(a, b)
