"""How torch.fx follows a forward.

Only the containers above the units are traced: a block that torch.fx cannot follow is no obstacle as long as it is a unit
as a whole.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from layerwise.splitting.metadata import Metadata, Unknown
from layerwise.splitting.questions import answer_to, check_answer, without_gradient

__all__ = ["Tracer", "has_state", "own_frames"]


_FACTORIES = {
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.tensor,
    torch.zeros,
}


class Tracer(fx.Tracer):
    """Goes into every module but the leaves, and remembers which one it was in when it failed.

    Optional arguments of the model's forward have their defaults, and are no inputs of the trace. Tensors that the forward
    makes of nothing, random ones among them, are made anew at every call. torch's own transformer encoder, whose forward looks at
    sizes, is followed layer by layer where it has samples first and is given no mask. With examples, of two sizes of batch, the
    forward learns what they agree on: conditions on shapes and types, lengths, numbers.
    """

    proxy_buffer_attributes = True

    def __init__(self, leaves: Collection[str] = (), examples: Sequence[tuple[Any, ...]] = ()) -> None:
        super().__init__()
        self.leaves = leaves
        self.examples = examples
        self.metadata: list[Metadata] = []
        self.asking = False
        self.stack: list[str] = []
        self.failed_in: str | None = None
        self.encoders: dict[str, set[bool]] = {}  # by name, whether its calls so far could be followed

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self.installed = set(root.modules())
        self.autocast = _autocast()
        with _Factories(self), torch.enable_grad():
            return super().trace(root, concrete_args)

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        made = super().create_proxy(kind, *args, **kwargs)
        if not kind.startswith("call"):
            return made
        if not self.autocast.issuperset(_autocast()):
            raise ValueError(
                "torch.autocast within a model is not followed; train with amp=..., or have it within a unit"
            )
        return made if torch.is_grad_enabled() else super().create_proxy("call_function", without_gradient, (made,), {})

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.asking else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.encoders.get(module_qualified_name) == {True}:
            return False
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.asking or (m not in self.installed and not has_state(m)):
            return forward(*args, **kwargs)  # also of modules made by the forward itself, as in nn.ReLU()(x)
        path = self.path_of_module(m)
        self.stack.append(path)
        if isinstance(m, nn.TransformerEncoder) and path not in self.leaves:
            plain = _is_plain(m, args, kwargs)
            self.encoders.setdefault(path, set()).add(plain)
            forward = functools.partial(_encode, m) if plain else forward
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = self.stack[-1]
            raise
        finally:
            self.stack.pop()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        taken = list(inspect.signature(root_fn).parameters.values())[1:]
        if any(p.kind is p.VAR_POSITIONAL or (p.kind is p.KEYWORD_ONLY and p.default is p.empty) for p in taken):
            raise TypeError("forward takes *args or arguments that have to be named; its inputs have to be positional")
        positional = [p for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        inputs = [p for p in positional if p.default is p.empty] or positional[:1]
        if isinstance(self.root, nn.TransformerEncoder) and _is_plain(self.root, (None,), {}):
            root_fn = _encode
        self.metadata = [Metadata(self.root, batch) for batch in self.examples if len(batch) >= len(inputs)]
        if self.examples and not self.metadata:
            self.lacking = f"the example has {len(self.examples[0])} of the {len(inputs)} inputs"
        else:
            self.lacking = "it is not known without an example of the input"
        return root_fn, [self.root, *(self.create_proxy("placeholder", p.name, (), {}) for p in inputs)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def ask(self, proxy: fx.Proxy, question: str) -> Any:
        """The answer for the example and for another size of batch, which becomes a condition of the trace; raises TraceError if
        they differ or there is none."""
        if not self.metadata:
            raise fx.proxy.TraceError(self.lacking)
        self.asking = True
        try:
            answers = [answer_to(question, metadata.of(proxy.node)) for metadata in self.metadata]
        except Unknown as error:
            raise fx.proxy.TraceError(str(error)) from None
        finally:
            self.asking = False
        if answers[0] != answers[1]:
            raise fx.proxy.TraceError(
                f"it differs from batch to batch: {answers[0]}, and with a sample more {answers[1]}"
            )
        self.create_proxy("call_function", check_answer, (proxy, question, answers[0], _asked_at()), {})
        return answers[0]

    def to_bool(self, obj: fx.Proxy) -> bool:
        answer: bool = self.ask(obj, "bool")
        return answer

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([operator.getitem(obj, i) for i in range(self.ask(obj, "len"))])

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and a not in self.tensor_attrs:
            kept = itertools.chain(self.root.parameters(), self.root.buffers())
            if all(a is not tensor for tensor in kept):
                raise ValueError("a tensor is computed without the input; register it as a buffer")
        return super().create_arg(a)


class _Proxy(fx.Proxy):
    """It can be a number, or have a length, where that is known."""

    tracer: Tracer

    def __len__(self) -> int:
        length: int = self.tracer.ask(self, "len")
        return length

    def __index__(self) -> int:
        number: int = self.tracer.ask(self, "int")
        return number

    def __float__(self) -> float:
        number: float = self.tracer.ask(self, "float")
        return number

    __int__ = __index__

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)


class _Attribute(_Proxy, fx.proxy.Attribute):
    pass


def _autocast() -> set[tuple[str, torch.dtype]]:
    return {(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}


def own_frames(frames: Iterable[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Those outside of torch and of the tracer."""
    libraries = Path(torch.__file__).parent, Path(__file__).parent
    return [f for f in frames if not any(library in Path(f.filename).parents for library in libraries)]


def _asked_at() -> str:
    frame = own_frames(traceback.extract_stack())[-1]
    return f"{frame.filename}:{frame.lineno}: `{frame.line}`"


def _is_plain(encoder: Any, args: Any, kwargs: Any) -> bool:
    """Whether torch's own forward is called without masks, on samples along the first axis."""
    ours = type(encoder).forward is nn.TransformerEncoder.forward
    first = all(getattr(getattr(layer, "self_attn", None), "batch_first", False) for layer in encoder.layers)
    if not (ours and first):
        return False
    given = inspect.signature(encoder.forward).bind(*args, **kwargs).arguments
    return all(value is None or value is False for name, value in given.items() if name != "src")


def _encode(encoder: Any, src: Any, *_masks: Any, **_more: Any) -> Any:
    """What that forward computes then."""
    for layer in encoder.layers:
        src = layer(src, src_mask=None, is_causal=False, src_key_padding_mask=None)
    return src if encoder.norm is None else encoder.norm(src)


class _Factories(TorchFunctionMode):
    """Functions that make tensors of nothing become part of the trace; also of sizes that are traced, which the functions'
    own check of their arguments turns down before a mode can see them."""

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORIES and not types:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        for function in _FACTORIES:
            setattr(torch, function.__name__, functools.partial(self._call, function))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for function in _FACTORIES:
            setattr(torch, function.__name__, function)

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            return self.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)


def has_state(module: nn.Module) -> bool:
    return any(True for _ in itertools.chain(module.parameters(), module.buffers()))
