"""snnTorch's losses, accuracies, plots and reset on networks that are mixed of its layers and the kit's."""

import matplotlib
import numpy as np
import pytest
import snntorch
import snntorch.utils
import torch
from snntorch import functional as SF
from snntorch import spikeplot
from torch import nn

from sdt_blocks import LIF, MembraneShortcut, SpikeDrivenSelfAttention, calibrate_norms, create_model, over_time
from sdt_blocks.blocks import ConvNorm
from sdt_blocks.steps import fire, present, project

matplotlib.use("Agg")
STEPS, CLASSES = 6, 4


class Mixed(nn.Module):
    """An attention block of the kit, a hidden-state neuron of snnTorch, and spikes `[T, B, CLASSES]` for an answer."""

    def __init__(self):
        super().__init__()
        self.stem = ConvNorm(2, 16, 3, stride=2)
        self.attention = MembraneShortcut(SpikeDrivenSelfAttention(16, num_heads=2))
        self.neuron, self.linear = LIF(threshold=0.5), nn.Linear(16, 4 * CLASSES)
        self.hidden = snntorch.Leaky(beta=0.9, threshold=0.3, init_hidden=True)
        self.head, self.output = nn.Linear(4 * CLASSES, CLASSES), over_time(snntorch.Leaky(beta=0.7, threshold=0.2))

    def forward(self, images):
        snntorch.utils.reset(self)
        return self.go_on(images)

    def go_on(self, images):
        """`forward` from where the hidden neuron stands."""
        spikes = fire(self.neuron, self.attention(project(self.stem, present(images, STEPS, 2))))
        currents = self.linear(spikes.mean((-2, -1)))
        return self.output(self.head(torch.stack([self.hidden(step) for step in currents])))


@pytest.fixture
def network():
    """A mixed network whose neurons fire, images and their classes."""
    torch.manual_seed(0)
    model, images = Mixed(), torch.rand(16, 2, 12, 12)
    nn.init.normal_(model.linear.weight, std=0.2)
    nn.init.normal_(model.head.weight, std=0.5)
    nn.init.constant_(model.head.bias, 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0.5, 0.3)
    calibrate_norms(model, images)
    with torch.no_grad():
        spikes = model.eval()(images)
    assert 0.05 < spikes.mean() < 0.95 and spikes.std(1).any()
    return model.train(), images, torch.arange(16) % CLASSES


LOSSES = [
    SF.ce_rate_loss(),
    SF.ce_count_loss(),
    SF.mse_count_loss(correct_rate=0.8, incorrect_rate=0.2),
    SF.mse_temporal_loss(on_target=0, off_target=STEPS - 1),
    SF.ce_temporal_loss(),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_losses_of_spikes_train_a_mixed_network(network, loss):
    model, images, labels = network
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=2e-2), []
    for _ in range(15):
        losses.append(loss(model(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        assert model.stem.conv.weight.grad.any() and all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert min(losses[-3:]) < 0.97 * losses[0]


@pytest.mark.parametrize("loss", [SF.ce_max_membrane_loss(), SF.mse_membrane_loss()], ids=lambda loss: loss.__name__)
def test_losses_of_membranes_take_the_logits_of_every_step(loss):
    torch.manual_seed(0)
    model = create_model("sdt_2_256", dim=32, in_channels=2, num_classes=CLASSES, per_step=True)
    images, labels = torch.rand(8, 2, 16, 16), torch.arange(8) % CLASSES
    calibrate_norms(model, images)
    optimizer, losses = torch.optim.Adam(model.train().parameters(), lr=1e-2), []
    for _ in range(15):
        membranes = model(images)
        assert membranes.shape == (4, 8, CLASSES)
        losses.append(loss(membranes, labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert model.patch.stages[0].conv.weight.grad.any() and losses[-1] < 0.9 * losses[0]


def test_accuracies_and_the_sparsity_are_those_of_the_spikes(network):
    model, images, labels = network
    with torch.no_grad():
        spikes = model.eval()(images)
    counts = spikes.sum(0)
    assert SF.accuracy_rate(spikes, labels) == (counts.argmax(1) == labels).float().mean()
    first = torch.where(spikes.bool().any(0), spikes.argmax(0), STEPS - 1)
    assert SF.accuracy_temporal(spikes, labels) == (first.min(1).indices == labels).float().mean()
    assert SF.reg.l1_rate_sparsity(Lambda=0.5)(spikes) == pytest.approx(0.5 * spikes.sum().item())


def test_a_reset_starts_the_hidden_neurons_and_touches_no_other(network):
    model, images, _ = network
    model.eval()
    with torch.no_grad():
        first = model(images)
        gone_on, state = model.go_on(images), model.hidden.mem.clone()
        assert state.any() and not torch.equal(gone_on, first)
        stray = LIF()
        stray(torch.ones(2, 3))
        snntorch.utils.reset(model)
        assert not model.hidden.mem.any() and model.hidden.mem.shape == state.shape
        assert torch.equal(model.go_on(images), first)
    assert not [one for one in snntorch.SpikingNeuron.instances if type(one) is LIF]


def test_spikeplot_draws_the_spikes_of_a_network(network):
    from matplotlib import pyplot as plt

    model, images, _ = network
    with torch.no_grad():
        spikes = model.eval()(images)
        neuron = LIF(threshold=0.5)
        x = 2 * torch.rand(STEPS, 1, 9)
        membranes = torch.stack([neuron(x[: t + 1], return_membrane=True)[1] for t in range(STEPS)])
    figure, axes = plt.subplots()
    drawn = spikeplot.raster(spikes[:, 0], axes, s=2)
    where = np.argwhere(spikes[:, 0].numpy())
    assert len(where) and np.array_equal(np.asarray(drawn.get_offsets()), where)
    plt.close(figure)
    spikeplot.traces(membranes[:, 0], spk=neuron(x)[:, 0], spk_height=5)
    lines = [panel.get_lines()[0].get_ydata() for panel in plt.gcf().axes]
    assert np.allclose(np.stack(lines, 1), membranes[:, 0] + 5 * neuron(x)[:, 0]) and neuron(x).any()
    plt.close("all")
