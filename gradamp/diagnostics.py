"""What gradient amplification does to a network in training: figures 4.2, 4.3 and 4.5 of the thesis.

>>> with GradientRecorder(net, output=net.head) as recorder:
...     for epoch in range(10):
...         train(net)
...         recorder.end_epoch()
>>> save_figure(plot_layer_rms(recorder), "rms.png")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from platonic_core.figures import new_figure, save_figure

__all__ = [
    "GradientRecorder",
    "plot_layer_rms",
    "plot_output_gradients",
    "plot_softmax_normalizer",
    "save_figure",
]


class GradientRecorder:
    """Hooks that watch the gradients of layers' outputs, and the output layer's values, while a network trains.

    Recorded by epoch, which :meth:`end_epoch` ends:

    - ``layer_rms[epoch][name]``: root mean square of the gradient of the loss with respect to a layer's output, over all
      elements of the epoch's backward passes;
    - ``output_gradients[epoch]``: a sample of the gradient y - t at the output layer, from the epoch's first batch, as the
      loss would have it with reduction "sum", if `scale_by_batch`;
    - ``normalizers[epoch]``: the mean of s = sum_i e^(x_i) over samples, the size of the softmax's denominator.

    Nothing is changed in the network; sums stay on its device until the epoch ends. Gradients are recorded as they pass: with
    a GradScaler, times its scale.

    Parameters
    ----------
    network : nn.Module
    output : nn.Module, optional
        The layer whose outputs are the logits, [N, C, ...]; the last of `layers` if left out.
    layers : iterable of str, optional
        Names, as in ``network.named_modules()``, of the layers to watch; all linear and convolutional ones if left out.
    samples : int, default 100,000
        The most elements of ``output_gradients`` that are kept of an epoch.
    scale_by_batch : bool, default True
        Multiply output gradients by the number of samples and pixels, which undoes the division of reduction "mean".

    Raises
    ------
    ValueError
        If there is no layer to watch, or none of a given name, or `output` is not part of the network.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        output: nn.Module | None = None,
        layers: Iterable[str] | None = None,
        samples: int = 100_000,
        scale_by_batch: bool = True,
    ) -> None:
        modules = dict(network.named_modules())
        if layers is None:
            kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
            self.layers = [name for name, module in modules.items() if isinstance(module, kinds)]
        elif isinstance(layers, str):
            raise TypeError(f"layers: expected names in a list, got {layers!r}")
        else:
            self.layers = list(layers)
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        unknown = [name for name in self.layers if name not in modules]
        if unknown or not self.layers:
            raise ValueError(f"no layers {unknown} to watch; there are {', '.join(filter(None, modules)) or 'none'}")
        output = modules[self.layers[-1]] if output is None else output
        if all(module is not output for module in modules.values()):
            raise ValueError("output is not a module of the network")
        self.samples = samples
        self.scale_by_batch = scale_by_batch
        self.layer_rms: list[dict[str, float]] = []
        self.output_gradients: list[Tensor] = []
        self.normalizers: list[float] = []
        self._start_epoch()
        self._handles = [modules[name].register_forward_hook(self._watch_layer(name)) for name in self.layers]
        self._handles.append(output.register_forward_hook(self._watch_output))

    def _start_epoch(self) -> None:
        self._squares: dict[str, tuple[Any, int]] = dict.fromkeys(self.layers, (0.0, 0))
        self._normalizer: tuple[Any, int] = (0.0, 0)
        self._first_gradient: Tensor | None = None

    def _watch_layer(self, name: str) -> Any:
        def add(grad: Tensor) -> None:
            total, count = self._squares[name]
            self._squares[name] = (total + grad.detach().double().square().sum(), count + grad.numel())

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(add)

        return hook

    def _watch_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not output.requires_grad:
            return
        total, count = self._normalizer
        axis = 0 if output.ndim == 1 else 1
        normalizer = output.detach().double().exp().sum(axis)
        self._normalizer = (total + normalizer.sum(), count + normalizer.numel())
        batch = normalizer.numel() if self.scale_by_batch else 1

        def keep(grad: Tensor) -> None:
            if self._first_gradient is None:
                flat = grad.detach().reshape(-1).float()
                step = max(1, -(-flat.numel() // self.samples))
                self._first_gradient = flat[::step] * batch

        output.register_hook(keep)

    def end_epoch(self) -> None:
        """Store what the epoch brought; the next backward pass belongs to the next one."""
        self.layer_rms.append(
            {
                name: (float(total) / count) ** 0.5 if count else float("nan")
                for name, (total, count) in self._squares.items()
            }
        )
        total, count = self._normalizer
        self.normalizers.append(float(total) / count if count else float("nan"))
        first = self._first_gradient
        self.output_gradients.append(torch.empty(0) if first is None else first.cpu())
        self._start_epoch()

    def close(self) -> None:
        """Remove the hooks; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> GradientRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plot_output_gradients(
    recorders: Mapping[str, GradientRecorder], epochs: Sequence[int] | None = None, bins: int = 80
) -> Any:
    """Figure 4.2: histograms of the output layer's gradients, a row for each epoch and a column for each loss.

    `epochs`, counted from 0, are by default the first and the fourth, or the last of fewer. Returns a matplotlib figure; raises
    ImportError without matplotlib, ValueError for an epoch that was not recorded.
    """
    if not recorders:
        raise ValueError("recorders: expected at least one, got none")
    recorded = min(len(recorder.output_gradients) for recorder in recorders.values())
    if epochs is None:
        epochs = sorted({0, min(3, recorded - 1)}) if recorded else [0]
    if not all(0 <= epoch < recorded for epoch in epochs):
        raise ValueError(
            f"epochs: expected numbers from 0 to below the {recorded} that were recorded, got {tuple(epochs)}"
        )
    figure = new_figure(3.2 * len(recorders), 2.4 * len(epochs))
    panels = figure.subplots(len(epochs), len(recorders), squeeze=False)
    for row, epoch in zip(panels, epochs, strict=True):
        for panel, (name, recorder) in zip(row, recorders.items(), strict=True):
            panel.hist(recorder.output_gradients[epoch].numpy(), bins=bins, log=True)
            panel.set(title=f"{name}, epoch {epoch + 1}", xlabel="y - t", ylabel="elements")
    return figure


def plot_layer_rms(recorders: GradientRecorder | Mapping[str, GradientRecorder]) -> Any:
    """Figure 4.3: root mean square of each layer's gradient by epoch, a panel for each layer, a line for each loss.

    Returns a matplotlib figure; raises ImportError without matplotlib.
    """
    if isinstance(recorders, GradientRecorder):
        recorders = {"": recorders}
    layers = list(dict.fromkeys(layer for recorder in recorders.values() for layer in recorder.layers))
    figure = new_figure(2.8 * len(layers) + 1.2, 2.6)
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for panel, layer in zip(panels, layers, strict=True):
        for name, recorder in recorders.items():
            if layer not in recorder.layers:
                continue
            rms = [epoch[layer] for epoch in recorder.layer_rms]
            panel.plot(range(1, len(rms) + 1), rms, "o-", markersize=3, label=name)
        panel.set(title=f"layer {layer}", xlabel="epoch", ylabel="RMS of gradient", yscale="log")
    if any(recorders):  # beside the last panel: lines are everywhere
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


def plot_softmax_normalizer(recorders: GradientRecorder | Mapping[str, GradientRecorder]) -> Any:
    """Figure 4.5: the mean of the softmax's denominator, sum_i e^(x_i), by epoch.

    Returns a matplotlib figure; raises ImportError without matplotlib.
    """
    if isinstance(recorders, GradientRecorder):
        recorders = {"": recorders}
    figure = new_figure(4.5, 3)
    panel = figure.subplots()
    for name, recorder in recorders.items():
        panel.plot(range(1, len(recorder.normalizers) + 1), recorder.normalizers, "o-", markersize=3, label=name)
    panel.set(xlabel="epoch", ylabel="mean of $\\sum_i e^{x_i}$", yscale="log")
    if any(recorders):
        panel.legend()
    return figure
