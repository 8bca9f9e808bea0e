"""Networks judged as they are deployed: norms folded, chains of layers merged, all else as it stands."""

import copy
import warnings

import pytest
import snntorch
import torch
from torch import nn

from sdt_blocks import (
    LIF,
    MembraneShortcut,
    MetaSpikeFormer,
    SeparableConvolution,
    SpikingMLP,
    calibrate_norms,
    optimize_for_inference,
    over_time,
)
from sdt_blocks.analysis import E_AC, analyze_model, audit, energy, energy_from_rates, firing_rates
from sdt_blocks.blocks import ConvNorm, LinearSpikeAttention, LinearSpikeMixer
from sdt_blocks.inference.folded import folded
from sdt_blocks.steps import project


def calibrated(network, x):
    """In float64, where folding changes no spike, with norms that let every layer fire."""
    torch.manual_seed(1)
    network.double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, 0.2, 0.6)
        if isinstance(module, LinearSpikeMixer):
            module.scale = 1.0
    calibrate_norms(network.eval(), x)
    return network


@pytest.fixture(scope="module")
def v2():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32).double()
    network = MetaSpikeFormer(dims=(16, 32, 32, 48), depths=(1, 1, 1, 1, 1), num_classes=3, time_steps=2)
    return calibrated(network, images), images


def same_rates(network, x):
    deployed, trained = (firing_rates(network, x, as_trained=as_trained) for as_trained in (False, True))
    assert not trained.silence
    assert {name: layer.rate for name, layer in deployed.layers.items()} == {
        name: layer.rate for name, layer in trained.layers.items()
    }


def test_where_folding_changes_nothing_the_figures_stay(small):
    model, x = small().double(), torch.rand(4, 3, 16, 16)
    same_rates(model, x)
    deployed, trained = energy(model, x), energy(model, x, as_trained=True)
    assert deployed.layers == trained.layers and deployed.attention == trained.attention
    assert deployed.total_mj == trained.total_mj > 0


def test_separable_convolution_and_rep_conv_add_once_they_are_merged(v2):
    model, x = v2
    trained, deployed = audit(model, x, as_trained=True), audit(model, x)
    chains = {name for name, module in model.named_modules() if name.endswith(("depthwise", "pointwise2", "pointwise"))}
    chains -= {name for name in chains if name.endswith("separable.conv.depthwise")}
    within = {product.module for product in trained.violations if "norm" not in product.module}
    assert within == {name for name in chains if "pointwise" in name or "attention" in name} and within
    assert all("deployed, the layers of" in product.reason for product in trained.violations)
    assert trained.finding.startswith("The network is NOT spike-driven until the layers of its units are merged")
    assert deployed.spike_driven and "as it is deployed" in deployed.finding
    merged = {product.module: product for product in deployed.products if product.merges}
    assert set(merged) == {f"{name}.conv" for name, m in model.named_modules() if hasattr(m, "kernel") and is_chain(m)}
    assert {product.verdict for product in merged.values()} == {"AC"}
    first = merged["stages.0.0.separable.branch.separable.conv"]
    assert first.reason == "spikes; trained as depthwise, pointwise, which are this one convolution"


def is_chain(unit):
    return not isinstance(unit.conv, nn.Conv2d)


def test_energy_of_merged_layers(v2):
    model, x = v2
    same_rates(model, x)
    inputs = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, output, name=name: inputs.update({name: output})
        )
        for name in ("stages.3.0.attention.branch.neuron", "stages.0.0.separable.branch.neuron2")
    ]
    model(x)
    for handle in handles:
        handle.remove()
    report = energy(model, x)
    q, separable = report["stages.3.0.attention.branch.q.conv"], report["stages.0.0.separable.branch.separable.conv"]
    assert (q.macs, separable.macs) == (9 * 32 * 32 * 2 * 2, 49 * 16 * 8 * 16 * 16)
    for row, spikes in zip((separable, q), inputs.values(), strict=True):
        rate = spikes.mean((1, 2, 3, 4)).tolist()
        assert row.kind == "AC" and row.rate == pytest.approx(rate) and sum(rate) > 0
        assert row.energy_mj == pytest.approx(E_AC * 1e-9 * row.macs * sum(rate))
    trained = energy(model, x, as_trained=True)
    assert trained["stages.3.0.attention.branch.q.conv.pointwise2"].kind == "MAC"
    assert [row.name for row in report.layers if row.kind == "MAC"] == ["downsamplings.0.conv.conv"]
    whole = energy_from_rates(copy.deepcopy(model).to("meta"), 1.0, (3, 32, 32))
    assert whole["stages.3.0.attention.branch.q.conv"].macs == q.macs


class Mixed(nn.Module):
    """Chains beside plain layers and a neuron of snnTorch; `[T, B, C, H, W]` in, logits and features out."""

    def __init__(self, part):
        super().__init__()
        self.first, self.neuron = ConvNorm(2, 8, 3), over_time(snntorch.Leaky(beta=0.5))
        self.blocks = nn.Sequential(MembraneShortcut(LinearSpikeAttention(8, num_heads=2)), MembraneShortcut(part))
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.head = LIF(), nn.Linear(8, 2)

    def forward(self, x):
        frames = self.neuron(project(self.first, x)).flatten(0, 1).to(x.dtype)
        membrane = self.blocks(self.norm(self.conv(frames)).unflatten(0, x.shape[:2]))
        features = self.last(membrane.mean((-2, -1)))
        return self.head(features).mean(0), {"features": features}


class Branching(SeparableConvolution):
    def forward(self, membrane):
        return super().forward(membrane if membrane.mean() > -9 else -membrane)


def test_a_mixed_network_time_first_with_tuples(tmp_path):
    torch.manual_seed(0)
    x = 2 * torch.rand(3, 2, 2, 6, 6).double()
    network = calibrated(Mixed(SpikingMLP(8)), x)
    same_rates(network, x)
    assert not audit(network, x, as_trained=True).spike_driven
    found = audit(network, x)
    assert found.spike_driven and [product.module for product in found.of("fold")] == ["norm"]
    for as_trained, finding in (
        (False, "is spike-driven as it is deployed, 4 chains"),
        (True, "NOT spike-driven until"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            analyze_model(network, x, tmp_path, as_trained=as_trained)
        text = (tmp_path / "audit.txt").read_text()
        assert finding in text and f"judged as it is {'trained' if as_trained else 'deployed'}" in text


def test_what_cannot_be_traced_is_judged_as_it_stands(tmp_path):
    torch.manual_seed(0)
    x = 2 * torch.rand(3, 2, 2, 6, 6).double()
    network = calibrated(Mixed(Branching(8)), x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        analyze_model(network, x, tmp_path)
    assert [str(w.message) for w in told if "stands" in str(w.message)] == [
        "judged as it stands, since it cannot be folded: blocks.1.branch (symbolically traced variables cannot be used "
        "as inputs to control flow)"
    ]
    with pytest.warns(UserWarning, match=r"judged as it stands.*: blocks\.1\.branch \("):
        violations = audit(network, x).violations
    assert {product.module for product in violations} == {"blocks.1.branch.separable.conv.pointwise"}


def test_the_network_is_afterwards_what_it_was(v2):
    model, x = v2
    before = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    with pytest.raises(ZeroDivisionError), folded(model), folded(model):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        model(x[5 // 0 :])
    assert dict(model.named_modules()) == before and all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()


def test_synchronized_norms_fold(v2):
    model, x = v2
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert audit(converted, x).spike_driven
    dense = optimize_for_inference(converted, torch.float64, compile=False, paths="convolution")
    torch.testing.assert_close(dense(x), model(x))


def test_a_state_that_training_left_is_copied():
    neuron = snntorch.Leaky(beta=0.5, init_hidden=True)
    network = nn.Sequential(ConvNorm(1, 2), nn.Flatten(), nn.Linear(8, 4), neuron)
    nn.init.constant_(network[2].bias, 2.0)
    network(torch.rand(3, 1, 2, 2)).sum()
    assert not neuron.mem.is_leaf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = energy(network, 4 * torch.rand(3, 1, 2, 2))
    assert report["0.conv"].energy_mj > 0
