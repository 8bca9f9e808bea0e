"""Neurons swapped in a network: weights, thresholds and the way of calling stay."""

import copy
from functools import partial

import pytest
import snntorch
import snntorch.utils
import torch
from torch import nn

from sdt_blocks import (
    LIF,
    ParametricLIF,
    SpikeDrivenTransformer,
    SpikingMLP,
    calibrate_norms,
    over_time,
    replace_neurons,
)
from sdt_blocks.neuron import InSteps, find_neurons


class Stepwise(nn.Module):
    """A network in snnTorch's manner: the membranes are handed round, or hidden."""

    def __init__(self, make=None, **options):
        super().__init__()
        make = make or partial(snntorch.Leaky, beta=0.5)
        self.fc1, self.lif1 = nn.Linear(6, 8), make(**options)
        self.fc2, self.lif2 = nn.Linear(8, 3), make(threshold=0.4, **options)
        for layer in (self.fc1, self.fc2):
            nn.init.uniform_(layer.weight, -0.4, 0.6)

    def forward(self, x):  # [T, B, 6]
        spikes = []
        if self.lif1.init_hidden:
            snntorch.utils.reset(self)
            for x_t in x:
                out = self.lif2(self.fc2(self.lif1(self.fc1(x_t))))
                spikes.append(out)
            return torch.stack(spikes)
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        for x_t in x:
            spk1, mem1 = self.lif1(self.fc1(x_t), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
        return torch.stack(spikes)


@pytest.fixture
def frames():
    torch.manual_seed(0)
    return 4 * torch.rand(5, 7, 6)


def test_a_model_becomes_the_one_that_is_built_with_the_neuron():
    torch.manual_seed(0)
    options = {"depth": 1, "dim": 32, "num_classes": 5, "pooling": "0011", "event_pooling": True}
    neuron = {"name": "lif", "tau": 1.5, "reset": "subtract", "threshold": 0.8}
    x = 2 * torch.rand(4, 3, 16, 16)
    model, expected = SpikeDrivenTransformer(**options), SpikeDrivenTransformer(neuron=neuron, **options)
    calibrate_norms(model, x)
    before = model(x)
    expected.load_state_dict(model.state_dict())
    names = list(find_neurons(model))
    assert replace_neurons(model, neuron) is model
    assert list(find_neurons(model)) == names and model.state_dict().keys() == expected.state_dict().keys()
    thresholds = {name: found.threshold for name, found in find_neurons(model).items()}
    assert thresholds == {name: found.threshold for name, found in find_neurons(expected).items()}
    assert set(thresholds.values()) == {0.8, 0.4}
    assert torch.equal(model.train()(x), expected.train()(x)) and not torch.equal(model(x), before)


def test_what_is_learned_stays_or_the_factory_takes_it_over():
    model = SpikingMLP(8, neuron=ParametricLIF)
    nn.init.constant_(model.neuron1.w, 0.7)
    replace_neurons(model, {"name": "plif", "surrogate": "atan"})
    assert model.neuron1.w.item() == pytest.approx(0.7) and model.neuron1.surrogate.kind == "atan"
    old, w = model.neuron1, dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"neuron1, ParametricLIF, has learned w \[\].*argument old"):
        replace_neurons(model, LIF)
    with pytest.raises(ValueError, match=r"learned w \[\].*no place in ParametricLIF"):
        replace_neurons(model, {"name": "plif", "channels": True}, inputs=torch.rand(2, 1, 8, 3, 3))
    assert model.neuron1 is old and dict(model.named_parameters()).keys() == w.keys()
    replace_neurons(model, lambda threshold, old: LIF(threshold=threshold, tau=1 / old.inv_tau.item()))
    assert model.neuron1.tau == pytest.approx(1 + torch.tensor(-0.7).exp().item()) and model.neuron2.tau == 2.0
    leaky = nn.Sequential(over_time(snntorch.Leaky(beta=0.3, learn_beta=True)))
    replace_neurons(leaky, partial(snntorch.Leaky, beta=0.9, learn_beta=True, reset_mechanism="zero"))
    assert leaky[0].neuron.beta.item() == pytest.approx(0.3) and leaky[0].neuron.reset_mechanism == "zero"


def test_widths_come_from_the_neuron_or_from_inputs():
    model = SpikingMLP(8, hidden=12)
    with pytest.raises(ValueError, match="width of each layer: give inputs="):
        replace_neurons(model, {"name": "plif", "channels": True})
    replace_neurons(model.train(), {"name": "plif", "channels": True}, inputs=torch.rand(2, 1, 8, 3, 3))
    assert [model.neuron1.w.shape, model.neuron2.w.shape] == [(8,), (12,)] and model.neuron1.training
    replace_neurons(model, {"name": "plif", "channels": True, "surrogate": "atan"})
    assert model.neuron2.w.shape == (12,) and model.neuron2.surrogate.kind == "atan"
    idle = nn.ModuleDict({"used": SpikingMLP(8), "idle": LIF()})
    idle.forward = lambda x: idle["used"](x)
    with pytest.raises(ValueError, match="did not reach idle"):
        replace_neurons(idle, {"name": "plif", "channels": True}, inputs=torch.rand(2, 1, 8, 3, 3))


def test_a_shared_neuron_stays_shared_and_dtype_and_device_are_the_models():
    shared = LIF()
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared).double()
    replace_neurons(model, ParametricLIF)
    assert model[1] is model[3] and model[1].w.dtype == torch.float64
    assert model(torch.ones(2, 3, 4).double()).dtype == torch.float64


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_a_lif_in_a_network_of_snntorch(hidden, reset, frames):
    """snnTorch's Leaky with inputs scaled by hand is the independent answer."""
    torch.manual_seed(1)
    network = Stepwise(init_hidden=hidden)
    scaled = Stepwise(partial(snntorch.Leaky, beta=1 - 1 / 1.6, reset_mechanism=reset), init_hidden=hidden)
    scaled.load_state_dict({**scaled.state_dict(), **{k: v for k, v in network.state_dict().items() if "fc" in k}})
    with torch.no_grad():
        for layer in (scaled.fc1, scaled.fc2):
            layer.weight /= 1.6
            layer.bias /= 1.6
    expected = scaled(frames)
    replace_neurons(network, partial(LIF, tau=1.6, reset=reset, strict=True))
    assert 0.05 < expected.mean() < 0.95
    for _ in range(2):  # what is hidden is reset
        assert torch.equal(network(frames), expected)
    network(frames).sum().backward()
    assert network.fc1.weight.grad.abs().sum() > 0
    if not hidden:
        copy.deepcopy(network)
    replace_neurons(network, partial(snntorch.Leaky, beta=0.5))
    assert isinstance(network.lif2, snntorch.Leaky) and network.lif2.threshold.item() == pytest.approx(0.4)
    again = Stepwise(init_hidden=hidden)
    again.load_state_dict(network.state_dict())
    assert torch.equal(network(frames), again(frames))


def test_neurons_that_the_network_could_not_call_are_refused(frames):
    network = Stepwise()
    before = network.lif1
    with pytest.raises(TypeError, match=r"lif1 is called .* 1 state\(s\); Synaptic has .* and 2"):
        replace_neurons(network, partial(snntorch.Synaptic, alpha=0.9, beta=0.8))
    with pytest.raises(TypeError, match=r"init_hidden=False.*Leaky has init_hidden=True"):
        replace_neurons(network, partial(snntorch.Leaky, beta=0.9, init_hidden=True))
    with pytest.raises(TypeError, match=r"once a time step.*Identity does not take"):
        replace_neurons(network, lambda threshold: nn.Identity())
    learned = Stepwise(learn_threshold=True)
    with pytest.raises(ValueError, match="lif1, Leaky, has learned threshold"):
        replace_neurons(learned, LIF)
    assert network.lif1 is before


def test_what_is_learned_keeps_its_precision():
    model = nn.Sequential(ParametricLIF()).double()
    nn.init.constant_(model[0].w, 0.1)
    assert replace_neurons(model, {"name": "plif", "surrogate": "atan"})[0].w.item() == 0.1


def test_a_given_membrane_of_another_shape_is_refused():
    neuron = InSteps(LIF())
    with pytest.raises(ValueError, match=r"the membrane must have the shape \[2, 3\] of x, got \[4, 3\]"):
        neuron(torch.ones(2, 3), torch.full((4, 3), 0.9))
    hidden = InSteps(LIF(), init_hidden=True)
    hidden(torch.ones(4, 3))
    assert torch.equal(hidden(torch.full((2, 3), 1.5)), torch.zeros(2, 3))  # snnTorch's own starts anew


def test_bad_arguments():
    with pytest.raises(ValueError, match="no known neuron"):
        replace_neurons(nn.Sequential(nn.ReLU()), LIF)
    with pytest.raises(ValueError, match="itself a neuron, LIF"):
        replace_neurons(LIF(), LIF)
    for kind in (3, None, LIF()):
        with pytest.raises(TypeError, match=f"neuron must be a name, .* got {type(kind).__name__}"):
            replace_neurons(nn.Sequential(LIF()), kind)
    with pytest.raises(TypeError, match="Module, got type"):
        replace_neurons(LIF, LIF)
    for part in ("neuron2", "neuron2.neuron"):
        model = SpikingMLP(8, neuron=partial(snntorch.Leaky, beta=0.5))
        model.get_submodule(part).register_forward_hook(print)
        with pytest.raises(ValueError, match="neuron2 has hooks"):
            replace_neurons(model, LIF)
    channels = nn.Sequential(over_time(snntorch.Leaky(beta=0.5, threshold=torch.tensor([0.5, 1.0]))))
    with pytest.raises(ValueError, match="0 has a threshold for each of 2 channels"):
        replace_neurons(channels, LIF)
    replace_neurons(channels, lambda threshold, old: snntorch.Leaky(beta=0.9, threshold=old.neuron.threshold))
    assert channels[0].neuron.beta == 0.9 and channels[0](torch.full((1, 3, 2), 0.8)).tolist() == [[[1, 0]] * 3]
    replaced = replace_neurons(nn.Sequential(nn.ReLU()), partial(LIF, tau=1.0), neurons=[nn.ReLU])
    assert replaced(torch.tensor([[0.9], [1.1]])).tolist() == [[0], [1]]
