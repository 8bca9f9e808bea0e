"""NeuroBench's metrics on our models, and how they relate to our own counts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sdt_blocks.analysis import energy, firing_rates
from sdt_blocks.analysis.neurobench_adapter import neurobench_model

pytest.importorskip("neurobench")


def run(model, x, *, static=(), workload=()):
    from neurobench.benchmarks import Benchmark

    loader = DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size=2)
    return Benchmark(neurobench_model(model), loader, [], [], [list(static), list(workload)]).run(quiet=True)


def test_static_metrics(small):
    from neurobench.metrics.static import ConnectionSparsity, Footprint, ParameterCount

    model = small()
    with torch.no_grad():
        model.head.weight[:, :16] = 0
    found = run(model, torch.rand(2, 3, 16, 16), static=[Footprint, ConnectionSparsity, ParameterCount])
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert found["ParameterCount"] == sum(p.numel() for p in model.parameters())
    assert found["ConnectionSparsity"] == round(80 / sum(w.numel() for w in weights), 4)
    buffers = [*model.parameters(), *model.buffers()]
    assert found["Footprint"] == sum(b.numel() * b.element_size() for b in buffers)


def test_activation_sparsity_is_one_minus_the_firing_rate(small):
    from neurobench.metrics.workload import ActivationSparsity

    model, x = small(), torch.rand(4, 3, 16, 16)
    found = run(model, x, workload=[ActivationSparsity])
    assert found["ActivationSparsity"] == pytest.approx(1 - firing_rates(model, x).mean)


def test_synaptic_operations(small, inputs_of_layers):
    """Equal for 1x1 and linear layers; at 3x3 NeuroBench leaves out the padding, and still input it counts once."""
    from neurobench.metrics.workload import SynapticOperations

    model, x = small(), torch.rand(4, 3, 16, 16)
    inputs = inputs_of_layers(model)
    report = energy(model, x)
    whole = dict(inputs)
    found = run(model, x, workload=[SynapticOperations])["SynapticOperations"]

    expected, ours = 0.0, 0.0
    for name, value in whole.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            # How many of the nine positions around an input lie within the image.
            reach = F.conv2d(torch.ones(1, 1, *value.shape[-2:]), torch.ones(1, 1, 3, 3), padding=1)
            count = ((value != 0) * reach).sum().item() * layer.out_channels / len(x)
        else:
            count = report[name].synaptic_operations
        if name == "patch.stages.0.conv":
            assert found["Effective_MACs"] == pytest.approx(count, rel=1e-6)
            assert report[name].synaptic_operations == pytest.approx(3 * 9 * 3 * 4 * 256)
        else:
            expected += count
            ours += report[name].synaptic_operations
    assert found["Effective_ACs"] == pytest.approx(expected, rel=1e-6)
    assert 0.8 * ours < expected < ours


def test_membrane_updates_see_every_step(small):
    from neurobench.metrics.workload import MembraneUpdates

    model = small()
    found = run(model, torch.rand(2, 3, 16, 16), workload=[MembraneUpdates])["MembraneUpdates"]
    neurons = sum(layer.neurons for layer in firing_rates(model, torch.rand(2, 3, 16, 16)).layers.values())
    assert 2 * neurons < found <= 3 * neurons
