"""Cutting time into chunks gives the membranes and spikes of the uncut sequence."""

from functools import partial
from itertools import pairwise

import pytest
import snntorch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdt_blocks import (
    LIF,
    SpikeDrivenSelfAttention,
    SpikeDrivenTransformer,
    SpikingMLP,
    Stream,
    optimize_for_inference,
    over_time,
)
from sdt_blocks.steps import is_unit


def spikes_and_membranes(model):
    """What every neuron emitted, and every module gave, by name, since."""
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, inputs, out, name=name: seen.setdefault(name, []).append(out))
    return seen


NEURONS = {
    "lif": "lif",
    "plif": "plif",
    "soft reset": partial(LIF, reset="subtract", tau=3.0),
    "snnTorch": partial(snntorch.Synaptic, alpha=0.5, beta=0.8),
}


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS)
@pytest.mark.parametrize("event_pooling", [False, True])
def test_chunks_of_frames(monkeypatch, firing_model, backend, neuron, event_pooling):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", backend)
    model = firing_model(neuron=neuron, event_pooling=event_pooling, depth=1, per_step=True)
    frames = torch.rand(2, 7, 3, 16, 16)
    with torch.no_grad():
        whole, logits = model.forward_features(frames), model(frames)
        stream = model.stream()
        for lengths in ([7], [1] * 7, [3, 1, 2, 1]):
            stream.reset()
            with stream:
                parts = [model.forward_features(chunk) for chunk in frames.split(lengths, 1)]
            assert torch.equal(torch.cat(parts), whole)
            stream.reset()
            assert torch.equal(torch.cat([stream(chunk) for chunk in frames.split(lengths, 1)]), logits)
        alone = torch.cat([model(frames[:, t : t + 1]) for t in range(7)])
    assert logits.std() > 0 and not torch.equal(alone, logits)
    assert torch.equal(model(frames), logits)


def test_chunks_of_a_block_on_triton(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "triton")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = SpikeDrivenSelfAttention(8, num_heads=2, neuron="plif").to(device).eval()
    for unit in (block.q, block.k, block.v):
        nn.init.constant_(unit.norm.bias, 1.3)
    with torch.no_grad():
        for weight in (unit.conv.weight for unit in block.modules() if is_unit(unit)):
            weight.mul_(64).round_().div_(
                64
            )  # sums are exact, so that a library that adds in another order is no matter
    x = torch.rand(4, 1, 8, 3, 3, device=device) * 3
    with torch.no_grad():
        whole = block(x)
    stream = Stream(block)
    assert torch.equal(torch.cat([stream(x[:1]), stream(x[1:3]), stream(x[3:])]), whole)
    assert not torch.equal(torch.cat([block(x_t[None]) for x_t in x]), whole)


def test_every_layer(firing_model):
    model = firing_model()
    frames = torch.rand(2, 6, 3, 16, 16)
    seen = spikes_and_membranes(model)
    model(frames)
    whole = {name: torch.cat(outputs) for name, outputs in seen.items() if name}
    seen.clear()
    stream = model.stream()
    for chunk in frames.split(2, 1):
        stream(chunk)
    fired = 0
    for name, outputs in seen.items():
        if name and name != "head":
            assert torch.equal(torch.cat(outputs), whole[name]), name
            fired += "neuron" in name and whole[name].mean().item() > 0
    assert fired >= 10


@settings(max_examples=20, deadline=None)
@given(cuts=st.sets(st.integers(1, 9)), reset=st.sampled_from(["zero", "subtract", "none"]), tau=st.floats(1, 5))
def test_any_cut_of_a_neuron(cuts, reset, tau):
    neuron = LIF(tau=tau, reset=reset).eval()
    x = torch.rand(10, 3, 5, generator=torch.Generator().manual_seed(0)) * 3
    stream = Stream(neuron)
    edges = [0, *sorted(cuts), 10]
    parts = [stream(x[start:end]) for start, end in pairwise(edges)]
    assert torch.equal(torch.cat(parts), neuron(x)) and neuron(x).any()


def test_images_in_two_halves(firing_model):
    model = firing_model(per_step=True, time_steps=6)
    images = torch.rand(2, 3, 16, 16)
    whole = model(images)
    model.time_steps = 3
    stream = model.stream()
    assert torch.equal(torch.cat([stream(images), stream(images)]), whole) and whole.std() > 0


def test_two_streams_of_a_model_do_not_meet(firing_model):
    for neuron in ("lif", partial(snntorch.Leaky, beta=0.7)):
        model = firing_model(neuron=neuron, per_step=True)
        a, b = torch.rand(2, 4, 3, 16, 16), torch.rand(3, 4, 3, 16, 16)
        first, second = model.stream(), model.stream()
        for t in range(4):
            ours, theirs, between = (call(x[:, t : t + 1]) for call, x in ((first, a), (second, b), (model, a)))
        assert torch.equal(ours, model(a)[-1:]) and torch.equal(theirs, model(b)[-1:])
        assert torch.equal(between, model(a[:, 3:]))


def test_an_error_leaves_the_states(firing_model):
    model = firing_model(per_step=True)
    frames = torch.rand(2, 4, 3, 16, 16)
    stream = model.stream()
    first = stream(frames[:, :2])
    with pytest.raises(ValueError, match="call reset"):
        stream(frames[:1, 2:])
    hook = model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream(frames[:, 2:])
    hook.remove()
    assert torch.equal(torch.cat([first, stream(frames[:, 2:])]), model(frames))


def test_what_cannot_be_streamed(firing_model):
    model = firing_model()
    stream = model.stream()
    with stream, pytest.raises(RuntimeError, match="within a stream"), Stream(model):
        pass
    model.blocks[0].train()
    with pytest.raises(RuntimeError, match="eval mode"):
        stream(torch.rand(1, 1, 3, 16, 16))
    model.eval()
    shared = LIF()
    for other, message in (
        (optimize_for_inference(model, compile=False), "rebuilt for inference"),
        (optimize_for_inference(model, sparse=True), "rebuilt for inference"),
        (torch.compile(model), "compiled"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "no neuron"),
        (nn.Sequential(shared, nn.Linear(3, 3), shared), "several places"),
        (nn.Sequential(LIF(), nn.GRU(3, 3)), "GRU 1"),
    ):
        with pytest.raises(TypeError, match=message):
            Stream(other)
    assert Stream(nn.Sequential(LIF(), over_time(snntorch.Leaky(beta=0.9)))).neurons


def test_there_are_no_gradients():
    block = SpikingMLP(4).eval()
    x = torch.rand(2, 1, 4, 2, 2, requires_grad=True)
    assert not Stream(block)(x).requires_grad and block(x).requires_grad


def test_the_model_has_the_call():
    assert isinstance(SpikeDrivenTransformer(depth=0, dim=8, num_heads=1).stream(), Stream)
