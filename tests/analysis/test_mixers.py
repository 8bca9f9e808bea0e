"""Any mixer has its row of energy, its rates and its map, whatever it is called and wherever it stands."""

import pytest
import snntorch
import torch
from torch import nn

from sdt_blocks import LIF, MembraneShortcut, SpikeDrivenSelfAttention, over_time
from sdt_blocks.analysis import analyze_model, attention_maps, audit, energy, firing_rates, record
from sdt_blocks.blocks import LinearSpikeAttention, LinearSpikeMixer, MaskMixer
from sdt_blocks.steps import fire, pool, project_and_mix


def seen_spikes(attention):
    """Where the spikes of q, k and v of an attention will be kept."""
    found = {}
    for part in "qkv":
        neuron = getattr(attention, f"{part}_neuron")
        neuron.register_forward_hook(lambda m, args, output, part=part: found.update({part: output.double()}))
    return found


def lively_attention(attention):
    for module in attention.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.8)
    return attention


@pytest.mark.parametrize(("heads", "wider"), [(1, 1), (2, 4), (8, 2)])
def test_additions_of_the_linear_mixer_counted_one_by_one(heads, wider):
    torch.manual_seed(heads)
    q, k, v = ((torch.rand(2, 2, channels, 2, 3) < 0.4).float() for channels in (8, 8, 8 * wider))
    width, expected = 8 // heads, torch.zeros(2, 2)
    for t, b, head in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(heads)).tolist():
        of_q, of_k, of_v = (x[t, b].flatten(1).chunk(heads)[head] for x in (q, k, v))
        expected[t, b] += torch.einsum("in,jn->", of_k, of_v)  # every pair of spikes of one token adds 1
        expected[t, b] += wider * width * of_q.sum()  # every spike of q adds a row
    found = LinearSpikeMixer(8, num_heads=heads).additions(q, k, v)
    assert found.shape[:2] == (2, 2) and torch.equal(found.flatten(2).sum(2), expected)
    assert (found >= 0).all() and expected.min() > 0


@pytest.mark.parametrize(("steps", "batch"), [(3, 2), (2, 2), (1, 4)])
def test_v2_attention_in_energy_rates_audit_and_maps(steps, batch):
    torch.manual_seed(0)
    net = nn.Sequential(lively_attention(LinearSpikeAttention(16, num_heads=4)), LIF()).eval()
    x = 3 * torch.randn(steps, batch, 16, 4, 4)
    seen, counts = seen_spikes(net[0]), []
    net[0].mixer.register_forward_hook(lambda m, args, output: counts.append(output))
    report = energy(net, x)
    added = net[0].mixer.additions(seen["q"], seen["k"], seen["v"]).sum((1, 2, 3, 4, 5)) / batch
    row = report["0"]
    assert (row.type, row.kind, row.bound_mj) == ("attention", "AC", None) and report.attention.bound_mj is None
    assert row.macs == 2 * 16 * 16 * 4 and row.synaptic_operations == pytest.approx(added.sum().item())
    assert [rate * row.macs for rate in row.rate] == pytest.approx(added.tolist()) and added.min() > 0
    assert not [layer.name for layer in report.layers if "matmul" in layer.name]
    assert {product.verdict for product in audit(net, x).products if product.module == "0.mixer"} == {"AC", "scale"}
    assert torch.equal(attention_maps(net, x, per_step=True), counts[-1].mean(2))
    assert "0.mixer" not in firing_rates(net, x).layers


class Quadratic(MaskMixer):
    """A subclass that computes something else, of whose additions the class above knows nothing."""

    def forward(self, q, k, v):
        tokens = [x.flatten(3) for x in (q, k, v)]
        return (tokens[2] @ (tokens[1].mT @ tokens[0]) > 1).to(q).reshape(q.shape)


def test_a_subclass_with_a_forward_of_its_own_is_counted_product_by_product():
    torch.manual_seed(0)
    attention = lively_attention(SpikeDrivenSelfAttention(16, num_heads=4))
    attention.mixer = Quadratic(16, num_heads=4)
    net, x = nn.Sequential(attention, LIF()).eval(), 3 * torch.randn(3, 2, 16, 4, 4)
    found = {layer.name: layer.macs for layer in energy(net, x).layers if not layer.name.endswith("conv")}
    assert list(found.values()) == [16 * 16 * 16, 16 * 16 * 16] and all("0.mixer.matmul" in name for name in found)


class Coincide(nn.Module):
    """A mixer of one's own: spikes where all three meet."""

    emits = "spikes"

    def forward(self, q, k, v):
        return q * k * v

    def additions(self, q, k, v):
        return torch.stack([q * k, q * k * v], 2)


def test_a_mixer_of_ones_own(small, tmp_path):
    model, x = small(depth=2), torch.rand(3, 3, 16, 16)
    attention = model.blocks[1].attention.branch
    attention.mixer = Coincide()
    seen = seen_spikes(attention)
    report, rates = energy(model, x), firing_rates(model, x)
    q, k, v = (seen[part] for part in "qkv")
    row = report["blocks.1.attention.branch"]
    assert row.macs == 2 * q[0, 0].numel()
    assert row.synaptic_operations == pytest.approx(((q * k) + (q * k * v)).sum().item() / 3) and row.energy_mj > 0
    direct = (q * k * v).mean((1, 2, 3, 4))
    assert rates["blocks.1.attention.branch.mixer"].rate == pytest.approx(direct.tolist()) and direct.sum() > 0
    assert rates["blocks.0.attention.branch.mixer.masked"].mean > 0
    torch.testing.assert_close(attention_maps(model, x), (q * k * v).mean((0, 2)).float())
    assert len(attention_maps(model, x, block=None)) == 2 and audit(model, x).spike_driven
    analyze_model(model, x, tmp_path)
    assert (tmp_path / "attention_blocks.png").exists()


class Softmax(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.neuron, self.qkv = LIF(), nn.Linear(dim, 3 * dim)

    def forward(self, membrane):
        q, k, v = self.qkv(self.neuron(membrane).flatten(3).mT).chunk(3, dim=-1)
        return ((q @ k.mT).softmax(-1) @ v).mT.reshape(membrane.shape)


def test_a_foreign_attention_beside_the_kits(small, tmp_path):
    model, x = small(depth=2), torch.rand(3, 3, 16, 16)
    model.blocks[0].attention.branch = Softmax(32)
    with pytest.warns(UserWarning, match=r"not counted.*blocks\.0\.attention\.branch: _softmax"):
        rates, report = analyze_model(model, x, tmp_path)
    assert report["blocks.0.attention.branch.matmul"].kind == "MAC"
    assert report["blocks.1.attention.branch"].type == "attention" and rates.mean > 0
    assert len(attention_maps(model, x, block=None)) == 1 and not audit(model, x).spike_driven


def test_an_attention_that_does_not_use_its_mixer():
    class Own(SpikeDrivenSelfAttention):
        def attend(self, q, k, v):
            return q * (k * v).sum((-2, -1), keepdim=True)

    torch.manual_seed(0)
    net, x = lively_attention(Own(16)).eval(), 3 * torch.randn(2, 3, 16, 4, 4)
    report = energy(net, x)
    assert report.attention is None and report["matmul"].synaptic_operations > 0
    with pytest.raises(ValueError, match="Own has no mixer that took part"):
        attention_maps(net, x)


class Twins(nn.Module):
    """Two mixers in one module, the second on half the grid."""

    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.neurons = nn.ModuleList(LIF(threshold=0.2) for _ in range(3))
        self.first, self.halve = MaskMixer(8), nn.MaxPool2d(2)
        self.second, self.last = MaskMixer(8), LIF(threshold=0.1)

    def forward(self, x):
        spikes = fire(self.last, x)
        masked = project_and_mix(self.units, self.neurons, self.first, spikes)
        small = pool(self.halve, spikes)
        return masked.mean() + self.second(small, small, small).mean()


def test_two_mixers_in_one_module_on_two_grids(tmp_path):
    torch.manual_seed(0)
    net, x = Twins().eval(), 2 * torch.rand(2, 3, 8, 4, 4)
    _, report = analyze_model(net, x, tmp_path)
    assert (report["first"].macs, report["second"].macs) == (8 * 16, 8 * 4) and report["second"].energy_mj > 0
    assert (tmp_path / "attention_blocks.png").exists()
    with pytest.raises(ValueError, match="grids differ"):
        attention_maps(net, x, block=None)


@pytest.mark.parametrize("factory", [snntorch.Leaky, lambda **options: snntorch.Synaptic(alpha=0.5, **options)])
def test_a_neuron_over_time_is_one_layer(factory):
    torch.manual_seed(0)
    net = nn.Sequential(MembraneShortcut(nn.Identity()), over_time(factory(beta=0.9, init_hidden=True)))
    x = torch.rand(5, 3, 4)
    rates = firing_rates(net, x)
    assert list(rates.layers) == ["1"]
    assert rates["1"].rate == pytest.approx(net(x).mean((1, 2)).tolist()) and rates["1"].mean > 0
    recording = record(net, x, "1")
    assert recording.membrane.shape == (5, 3, 4) and torch.equal(recording.spikes, net(x).detach())
    assert audit(net, x).spike_driven
