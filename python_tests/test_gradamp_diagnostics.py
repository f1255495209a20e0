"""The recorder of gradients against gradients taken by hand, and the figures drawn from it."""

import pytest
import torch
from torch import nn

import gradamp
from gradamp.diagnostics import (
    GradientRecorder,
    plot_layer_rms,
    plot_output_gradients,
    plot_softmax_normalizer,
    save_figure,
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def test_what_is_recorded():
    net, loss = network(), gradamp.ExpGALoss(target_values=(0, 16), alpha=0.1)
    batches = [(torch.randn(5, 6), torch.randint(4, (5,))) for _ in range(3)]
    with GradientRecorder(net) as recorder:
        for x, target in batches:
            loss(net(x), target).backward()
        recorder.end_epoch()
        recorder.end_epoch()
    loss(net(batches[0][0]), batches[0][1]).backward()  # not watched any more
    assert len(recorder.layer_rms) == 2 and recorder.layer_rms[1]["0"] != recorder.layer_rms[1]["0"]  # NaN

    outputs, normalizers = [], []
    for x, target in batches:
        logits = net(x).detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(logits, target), logits)
        outputs.append(grad)
        normalizers.append(logits.detach().exp().sum(1))
    rms = torch.cat(outputs).square().mean().sqrt().item()
    assert recorder.layer_rms[0]["2"] == pytest.approx(rms, rel=1e-5)
    torch.testing.assert_close(recorder.output_gradients[0], outputs[0].reshape(-1) * 5)
    assert recorder.normalizers[0] == pytest.approx(torch.cat(normalizers).mean().item(), rel=1e-5)


def test_samples_are_bounded_and_layers_chosen():
    net = network()
    with GradientRecorder(net, layers=["0"], output=net[2], samples=7, scale_by_batch=False) as recorder:
        gradamp.exp_ga(net(torch.randn(9, 6)), torch.zeros(9, dtype=torch.int64)).backward()
        recorder.end_epoch()
    assert list(recorder.layer_rms[0]) == ["0"] and 0 < recorder.output_gradients[0].numel() <= 7
    with pytest.raises(ValueError, match="no layers"):
        GradientRecorder(net, layers=["head"])
    with pytest.raises(ValueError, match="no layers"):
        GradientRecorder(nn.ReLU())
    with pytest.raises(ValueError, match="not a module"):
        GradientRecorder(net, output=nn.Linear(1, 1))
    with pytest.raises(TypeError, match="layers: expected names in a list, got '02'"):
        GradientRecorder(net, layers="02")
    with pytest.raises(ValueError, match="samples: expected at least 1"):
        GradientRecorder(net, samples=0)


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    recorders = {}
    for name in ("cross_entropy", "pow3_ga"):
        net, loss = network(), gradamp.make_loss(name)
        with GradientRecorder(net) as recorder:
            for _ in range(2):
                loss(net(torch.randn(5, 6)), torch.randint(4, (5,))).backward()
                recorder.end_epoch()
        recorders[name] = recorder
    figures = [
        plot_output_gradients(recorders, epochs=(0, 1)),
        plot_output_gradients(recorders),
        plot_layer_rms(recorders),
        plot_softmax_normalizer(recorders),
        plot_layer_rms(recorder),
        plot_softmax_normalizer(recorder),
    ]
    assert [len(figure.axes) for figure in figures] == [4, 4, 2, 1, 2, 1]
    for i, figure in enumerate(figures):
        save_figure(figure, tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 5000
