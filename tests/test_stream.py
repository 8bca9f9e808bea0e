"""Cutting time into chunks gives the membranes and spikes of the uncut sequence."""

import io
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import snntorch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from sdt_blocks import (
    LIF,
    SpikeDrivenSelfAttention,
    SpikeDrivenTransformer,
    SpikingMLP,
    Stream,
    optimize_for_inference,
    over_time,
)
from sdt_blocks.neuron import InSteps
from sdt_blocks.steps import is_unit

STREAMED = (
    "sdt_lif_static_64",
    "sdt_plif_static_32",
    "sdt_lif_dvs_64",
    "spikformer_cifar_32",
    "qkformer_cifar_32",
    "sdtv2_grads_T2_64",
    "sdtv3_base_64",
    "sdtv3_large_kd_64",
)
WITHOUT_MEMORY = ("sdtv3_base_64", "sdtv3_large_kd_64")
REAL_HEAD = ("sdtv3_large_kd_64",)
"""Whose head multiplies real values, which a library rounds otherwise for other numbers of rows."""


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
    with torch.no_grad():  # sums are exact, so that a library that adds in another order is no matter
        for unit in (module for module in block.modules() if is_unit(module)):
            for parameter in unit.conv.parameters():
                parameter.mul_(64).round_().div_(64)
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
    parts, membranes = zip(*(stream(x[start:end], return_membrane=True) for start, end in pairwise(edges)), strict=True)
    whole, last = neuron(x, return_membrane=True)
    assert torch.equal(torch.cat(parts), whole) and torch.equal(membranes[-1], last) and whole.any()


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


def test_an_error_amid_pushed_frames_leaves_the_states(firing_model, on_a_grid):
    model = on_a_grid(firing_model())
    frames, calls = torch.rand(2, 4, 3, 16, 16), iter([None, None])  # the third call fails
    stream, whole = model.stream(), model.stream()
    stream.push(frames[:, 0])
    handle = model.head.register_forward_hook(lambda *_: next(calls))
    with pytest.raises(StopIteration):
        stream.push(frames[:, 1:])
    handle.remove()
    assert stream.seen.tolist() == [1, 1]
    assert torch.equal(stream.push(frames[:, 1:]), whole.push(frames))


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
        (torch.compile(model), "compiled"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "no neuron"),
        (nn.Sequential(shared, nn.Linear(3, 3), shared), "several places"),
        (nn.Sequential(LIF(), snntorch.Leaky(0.5)), "1 cannot be streamed: it is called once a time step"),
        (nn.Sequential(LIF(), InSteps(LIF())), "1 cannot be streamed: it is called once a time step"),
        (nn.Sequential(LIF(), nn.GRU(3, 3)), "GRU 1"),
    ):
        with pytest.raises(TypeError, match=message):
            Stream(other)
    assert Stream(nn.Sequential(LIF(), over_time(snntorch.Leaky(beta=0.9)))).neurons


class Again(nn.Module):
    """A neuron on two membranes of one chunk."""

    def __init__(self, neuron):
        super().__init__()
        self.neuron = neuron

    def forward(self, x):
        return self.neuron(x) + self.neuron(1 - x)


@pytest.mark.parametrize("make", [LIF, lambda: over_time(snntorch.Synaptic(alpha=0.8, beta=0.7))])
def test_a_neuron_that_is_called_twice_for_a_chunk_is_refused(make):
    """Each call would go on from the other; called from outside, one chunk after the other, it goes on as ever."""
    model, x = Again(make()).eval(), 3 * torch.rand(4, 2, 3)
    stream = Stream(model)
    for _ in range(2):
        with pytest.raises(TypeError, match="calls the neuron neuron twice for one chunk"):
            stream(x)
    with stream:
        parts = torch.cat([model.neuron(x[:1]), model.neuron(x[1:3]), model.neuron(x[3:])])
    assert torch.equal(parts, model.neuron(x)) and parts.any()
    assert not model._forward_hooks and not model._forward_pre_hooks


FORMS = {
    "plain": lambda model: model,
    "dense": lambda model: optimize_for_inference(model, paths="convolution"),
    "events": lambda model: optimize_for_inference(model, sparse=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("file", STREAMED)
def test_answers_so_far_of_every_family_and_form(file, form, named_golden, on_a_grid):
    """Frame by frame, the answer is that of the whole sequence up to there, to the bit."""
    golden = named_golden(file)
    model = FORMS[form](on_a_grid(golden.model()))
    generator = torch.Generator().manual_seed(0)
    size = golden.tensors["input"].shape
    frames = torch.randint(0, 16, (2, 5, *size[-3:]), generator=generator) / 8
    stream = Stream(model)
    with torch.no_grad():
        whole = [as_steps(model(frames[:, : t + 1])) for t in range(5)]
        for t, frame in enumerate(frames.unbind(1)):
            answer = stream.push(frame)
            room = 1e-5 if file in REAL_HEAD else 0.0
            torch.testing.assert_close(as_steps(answer), whole[t], rtol=0, atol=room)
        stream.reset()
        assert torch.equal(as_steps(stream.push(frames)), as_steps(answer))
        alone = as_steps(model(frames[:, 4:]))
    assert len({tuple(one.flatten().tolist()) for one in whole}) == 5
    assert file in WITHOUT_MEMORY or not torch.equal(as_steps(stream(frames[:, 4:])), alone)


def as_steps(logits):
    """The logits `[B, K]` of a model, the mean of those of every step; of two heads the first's."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.mean(0) if logits.ndim == 3 else logits


WHOLE = {
    "exact": {"exact": True},
    "exact, by events": {"exact": True, "sparse": True},
    "8 bits, exact": {"dtype": torch.int8, "exact": True},
}


@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("file", ["sdt_plif_static_32", "sdtv2_grads_T2_64"])
def test_answers_so_far_of_whole_numbers(file, options, named_golden):
    """Weights as they come, and still to the bit: no sum depends on how many frames come at once."""
    model = optimize_for_inference(named_golden(file).model(), **options)
    frames = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2
    stream = Stream(model)
    whole = [model(frames[:, : t + 1]) for t in range(5)]
    answers = [stream.push(frame) for frame in frames.unbind(1)]
    assert all(map(torch.equal, answers, whole)) and len({one.sum().item() for one in whole}) == 5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("neuron", [*NEURONS, "SpikingJelly"])
def test_streams_of_a_batch_go_their_own_ways(firing_model, on_a_grid, neuron, form):
    """One starts anew, one is left out, all are saved and restored: each answers as if it ran alone."""
    make = NEURONS.get(neuron) or partial(pytest.importorskip("spikingjelly.activation_based.neuron").LIFNode)
    made = make if neuron != "SpikingJelly" else lambda threshold: make(v_threshold=threshold, v_reset=-0.1)
    model = on_a_grid(firing_model(neuron=made, depth=1))
    form = FORMS[form](model)
    frames = torch.randint(0, 16, (3, 6, 3, 16, 16)) / 8
    stream = Stream(form)
    with torch.no_grad():
        for t in range(2):
            stream.push(frames[:, t])
        stream.reset([1])
        assert stream.seen.tolist() == [2, 0, 2]
        answer = stream.push(frames[:, 2:4])
        assert torch.equal(answer[[0, 2]], form(frames[[0, 2], :4]))
        assert torch.equal(answer[1], form(frames[1:2, 2:4])[0])
        assert not torch.equal(answer[1], form(frames[1:2, :4])[0])
        file = io.BytesIO()
        torch.save(stream.state_dict(), file)
        stream.keep(torch.tensor([False, True, True]))
        kept = stream.push(frames[1:, 4])
        assert torch.equal(kept[1], form(frames[2:, :5])[0]) and torch.equal(kept[0], form(frames[1:2, 2:5])[0])
        again = Stream(form)
        again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        assert torch.equal(again.push(frames[:, 4])[1:], kept) and again.seen.tolist() == [5, 3, 5]


def test_the_answer_of_the_last_frames(firing_model):
    model = firing_model()
    frames = torch.rand(2, 6, 3, 16, 16)
    whole, stream = Stream(model), Stream(model, window=3)
    logits = [whole(frames[:, t : t + 1]) for t in range(6)]
    answers = [stream.push(frame) for frame in frames.unbind(1)]
    for t, answer in enumerate(answers):
        assert torch.equal(answer, torch.stack(logits[max(0, t - 2) : t + 1]).mean(0))
    assert len(stream._logits) == 3 and len(logits[0].unique()) > 2


def test_the_state_of_a_shorter_window_is_refused(firing_model):
    model, frames = firing_model(depth=1), torch.rand(2, 6, 3, 16, 16)
    short, long = Stream(model, window=2), Stream(model, window=4)
    short.push(frames[:, :5])
    for stream in (long, Stream(model)):
        with pytest.raises(ValueError, match=r"logits of the last 2 frames, and the answer here is the mean of [45]"):
            stream.load_state_dict(short.state_dict())
    long.push(frames[:, :5])
    short.load_state_dict(long.state_dict())
    assert torch.equal(short.push(frames[:, 5]), Stream(model, window=2).push(frames)) and short.seen[0] == 6


@pytest.mark.parametrize("length", [15, 16, 17, 40, 64])
def test_long_sequences_are_summed_as_a_model_does(length, on_a_grid):
    """Whatever order the mean over so many steps is summed in."""
    head = nn.Sequential(LIF(), nn.Linear(5, 3)).eval()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head(x.transpose(0, 1).mean((-2, -1))).mean(0)

    frames = torch.rand(4, length, 5, 1, 1) * 3
    net = on_a_grid(Net().eval())
    stream = Stream(net)
    with torch.no_grad():
        assert torch.equal(stream.push(frames), net(frames)) and net(frames).std() > 0


def test_raw_events(firing_model, on_a_grid):
    from sdt_datasets.events import FramesOfEvents

    events = np.zeros(100, dtype=[("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "?")])
    rng = np.random.default_rng(0)
    events["t"] = np.arange(100)
    for axis in "xy":
        events[axis] = rng.integers(0, 16, 100)
    model = on_a_grid(firing_model(in_channels=2))
    to_frames = FramesOfEvents(sensor_size=(16, 16, 2), events=30)
    frames = torch.from_numpy(to_frames(events))[None]
    stream = Stream(model, to_frames=FramesOfEvents(sensor_size=(16, 16, 2), events=30))
    assert stream.push(events[:20]) is None
    answers = [stream.push(events[start : start + 20]) for start in range(20, 100, 20)]
    assert torch.equal(answers[0], model(frames[:, :1])) and torch.equal(answers[-1], model(frames))
    assert torch.equal(answers[1], answers[2]) != torch.equal(answers[1], answers[0]) and len(frames[0]) == 3
    assert stream.another().to_frames is None  # where the last ten events wait
    for samples in (None, [0]):
        stream.reset(samples)  # another recording, whose times start anew
        assert stream.push(events[:20]) is None and torch.equal(stream.push(events[20:30]), answers[0])
    stream.reset([])
    with pytest.raises(ValueError, match="in order of time"):
        stream.push(events[:20])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_frame_that_is_not_finite_leaves_the_stream_as_it_was(firing_model, value):
    model, frames = firing_model(), torch.rand(3, 2, 3, 16, 16)
    stream, whole = Stream(model), Stream(model)
    stream.push(frames[:, 0])
    broken = frames.clone()
    broken[1, 0, 2, 5, 5] = broken[1, 1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"frames of the streams \[1\] hold values that are not finite"):
        stream.push(broken)
    assert torch.equal(stream.push(frames[:, 1]), whole.push(frames)) and stream.seen.tolist() == [2, 2, 2]


def test_what_push_refuses(firing_model):
    model = firing_model()
    stream = Stream(model)
    with pytest.raises(RuntimeError, match="no frame has been pushed"):
        stream.answer()
    for bad, message in (
        (torch.rand(3, 16, 16), r"got \[3, 16, 16\]"),
        (np.zeros(3), "got ndarray; see to_frames="),
        (torch.rand(2, 0, 3, 16, 16), r"got \[2, 0, 3, 16, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.push(bad)
    stream.push(torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match="a batch of 2, got 3 frames; keep"):
        stream.push(torch.rand(3, 3, 16, 16))
    for samples in (2, [-1], torch.tensor([True]), [0.5]):
        with pytest.raises(IndexError, match="between 0 and 1"):
            stream.reset(samples)
    stream.reset([])
    assert stream.seen.tolist() == [1, 1]
    stream.reset(0)
    with pytest.raises(RuntimeError, match=r"pushed yet to \[0\]"):
        stream.answer()
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module to stream, got Tensor"):
        Stream(torch.zeros(2))
    with pytest.raises(ValueError, match="window must be a number of frames of at least 1"):
        Stream(model, window=0)
    with pytest.raises(TypeError, match=r"push needs logits \[2, K\] of a frame, SpikingMLP gave"):
        Stream(SpikingMLP(4).eval()).push(torch.rand(2, 1, 4, 3, 3))
    state = stream.state_dict()
    with pytest.raises(ValueError, match="of a SpikeDrivenTransformer, not a Dense; restore it to the model and form"):
        Stream(optimize_for_inference(model, compile=False)).load_state_dict(state)
    with pytest.raises(ValueError, match="it lacks logits"):
        stream.load_state_dict({key: value for key, value in state.items() if key != "logits"})
    with pytest.raises(ValueError, match="the model has no neuron nobody"):
        stream.load_state_dict(state | {"neurons": {"nobody": {}}})


LEAKY = partial(snntorch.Leaky, beta=0.5)


@pytest.mark.parametrize(
    ("saved", "other", "message"),
    [
        ("lif", {"name": "lif", "tau": 3.0}, r"patch.neurons.0 was saved with tau 2.0, and has 3.0 here"),
        ("lif", "plif", "was saved with class LIF, and has ParametricLIF here"),
        ("lif", {"name": "lif", "reset": "none"}, "was saved with reset_mechanism zero, and has none here"),
        ("lif", {"name": "lif", "strict": True}, "was saved with strict False, and has True here"),
        ("plif", {"name": "plif", "channels": True}, r"with w torch.float32 \[\], and has torch.float32 \[\d+\] here"),
        (LEAKY, partial(snntorch.Lapicque, beta=0.5), "with neuron.class Leaky, and has Lapicque here"),
        (LEAKY, partial(LEAKY, beta=0.25), "was saved with neuron.beta 0.5, and has 0.25 here"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_the_state_of_a_namesake_is_refused(firing_model, saved, other, message, form):
    if form != "plain":  # whose layers have names of their own
        message = r"leaves\.\d+ was saved with .*, and has .* here; restore it to the model and form it came from"
    theirs, ours = (FORMS[form](firing_model(neuron=neuron, depth=1)) for neuron in (saved, other))
    stream, frame = Stream(theirs), torch.rand(2, 3, 16, 16)
    stream.push(frame)
    with pytest.raises(ValueError, match=message):
        Stream(ours).load_state_dict(stream.state_dict())
    again = Stream(theirs)
    again.load_state_dict(stream.state_dict())
    assert torch.equal(again.push(frame), stream.push(frame)) and again.seen.tolist() == [2, 2]


def test_a_state_in_another_precision_is_refused():
    blocks = [nn.Sequential(SpikingMLP(4)).eval(), nn.Sequential(SpikingMLP(4)).double().eval()]
    streams = [Stream(block) for block in blocks]
    streams[0](torch.rand(2, 1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"it is in torch.float32, the model in torch.float64"):
        streams[1].load_state_dict(streams[0].state_dict())
    deeper = Stream(nn.Sequential(SpikingMLP(4), SpikingMLP(4)).eval())
    with pytest.raises(ValueError, match=r"it knows no neuron 1\."):
        deeper.load_state_dict(streams[0].state_dict())


@pytest.mark.parametrize("neuron", [LEAKY, partial(snntorch.Synaptic, alpha=0.5, beta=0.8)])
def test_chunks_of_another_shape_do_not_start_anew(neuron):
    stream = Stream(over_time(neuron()).eval())
    stream(torch.ones(2, 3, 4))
    for shape in ((1, 3, 5), (1, 1, 4)):
        with pytest.raises(ValueError, match=r"one shape but for their length: a neuron had \[3, 4\] and now gets"):
            stream(torch.ones(shape))
    assert stream(torch.ones(2, 3, 4)).any()


def test_there_are_no_gradients():
    block = SpikingMLP(4).eval()
    x = torch.rand(2, 1, 4, 2, 2, requires_grad=True)
    assert not Stream(block)(x).requires_grad and block(x).requires_grad


def test_the_model_has_the_call():
    assert isinstance(SpikeDrivenTransformer(depth=0, dim=8, num_heads=1).stream(), Stream)


class Elsewhere(torch.Tensor):
    """A tensor that is on another device until it comes to the CPU."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("neuron", ["lif", partial(snntorch.Synaptic, alpha=0.5, beta=0.8)])
def test_a_state_goes_to_the_device_of_the_model(firing_model, neuron):
    stream = firing_model(neuron=neuron, depth=1).stream()
    stream.push(torch.rand(2, 3, 16, 16))
    saved = stream.state_dict()
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU that no machine needs to have
        for part in ("neurons", "logits"):
            saved[part] = tree_map(lambda tensor: torch.empty_like(tensor, device="cuda"), saved[part])
    saved["seen"] = saved["seen"].as_subclass(Elsewhere)  # its values are looked at
    stream.load_state_dict(saved)
    state = stream.state_dict()
    held = [*state["logits"], *(tensors.values() for tensors in state["neurons"].values()), [state["seen"]]]
    assert {tensor.device.type for tensors in held for tensor in tensors} == {"cpu"} and len(held) > 3
    assert type(state["seen"]) is torch.Tensor
