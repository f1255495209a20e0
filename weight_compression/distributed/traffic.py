"""What was sent: bytes, bits and entropy of every tensor at every step, and the seconds that it took."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from platonic_core.figures import new_figure, save_figure
from weight_compression.payload import sampled_entropy

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["Layer", "Step", "Traffic", "plot_stats", "write_stats"]


@dataclass
class Layer:
    """A tensor at a step.

    Attributes
    ----------
    numel : int
        Elements.
    bytes : int
        Of the payloads that carried its mean, sum or values: the same on all ranks.
    entropy : float
        Bits, what the number of levels was chosen by; 0 if it was sent exactly. Of a tensor of several payloads, the mean
        over elements.
    """

    numel: int = 0
    bytes: int = 0
    entropy: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / max(1, self.numel)


class Step:
    """Counts of one step, added to by both threads of a channel.

    Attributes
    ----------
    number : int
    mode : str
        'coded', 'bf16' or 'raw'.
    before : int
        Bytes that every rank would send in a plain all-reduce of this dtype, 2 (W - 1) / W times the tensors'.
    sent : int
        Bytes that this rank sent.
    coding, sending : float
        Seconds that this rank's threads coded, and waited for bytes.
    layers : dict of int to Layer
        By the tensor's number.
    """

    def __init__(self, number: int, mode: str) -> None:
        self.number, self.mode = number, mode
        self.before = self.sent = 0
        self.coding = self.sending = 0.0
        self.layers: dict[int, Layer] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def add_sent(self, before: int, sent: int) -> None:
        with self._lock:
            self.before += before
            self.sent += sent

    def add_seconds(self, coding: float, sending: float) -> None:
        with self._lock:
            self.coding += coding
            self.sending += sending

    def add_payload(self, tensor: int, numel: int, payload: torch.Tensor) -> None:
        """What a coded fragment of a tensor arrived as."""
        # The header of a payload on a CUDA device would have to be waited for.
        entropy = sampled_entropy(payload.numpy()) if payload.device.type == "cpu" else float("nan")
        self._add(tensor, numel, payload.numel(), entropy)

    def add_exact(self, tensor: int, numel: int, size: int) -> None:
        self._add(tensor, numel, size, 0.0)

    def _add(self, tensor: int, numel: int, size: int, entropy: float) -> None:
        with self._lock:
            layer = self.layers.setdefault(tensor, Layer())
            layer.entropy = (layer.entropy * layer.numel + entropy * numel) / max(1, layer.numel + numel)
            layer.numel += numel
            layer.bytes += size


class Traffic:
    """The last steps, and sums over all of them.

    Parameters
    ----------
    keep_steps : int
        How many steps stay in :attr:`steps`.

    Attributes
    ----------
    steps : deque of Step
    names : dict of int to str
        Of tensors, by number.
    """

    def __init__(self, keep_steps: int) -> None:
        self.steps: deque[Step] = deque(maxlen=keep_steps)
        self.names: dict[int, str] = {}
        self._older = Step(-1, "")
        self._older_steps = 0

    def begin(self, number: int, mode: str) -> Step:
        if self.steps and len(self.steps) == self.steps.maxlen:
            oldest = self.steps[0]
            self._older.add_sent(oldest.before, oldest.sent)
            self._older.add_seconds(oldest.coding, oldest.sending)
            self._older_steps += 1
        self.steps.append(Step(number, mode))
        return self.steps[-1]

    def stats(self) -> dict[str, Any]:
        """Sums over all steps, and the last steps by themselves.

        Returns
        -------
        dict
            'steps', 'bytes_before', 'bytes_sent', 'ratio', 'seconds_coding', 'seconds_sending', and 'by_step': a list
            of dicts with 'step', 'mode', the same sums, and 'layers', which gives 'numel', 'bytes', 'bits_per_weight' and
            'entropy' by name.
        """
        every = [self._older, *self.steps]
        before, sent = sum(s.before for s in every), sum(s.sent for s in every)
        return {
            "steps": self._older_steps + len(self.steps),
            "bytes_before": before,
            "bytes_sent": sent,
            "ratio": before / sent if sent else 1.0,
            "seconds_coding": sum(s.coding for s in every),
            "seconds_sending": sum(s.sending for s in every),
            "by_step": [self._describe(step) for step in self.steps],
        }

    def _describe(self, step: Step) -> dict[str, Any]:
        return {
            "step": step.number,
            "mode": step.mode,
            "bytes_before": step.before,
            "bytes_sent": step.sent,
            "seconds_coding": step.coding,
            "seconds_sending": step.sending,
            "layers": {
                self.names.get(tensor, f"tensor {tensor}"): {
                    "numel": layer.numel,
                    "bytes": layer.bytes,
                    "bits_per_weight": layer.bits_per_weight,
                    "entropy": layer.entropy,
                }
                for tensor, layer in step.layers.items()
            },
        }


def write_stats(stats: dict[str, Any], writer: Any) -> None:
    """Every step of the statistics to TensorBoard.

    Parameters
    ----------
    stats : dict
        What ``stats()`` of a state or averager returned.
    writer : torch.utils.tensorboard.SummaryWriter
        Or anything else with ``add_scalar(tag, value, step)``.
    """
    for step in stats["by_step"]:
        at = step["step"]
        for name in ("bytes_before", "bytes_sent", "seconds_coding", "seconds_sending"):
            writer.add_scalar(f"traffic/{name}", step[name], at)
        for layer, counts in step["layers"].items():
            for name in ("bits_per_weight", "entropy"):
                writer.add_scalar(f"{name}/{layer}", counts[name], at)


def plot_stats(stats: dict[str, Any], path: str | PathLike[str]) -> None:
    """Entropy by layer and bits per weight against steps, as in the thesis's figures 3.3 and 3.5.

    Parameters
    ----------
    stats : dict
        What ``stats()`` of a state or averager returned.
    path : path-like
        Of the picture: what its suffix says.

    Raises
    ------
    ImportError
        Without matplotlib, which the extra 'plot' installs.
    ValueError
        If nothing was coded in the steps that were kept.
    """
    steps = [step for step in stats["by_step"] if step["layers"]]
    if not steps:
        raise ValueError("stats: expected steps in which something was coded, got none")
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(name for step in steps for name in step["layers"]))
    large = sorted(names, key=lambda name: -max(s["layers"].get(name, {"numel": 0})["numel"] for s in steps))[:8]
    for name in (name for name in names if name in large):
        seen = [step for step in steps if name in step["layers"]]
        left.plot([s["step"] for s in seen], [s["layers"][name]["entropy"] for s in seen], label=name, linewidth=1)
    left.set(xlabel="step", ylabel="entropy of the sample, bits", title="Entropy by layer")
    left.legend(fontsize="small")
    numel = [sum(layer["numel"] for layer in s["layers"].values()) for s in steps]
    bits = [8 * sum(layer["bytes"] for layer in s["layers"].values()) / n for s, n in zip(steps, numel, strict=True)]
    right.plot([s["step"] for s in steps], bits, color="black", linewidth=1)
    right.set(xlabel="step", ylabel="bits per weight", title="Rate", ylim=(0, None))
    save_figure(figure, path)
