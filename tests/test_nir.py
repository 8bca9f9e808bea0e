"""The graph of a network in NIR computes what the network does, and what NIR does not have is refused."""

import numpy as np
import pytest
import snntorch
import torch
from torch import nn

from sdt_blocks import LIF, ParametricLIF, over_time
from sdt_blocks.neuron import export_to_nir

pytest.importorskip("nir")
pytest.importorskip("nirtorch")


def simulate(graph, x, dt=1e-4):
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
    differ = (simulate(graph, x[:, 0].numpy()) != spikes).mean()
    assert 0.05 < spikes.mean() < 0.95 and differ < 0.01


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (LIF(reset="subtract"), ValueError, "is reset to zero, got one with reset='subtract'"),
        (nn.BatchNorm1d(2), TypeError, "NIR has no BatchNorm1d; norms fold"),
        (over_time(snntorch.Leaky(beta=0.9)), TypeError, "OverTime has no form here"),
    ],
)
def test_what_nir_does_not_have_is_refused(layer, error, words):
    with pytest.raises(error, match=words):
        export_to_nir(nn.Sequential(nn.Linear(8, 2), layer, LIF()), torch.rand(4, 2, 8))


def test_the_exporter_of_snntorch_does_not_export_another_neuron():
    """It would drop the factor 1 / tau of the input."""
    from snntorch.export_nir import export_to_nir as snntorchs

    with pytest.raises(AttributeError):
        snntorchs(nn.Sequential(nn.Linear(8, 2), LIF()), torch.rand(1, 8), ignore_dims=[0])


def test_the_packages_are_named_where_they_are_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nirtorch", None)
    with pytest.raises(ImportError, match="needs the packages nir and nirtorch"):
        export_to_nir(nn.Sequential(nn.Linear(8, 2), LIF()), torch.rand(4, 2, 8))
