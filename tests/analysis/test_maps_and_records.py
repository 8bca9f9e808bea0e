"""Attention maps against the released spikes, membranes against snnTorch's own loop."""

import pytest
import snntorch
import torch
from torch import nn

from sdt_blocks import LIF, ParametricLIF
from sdt_blocks.analysis import attention_maps, overlay, record, upsample
from sdt_blocks.neuron import Stream, over_time


def test_maps_are_the_means_of_the_released_spikes(golden):
    model, x, depth = golden.model(), golden.tensors["input"], golden.config["depth"]
    every = attention_maps(model, x, block=None, per_step=True)
    for block in range(depth):
        # [T, B, heads, tokens, channels of a head]
        spikes = golden.tensors[f"hook.MS_SSA_Conv{block}_x_after_qkv"].float()
        expected = spikes.mean((2, 4)).view(every.shape[1:])
        torch.testing.assert_close(every[block], expected)
        torch.testing.assert_close(attention_maps(model, x, block=block), expected.mean(0))
    torch.testing.assert_close(attention_maps(model, x), every[-1].mean(0))
    assert every.max() > 0


def test_map_errors(small):
    with pytest.raises(ValueError, match="nothing to map"):
        attention_maps(nn.Linear(2, 2), torch.rand(1, 2))
    with pytest.raises(ValueError, match="between -1 and 0, got 3"):
        attention_maps(small(), torch.rand(1, 3, 16, 16), block=3)


def test_upsampling_keeps_constants_and_size():
    maps = torch.tensor([0.25, 0.5]).view(2, 1, 1).expand(2, 4, 6)
    large = upsample(maps, (16, 24))
    assert large.shape == (2, 16, 24)
    torch.testing.assert_close(large, maps[:, :1, :1].expand(2, 16, 24))


@pytest.mark.parametrize("size", [8, None, (8,), (8, 8, 8), (0, 8), (8, -1), (8, 2.5), ("8", 8)])
def test_an_odd_size_for_a_map(size):
    with pytest.raises(
        (TypeError, ValueError), match=r"size(=.* must be a whole number| must be 2 whole numbers of at least 1), got "
    ):
        upsample(torch.rand(4, 4), size)


@pytest.mark.parametrize(
    ("image", "attention", "told"),
    [
        ((8, 8), (2, 2), r"image: expected \[C, H, W\] or \[T, C, H, W\] with nothing empty, got \[8, 8\]"),
        ((1, 4, 3, 8, 8), (2, 2), "image: expected"),
        ((0, 8, 8), (2, 2), "image: expected"),
        ((3, 8, 8), (1, 2, 2), r"attention: expected \[H', W'\] with nothing empty, got \[1, 2, 2\]"),
        ((3, 8, 8), (0, 2), "attention: expected"),
    ],
)
def test_overlay_refuses_other_shapes(image, attention, told):
    with pytest.raises(ValueError, match=told):
        overlay(torch.rand(image), torch.rand(attention))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (2, 8, 8), (5, 2, 8, 8), (4, 3, 8, 8)])
def test_overlay(shape):
    image = 10 * torch.randn(shape)
    nothing = overlay(image, torch.zeros(2, 2))
    picture = image.mean(0) if image.ndim == 4 else image
    picture = picture if len(picture) == 3 else picture.sum(0, keepdim=True).expand(3, 8, 8)
    expected = (picture - picture.min()) / (picture.max() - picture.min())
    torch.testing.assert_close(nothing, expected.permute(1, 2, 0))
    covered = overlay(image, torch.ones(2, 2), strength=1.0, colormap="gray")
    torch.testing.assert_close(covered, torch.ones(8, 8, 3))


@pytest.mark.parametrize(
    "neuron", ["lif", "plif", lambda threshold: LIF(tau=3.0, threshold=threshold, reset="subtract")]
)
def test_recording_is_snntorchs_trajectory(small, neuron):
    model, x = small(neuron=neuron), torch.rand(2, 3, 16, 16)
    name = "blocks.0.mlp.branch.neuron2"
    seen = {}
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.update(x=args[0], s=out))
    recording = record(model, x, name)
    handle.remove()
    assert torch.equal(recording.spikes, seen["s"]) and recording.spikes.mean() > 0
    layer, membrane = model.get_submodule(name), None
    for t in range(3):
        with torch.no_grad():
            _, membrane = layer.step(seen["x"][t], membrane)
        torch.testing.assert_close(recording.membrane[t], membrane)
    assert torch.equal(recording.spikes == 1, recording.membrane >= recording.threshold)


def test_recording_with_a_time_constant_for_each_channel():
    net = nn.Sequential(ParametricLIF(channels=3))
    nn.init.normal_(net[0].w)
    x = torch.randn(6, 2, 3)
    recording = record(net, x, "0")
    v = torch.zeros(2, 3)
    for t in range(6):
        h = v + (x[t] - v) * torch.sigmoid(net[0].w.detach())
        torch.testing.assert_close(recording.membrane[t], h)
        v = h * (h < 1)


@pytest.mark.parametrize("init_hidden", [False, True])
def test_recording_a_plain_snntorch_loop(init_hidden):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = snntorch.Leaky(beta=0.9, init_hidden=init_hidden)

        def forward(self, x):
            membrane = None
            for step in x:
                if init_hidden:
                    self.lif(step)
                else:
                    membrane = self.lif.init_leaky() if membrane is None else membrane
                    _, membrane = self.lif(step, membrane)

    x = torch.rand(5, 2, 4)
    recording = record(Loop(), x, "lif")
    lif, membrane = snntorch.Leaky(beta=0.9), torch.zeros(2, 4)
    for t in range(5):
        spikes, membrane = lif(x[t], membrane)
        torch.testing.assert_close(recording.membrane[t], membrane)
        torch.testing.assert_close(recording.spikes[t], spikes)
    assert recording.threshold == 1


@pytest.mark.parametrize("kind", [snntorch.Synaptic, snntorch.Alpha])
def test_recording_a_neuron_with_currents(kind):
    neuron, x = kind(alpha=0.9, beta=0.8), torch.rand(5, 2, 4)
    recording = record(nn.Sequential(over_time(neuron)), x, "0")
    state = getattr(neuron, f"init_{kind.__name__.lower()}")()
    for t in range(5):
        spikes, *state = neuron(x[t], *state)
        torch.testing.assert_close(recording.membrane[t], state[-1])
        torch.testing.assert_close(recording.spikes[t], spikes)


def test_recording_a_neuron_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = LIF(tau=2.0, reset="none")

        def forward(self, x):
            self.lif(x), self.lif(2 * x)

    net, x = Twice(), torch.rand(5, 2, 4)
    recording = record(net, x, "lif")
    assert torch.equal(recording.spikes, torch.cat([net.lif(x), net.lif(2 * x)]))
    weights = torch.tensor([[0.5 ** (t - i + 1) * (i <= t) for i in range(5)] for t in range(5)])
    membranes = torch.einsum("ti,ibc->tbc", weights, x)  # without a reset the membrane is linear in its input
    torch.testing.assert_close(recording.membrane, torch.cat([membranes, 2 * membranes]))


def test_recording_a_stream(small):
    model, x = small(), torch.rand(2, 3, 3, 16, 16)
    name = "blocks.0.mlp.branch.neuron2"
    whole = record(model, x, name)

    def in_pieces(net, x):
        stream = Stream(net)
        for t in range(3):
            stream(x[:, t : t + 1])

    recording = record(model, x, name, forward=in_pieces)
    torch.testing.assert_close(recording.membrane, whole.membrane)
    assert torch.equal(recording.spikes, whole.spikes) and whole.spikes.any()


def test_record_errors(small):
    with pytest.raises(ValueError, match="no neuron layer is called 'head'; there are patch"):
        record(small(), torch.rand(1, 3, 16, 16), "head")
    unused = nn.Sequential(nn.Identity())
    unused.lif = LIF()
    with pytest.raises(ValueError, match="took no part"):
        record(unused, torch.rand(1, 3), "lif", forward=lambda model, x: x)
    several = nn.Sequential(over_time(snntorch.Leaky(beta=0.9, threshold=torch.tensor([0.1, 0.2, 0.3]))))
    with pytest.raises(ValueError, match="0 has 3 thresholds, one for each channel"):
        record(several, torch.rand(5, 2, 3), "0")
