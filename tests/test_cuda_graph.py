"""A graph a shape: recorded once, replayed with new input, dropped when weights move; capturing is a stand-in here."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sdt_blocks import LIF, optimize_for_inference
from sdt_blocks.inference import Graphed, graphs


@pytest.fixture
def recorded(monkeypatch):
    """The pools that were given for what was recorded; a replay computes into the recorded result, as a graph does."""
    pools = []

    def record(function, inputs, pool):
        pools.append(pool)
        result = function()

        def replay():
            for into, value in zip(result, function(), strict=True):
                into.copy_(value)

        result = result if isinstance(result, tuple) else (result,)
        return graphs.Recorded(replay, inputs, result, "a pool")

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(Graphed, "forward", lambda self, *inputs: self._replayed(inputs))
    return pools


class Net(nn.Module):
    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.conv, self.neuron = nn.Conv2d(2, 3, 1), LIF()

    def forward(self, x):
        return (self.neuron(self.conv(x).unsqueeze(0) * 3 + 1.5)[0],)


def test_a_shape_is_recorded_once_and_results_stay(recorded):
    net = Net()
    graphed, images = Graphed(net), [torch.rand(2, 2, 4, 4) for _ in range(3)]
    with torch.no_grad():
        found = [graphed(x)[0] for x in images]
        expected = [net(x)[0] for x in images]
    assert len(recorded) == 1 and all(map(torch.equal, found, expected)) and expected[0].any()
    assert not torch.equal(found[0], found[1])
    graphed(images[0][:1])
    assert recorded == [None, "a pool"]


def test_few_shapes_are_kept(recorded):
    graphed = Graphed(Net(), most=2)
    for batch in (1, 2, 3, 3, 1):
        graphed(torch.rand(batch, 2, 4, 4))
    assert len(recorded) == 4 and len(graphed.recorded) == 2


def test_weights_that_move_are_recorded_anew(recorded):
    graphed, x = Graphed(Net()), torch.rand(1, 2, 4, 4)
    graphed(x)
    graphed.double()
    assert not graphed.recorded and graphed(x.double())[0].dtype == torch.float64 and len(recorded) == 2


def test_what_is_refused_on_a_cpu(make_small):
    model = make_small("sdt_2_256").model
    with pytest.raises(ValueError, match="needs the model on a CUDA device, it is on cpu"):
        optimize_for_inference(model, cuda_graph=True)
    with pytest.raises(ValueError, match="leave sparse and exact out"):
        optimize_for_inference(model, cuda_graph=True, sparse=True)
    with pytest.raises(ValueError, match=r"got cpu; move the input there"):
        Graphed(Net())(torch.rand(1, 2, 4, 4))
    with pytest.raises(RuntimeError, match="only evaluates"):
        Graphed(optimize_for_inference(model, compile=False)).train()


def test_a_stream_calls_the_network_itself():
    """States are handed over between calls, which a recorded pass would not see."""
    net, x, kept = Net().eval(), torch.rand(1, 2, 4, 4), []
    graphed = Graphed(net)
    net.neuron.carrier = SimpleNamespace(
        membrane=lambda neuron, x: None, keep_state=lambda neuron, state: kept.append(state)
    )
    assert torch.equal(graphed(x)[0], net(x)[0]) and len(kept) == 2
    net.neuron.carrier = None
    with pytest.raises(ValueError, match="CUDA"):
        graphed(x)


class Stand:
    """For a stream, or what is used as a context; notes on which device it is."""

    device = 0

    def __init__(self, *given, **named):
        self.given = given

    def __enter__(self):
        self.before, Stand.device = Stand.device, self.given[0].index if self.given else Stand.device
        return self

    def __exit__(self, *exception):
        Stand.device = self.before

    def wait_stream(self, stream):
        pass


def test_a_graph_is_recorded_on_the_device_of_its_input(monkeypatch):
    """Whichever is the current one: streams and capturing are those of the current device."""
    seen = []
    monkeypatch.setattr(torch.cuda, "device", Stand)
    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: (seen.append(Stand.device), Stand())[1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: (seen.append(pool), contextlib.nullcontext())[1])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: 1, pool=lambda: "pool"))
    calls = []
    x = SimpleNamespace(device=torch.device("cuda", 1))
    made = graphs.record(lambda: calls.append(Stand.device), [x], "before")
    assert calls == [1] * 4 and seen == [1, 1, "before"] and made.pool == "pool" and Stand.device == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph is captured on a GPU alone")
def test_on_a_gpu(make_small):
    small = make_small("sdt_2_256")
    model, images = small.model.cuda(), small.images.cuda()
    plain = optimize_for_inference(model, paths="convolution")
    graphed = optimize_for_inference(model, paths="convolution", cuda_graph=True)
    for batch in (4, 2, 4):
        torch.testing.assert_close(graphed(images[:batch]), plain(images[:batch]))
    assert len(graphed.recorded) == 2


def test_events_and_whole_numbers_say_why_not_on_a_gpu(make_small):
    """As on any device but the CPU; the folded dense form is made there."""
    model = make_small("sdt_2_256").model.to("meta")
    for options in ({"sparse": True}, {"exact": True}, {"dtype": torch.int8}):
        with pytest.raises(
            ValueError, match=r"float32 on meta.*On a GPU dense products are faster.*leave sparse and exact"
        ):
            optimize_for_inference(model, **options)
    with pytest.warns(UserWarning, match="optimized densely: .*On a GPU dense products"):
        fast = optimize_for_inference(model, sparse="auto", calibrate=[torch.empty(1, 3, 32, 32, device="meta")])
    assert type(fast).__name__ == "Dense"
