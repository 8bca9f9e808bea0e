"""The graph of a network in NIR computes what the network does, and what NIR does not have is refused."""

import numpy as np
import pytest
import snntorch
import torch
from torch import nn

from sdt_blocks import (
    LIF,
    MembraneShortcut,
    ParametricLIF,
    SpikeDrivenSelfAttention,
    SpikeDrivenTransformer,
    calibrate_norms,
    over_time,
)
from sdt_blocks.blocks import ConvNorm
from sdt_blocks.inference import export_to_nir, simulate_nir
from sdt_blocks.neuron import find_neurons
from sdt_blocks.neuron.stepping import spikes_of
from sdt_blocks.steps import fire, pool, present, project, project_and_fire

nir = pytest.importorskip("nir")


def by_equations(graph, x, dt=1e-4):
    """The chain of a graph by NIR's differential equations, `tau dv/dt = v_leak - v + r i`, in Euler steps of dt."""
    following, name, order = dict(graph.edges), "input", []
    while (name := following[name]) != "output":
        order.append(graph.nodes[name])
    state, out = {}, []
    for x_t in x:
        for place, node in enumerate(order):
            kind = type(node).__name__
            if kind == "Affine":
                x_t = node.weight.astype(np.float64) @ x_t + node.bias
            elif kind == "Flatten":
                x_t = x_t.reshape(-1)
            else:
                v = state.get(place, np.zeros(node.tau.shape))
                v = v + dt / node.tau * (node.v_leak - v + node.r * x_t)
                fired = v > node.v_threshold
                state[place], x_t = np.where(fired, node.v_reset, v), fired.astype(np.float64)
        out.append(x_t)
    return np.stack(out)


def read_back(model, x, tmp_path):
    """The graph of a model as it comes back from a file."""
    path = tmp_path / "model.nir"
    nir.write(str(path), export_to_nir(model, x))
    return nir.read(str(path))


@torch.no_grad()
def assert_same(model, x, frames, graph):
    """Every neuron of the model fires, and each node of its name in the graph as it does; gives the graph's output."""
    seen = {}
    hooks = [
        neuron.register_forward_hook(lambda _, args, output, name=name: seen.update({name: spikes_of(output)}))
        for name, neuron in find_neurons(model).items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    found = simulate_nir(graph, frames)
    assert seen
    for name, spikes in seen.items():
        assert 0.01 < spikes.mean() < 0.99 and (found[name] != spikes).float().mean() < 2e-3, name
    return found["output"]


def fitted(model, inputs):
    """The model with norms of these inputs, in eval mode, so that every layer fires."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0.7, 0.3)
            nn.init.uniform_(module.weight, 0.6, 1.4)
    calibrate_norms(model, inputs)
    return model.eval()


def test_the_graph_fires_as_the_network_does():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(2),
        nn.Linear(8, 30),
        LIF(tau=3.0, threshold=0.6),
        nn.Linear(30, 20),
        ParametricLIF(init_tau=2.5, threshold=0.2, channels=20),
    ).double()
    nn.init.uniform_(net[4].w, -1, 1)
    x = 3 * torch.randn(40, 1, 2, 4, dtype=torch.float64)
    graph = export_to_nir(net, x)
    assert [type(graph.nodes[str(i)]).__name__ for i in range(5)] == ["Flatten", "Affine", "LIF", "Affine", "LIF"]
    # The graph's numbers are float32, the network's are not.
    with torch.no_grad():
        spikes = net(x)[:, 0].numpy()
    differ = (by_equations(graph, x[:, 0].numpy()) != spikes).mean()
    assert 0.05 < spikes.mean() < 0.95 and differ < 0.01
    assert (simulate_nir(graph, x)["output"][:, 0].numpy() != spikes).mean() < 0.01


class Convolutional(nn.Module):
    """Convolutions, a shortcut, pooling and neurons of the kit and of snnTorch."""

    def __init__(self):
        super().__init__()
        self.conv1, self.neuron1 = ConvNorm(2, 8, 3, stride=2, bias=True), ParametricLIF(channels=8, strict=True)
        self.conv2, self.neuron2 = ConvNorm(8, 8, 3, groups=4), over_time(snntorch.Leaky(1.0, reset_mechanism="zero"))
        self.neuron3 = over_time(snntorch.Leaky(0.6, threshold=0.8, reset_mechanism="zero"))
        self.conv3, self.pool = nn.Conv2d(8, 6, 3, padding=(2, 1), dilation=(2, 1)), nn.AvgPool2d(2)
        self.neuron4, self.head = LIF(tau=1.0, threshold=0.2), nn.Linear(6, 5, bias=False)

    def forward(self, x):
        membrane = project(self.conv1, present(x, 4, 2))
        change = project_and_fire(self.conv2, self.neuron2, fire(self.neuron1, membrane))
        spikes = pool(self.pool, fire(self.neuron3, membrane + change))
        return self.head(fire(self.neuron4, project(self.conv3, spikes).mean((-2, -1)))).mean(0)


def test_a_convolutional_network_comes_back_from_a_file(tmp_path):
    torch.manual_seed(0)
    model, images = Convolutional(), torch.rand(16, 2, 12, 12)
    nn.init.constant_(model.conv3.bias, 0.2)
    fitted(model, images)
    graph = read_back(model, images, tmp_path)
    kinds = {name: type(node).__name__ for name, node in graph.nodes.items()}
    assert kinds["conv2"] == "Conv2d" and kinds["neuron2"] == "IF" and kinds["neuron3"] == "LIF"
    assert (graph.nodes["neuron1"].v_reset == 0).all() and {("conv1", "neuron3"), ("neuron2", "neuron3")} <= set(
        graph.edges
    )
    output = assert_same(model, images, present(images, 4, 2), graph)
    torch.testing.assert_close(output.mean(0), model(images), atol=0.02, rtol=0)


class Plain(nn.Module):
    """torch's own layers on the frames of a sequence."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.neuron, self.linear, self.second = LIF(), nn.Linear(4 * 36, 10), LIF(threshold=0.1)

    def forward(self, x):
        membrane = self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.second(self.linear(self.neuron(membrane).flatten(2)))


def test_layers_of_torch(tmp_path):
    torch.manual_seed(0)
    frames = torch.rand(5, 6, 1, 6, 6)
    model = fitted(Plain(), frames)
    output = assert_same(model, frames, frames, read_back(model, frames, tmp_path))
    assert output.shape == (5, 6, 10)


def test_a_model_of_the_kit_without_attention(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(8, 3, 16, 16)
    model = SpikeDrivenTransformer(depth=0, dim=32, num_classes=4, pooling="0000")
    fitted(model, images)
    graph = read_back(model, images, tmp_path)
    output = assert_same(model, images, present(images, 4, 3), graph)
    torch.testing.assert_close(output.mean(0), model(images), atol=0.02, rtol=0)


def test_a_membrane_at_its_threshold_fires_as_it_does_in_the_network():
    frames = torch.ones(4, 1, 1)
    for strict, rate in ((False, 1.0), (True, 0.0)):
        net = nn.Sequential(nn.Linear(1, 1), LIF(tau=1.0, strict=strict))
        nn.init.constant_(net[0].weight, 1.0)
        nn.init.zeros_(net[0].bias)
        output = simulate_nir(export_to_nir(net, frames), frames)["output"]
        assert torch.equal(output, net(frames)) and output.mean() == rate


class Loop(nn.Module):
    def forward(self, x):
        return torch.stack([2 * x_t for x_t in x])


class Added(nn.Module):
    def forward(self, x):
        return x + 1


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (LIF(reset="subtract"), ValueError, "1: a neuron of NIR is reset to zero, got one with reset='subtract'"),
        (over_time(snntorch.Leaky(beta=0.9)), ValueError, "reset='subtract'"),
        (over_time(snntorch.Synaptic(alpha=0.9, beta=0.8)), TypeError, "1: Synaptic has no form here"),
        (nn.LayerNorm(2), TypeError, r"NIR has no LayerNorm as the network calls it \(1\)"),
        (Loop(), TypeError, "1 has no form in NIR, since its call cannot be traced"),
        (Added(), TypeError, "NIR can only add the outputs of several nodes"),
    ],
)
def test_what_nir_does_not_have_is_refused(layer, error, words):
    with pytest.raises(error, match=words):
        export_to_nir(nn.Sequential(nn.Linear(8, 2), layer, LIF()), torch.rand(4, 2, 8))


class On(nn.Module):
    """A layer on frames, as a step."""

    def __init__(self, step, layer):
        super().__init__()
        self.step, self.layer = step, layer

    def forward(self, x):
        return self.step(self.layer, x)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (On(pool, nn.MaxPool2d(2)), r"NIR has no MaxPool2d as the network calls it \(layer\); average pooling it has"),
        (On(pool, nn.AvgPool2d(2, padding=1)), "layer: NIR's average pooling has no padding"),
        (On(pool, nn.AvgPool2d(2, divisor_override=3)), "no padding, ceil_mode or divisor"),
        (On(pool, nn.AvgPool2d(3, ceil_mode=True)), "no padding, ceil_mode or divisor"),
        (On(project, nn.BatchNorm2d(4)), "NIR has no BatchNorm2d.*norms fold into the convolution before them"),
        (On(project, nn.Conv2d(4, 4, 3, padding="same")), "NIR has no Conv2d as the network calls it"),
        (On(project, nn.Conv2d(4, 4, (3, 1))), r"layer: the package nir takes a kernel of \(3, 1\) for a square one"),
        (MembraneShortcut(SpikeDrivenSelfAttention(4, num_heads=2)), "NIR has no attention.*first is .*branch.mixer"),
    ],
)
def test_what_nir_does_not_have_of_frames_is_refused_by_name(layer, words):
    with pytest.raises(TypeError, match=words):
        export_to_nir(layer, torch.rand(2, 1, 4, 8, 8))


def test_a_graph_that_is_none_of_ours_is_refused():
    lif = {key: np.ones(2) for key in ("tau", "r", "v_leak", "v_threshold")}
    nodes = {"input": nir.Input(np.array([2])), "lif": nir.LIF(**lif), "output": nir.Output(np.array([2]))}
    edges = [("input", "lif"), ("lif", "output")]
    x = torch.ones(3, 1, 2)
    assert simulate_nir(nir.NIRGraph(nodes, edges), x)["output"].shape == x.shape
    with pytest.raises(ValueError, match=r"the graph has a cycle.*lif"):
        simulate_nir(nir.NIRGraph(nodes, [*edges, ("lif", "lif")]), x)
    delayed = {**nodes, "lif": nir.Delay(np.ones(2))}
    with pytest.raises(TypeError, match="lif: a Delay is none of the nodes"):
        simulate_nir(nir.NIRGraph(delayed, edges), x)


def test_the_exporter_of_snntorch_does_not_export_another_neuron():
    """It would drop the factor 1 / tau of the input."""
    pytest.importorskip("nirtorch")
    from snntorch.export_nir import export_to_nir as snntorchs

    with pytest.raises(AttributeError):
        snntorchs(nn.Sequential(nn.Linear(8, 2), LIF()), torch.rand(1, 8), ignore_dims=[0])


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nir", None)
    with pytest.raises(ImportError, match=r"NIR needs the package nir \(pip install 'sdt_blocks\[export\]'\)"):
        export_to_nir(nn.Sequential(nn.Linear(8, 2), LIF()), torch.rand(4, 2, 8))
