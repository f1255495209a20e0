"""Questions to traced values, and the functions that a trace calls besides the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_map

from layerwise.splitting.errors import SplitError
from layerwise.splitting.metadata import Unknown

__all__ = ["answer_to", "check_answer", "without_gradient"]


_QUESTIONS: dict[str, Callable[[Any], Any]] = {"bool": bool, "len": len, "int": int, "float": float}


def answer_to(question: str, value: Any) -> Any:
    if isinstance(value, Tensor) and question != "len":
        raise Unknown("it depends on what a tensor holds")
    if question in ("int", "float") and not isinstance(value, (int, float)):
        raise Unknown(f"it is no number: {value!r}")
    try:
        return _QUESTIONS[question](value)
    except TypeError as error:
        raise Unknown(str(error)) from None


def check_answer(value: Any, question: str, answer: Any, where: str) -> Any:
    """Part of a trace: what was found out for the example holds for this input also."""
    if isinstance(value, fx.Proxy):  # a chain that is unpickled traces its functions anew
        return value.tracer.create_proxy("call_function", check_answer, (value, question, answer, where), {})
    now = _QUESTIONS[question](value)
    if now != answer:
        raise SplitError(
            f"the model was cut by an example for which the {question} asked for at {where} is {answer}; here it is {now}. Cut "
            "it by an example like this input, give inputs like the example, or let that line be within a unit"
        )
    return None


def without_gradient(value: Any) -> Any:
    """Part of a trace: what is computed under torch.no_grad()."""
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", without_gradient, (value,), {})
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, value)
