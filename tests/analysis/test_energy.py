"""The energy table against closed forms, direct counts of spikes, and folded batch normalization."""

import json
import warnings

import pytest
import snntorch
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sdt_blocks import (
    LIF,
    MembraneShortcut,
    MetaSpikeFormer,
    ParametricLIF,
    SpikeDrivenSelfAttention,
    SpikingMLP,
    SpikingPatchSplitting,
    calibrate_norms,
    create_model,
)
from sdt_blocks.analysis import E_AC, E_MAC, audit, energy, energy_from_rates, firing_rates

PJ = 1e-9


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


def multiply_accumulates(dim, depth, size, classes=1000, in_channels=3, ratio=4):
    """FL of every convolution of a V1 model with pooling 1111, by the paper's `k * k * Cin * Cout * H * W`."""
    d, s, n = dim, size, (size // 16) ** 2
    first = 9 * in_channels * (d // 8) * s**2
    splitting = 9 * (
        d // 8 * (d // 4) * (s // 2) ** 2 + d // 4 * (d // 2) * (s // 4) ** 2 + d // 2 * d * (s // 8) ** 2 + d * d * n
    )
    return first, splitting + depth * (4 + 2 * ratio) * n * d * d + d * classes, depth * n * d


@pytest.mark.parametrize(
    ("name", "dim", "depth", "size"),
    [("sdt_8_512", 512, 8, 224), ("sdt_8_384", 384, 8, 224), ("sdt_8_768", 768, 8, 288)],
)
@pytest.mark.parametrize("steps", [1, 4])
def test_all_rates_one(name, dim, depth, size, steps):
    report = energy_from_rates(on_meta(name, time_steps=steps), 1.0, (3, size, size))
    first, rest, attention = multiply_accumulates(dim, depth, size)
    expected = steps * (E_MAC * first + E_AC * (rest + attention)) * PJ
    assert report.total_mj == pytest.approx(expected, rel=1e-12)
    assert report.total_once_mj == pytest.approx(expected - (steps - 1) * E_MAC * first * PJ, rel=1e-12)
    n = (size // 16) ** 2
    vanilla = depth * (2 * n * n * dim + 3 * n * n)
    assert report.ann_mj == pytest.approx(E_MAC * (first + rest + vanilla) * PJ, rel=1e-12)
    assert report.attention.vanilla_mj == pytest.approx(E_MAC * vanilla * PJ, rel=1e-12)
    assert report.attention.whole_mj == pytest.approx(
        steps * E_AC * (attention + 4 * depth * n * dim * dim) * PJ, rel=1e-12
    )
    assert report.attention.vanilla_whole_mj == pytest.approx(
        E_MAC * (vanilla + 4 * depth * n * dim * dim) * PJ, rel=1e-12
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_linear_attention_without_weights(steps):
    """Of k^T v and q (k^T v), N D^2 / heads additions each; a model with weights, though silent, gives the same."""
    options = {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1, 1), "num_heads": 4, "time_steps": steps}
    with torch.device("meta"):
        model = MetaSpikeFormer(**options)
    report = energy_from_rates(model, 1.0, (3, 64, 96))
    for stage, dim in ((3, 48), (4, 64)):
        additions = steps * 2 * (4 * 6) * dim * dim / 4
        assert report[f"stages.{stage}.0.attention.branch"].energy_mj == pytest.approx(E_AC * PJ * additions, rel=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = energy_from_rates(MetaSpikeFormer(**options), 1.0, (3, 64, 96))
    assert same.to_json() == report.to_json() and not same.silence
    for measure in (energy, firing_rates):
        with pytest.raises(ValueError, match=r"weight is on the meta device .* energy_from_rates"):
            measure(model, torch.rand(1, 3, 64, 96))


def test_published_first_convolution():
    report = energy_from_rates(on_meta("sdt_8_512"), 0.0, (3, 224, 224))
    assert round(report["patch.stages.0.conv"].energy_mj, 3) == 1.595
    assert report["patch.stages.0.conv"].kind == "MAC"
    assert report.total_mj == report["patch.stages.0.conv"].energy_mj


def test_rates_are_those_of_the_real_input(small, inputs_of_layers):
    """After the max pooling, which hands on more spikes than the neuron fired."""
    model, x = small(), torch.rand(4, 3, 16, 16)
    inputs = inputs_of_layers(model)
    report = energy(model, x)
    pooled = 0
    for name, value in inputs.items():
        layer = report[name]
        if name == "patch.stages.0.conv":
            assert (layer.kind, layer.rate) == ("MAC", [1, 1, 1])
            continue
        direct = value.double().view(3, -1).mean(1).tolist()
        assert layer.kind == "AC" and layer.rate == pytest.approx(direct), name
        assert layer.energy_mj == pytest.approx(E_AC * PJ * layer.macs * sum(direct))
        pooled += sum(direct)
    assert pooled > 0
    assert report.total_mj == pytest.approx(sum(layer.energy_mj for layer in report.layers))


@pytest.mark.parametrize("event_pooling", [False, True])
def test_attention_counts_the_additions(small, event_pooling):
    model = small(event_pooling=event_pooling)
    attention = model.blocks[0].attention.branch
    sums, pooled = [], []
    attention.mixer.neuron.register_forward_hook(lambda module, args, output: sums.append(args[0]))
    for part in (attention.mixer.k_pool, attention.mixer.v_pool):
        part.register_forward_hook(lambda module, args, output: pooled.append(output.sum().item()))
    report = energy(model, torch.rand(4, 3, 16, 16))
    additions = sums[0].double().sum((1, 2, 3, 4)) / 4
    layer = report["blocks.0.attention.branch"]
    assert layer.synaptic_operations == pytest.approx(additions.sum().item()) and additions.sum() > 0
    assert [rate * layer.macs for rate in layer.rate] == pytest.approx(additions.tolist())
    assert layer.energy_mj == pytest.approx(E_AC * PJ * additions.sum().item())
    assert report.attention.sdsa_mj == layer.energy_mj
    assert layer.bound_mj == pytest.approx(E_AC * PJ * sum(pooled[:2]) / 4)
    if not event_pooling:
        assert layer.energy_mj < layer.bound_mj


def test_batches_add_up(small):
    model, x = small(), torch.rand(7, 3, 16, 16)
    whole, parts = energy(model, x), energy(model, [x[:3], x[3:6], x[6:]])
    assert parts.samples == 7
    assert parts.total_mj == pytest.approx(whole.total_mj, rel=1e-12)
    assert parts.attention.bound_mj == pytest.approx(whole.attention.bound_mj, rel=1e-12)
    for a, b in zip(parts.layers, whole.layers, strict=True):
        assert a.name == b.name and a.rate == pytest.approx(b.rate, rel=1e-12)


def test_folding_batch_normalization_changes_nothing(small):
    model, x = small(), torch.rand(4, 3, 16, 16)
    before = energy(model, x)
    model.patch.stages[0].conv = fuse_conv_bn_eval(model.patch.stages[0].conv, model.patch.stages[0].norm)
    model.patch.stages[0].norm = nn.Identity()
    mlp = model.blocks[0].mlp.branch
    mlp.fc1.conv, mlp.fc1.norm = fuse_conv_bn_eval(mlp.fc1.conv, mlp.fc1.norm), nn.Identity()
    after = energy(model, x)
    # Folding rounds differently: a membrane at its threshold may fall to the other side.
    assert after.total_mj == pytest.approx(before.total_mj, rel=1e-3)
    assert [layer.macs for layer in after.layers] == [layer.macs for layer in before.layers]


def test_event_frames_charge_what_is_not_zero(small):
    model = small(in_channels=2)
    frames = torch.poisson(torch.full((2, 5, 2, 16, 16), 0.3))
    layer = energy(model, frames)["patch.stages.0.conv"]
    share = (frames != 0).double().mean((0, 2, 3, 4))
    assert layer.kind == "MAC" and layer.rate == pytest.approx(share.tolist())
    assert layer.energy_mj == pytest.approx(E_MAC * PJ * 9 * 2 * 4 * 16 * 16 * share.sum().item())
    assert layer.once_mj == layer.energy_mj


def test_silent_model_spends_on_its_first_layer_only(small):
    model = small()
    for module in model.modules():
        if isinstance(module, LIF):
            module.threshold = 1e9
    report = energy(model, torch.rand(2, 3, 16, 16))
    assert report.total_mj == report["patch.stages.0.conv"].energy_mj == pytest.approx(E_MAC * PJ * 3 * 9 * 3 * 4 * 256)
    assert report.attention.sdsa_mj == 0
    assert json.loads(report.to_json())["attention"]["operator_ratio"] is None


@pytest.mark.parametrize("options", [{"time_steps": 1}, {"time_steps": 16}, {"neuron": "plif"}, {"per_step": True}])
def test_settings(small, options):
    report = energy(small(**options), torch.rand(2, 3, 16, 16))
    assert all(len(layer.rate) == report.steps for layer in report.layers)
    assert [layer.kind for layer in report.layers] == ["MAC"] + ["AC"] * (len(report.layers) - 1)
    assert 0 < report.total_once_mj <= report.total_mj


def test_half_precision(small):
    report = energy(small().bfloat16(), torch.rand(2, 3, 16, 16))
    assert [layer.kind for layer in report.layers] == ["MAC"] + ["AC"] * (len(report.layers) - 1)


def test_inference_mode_hides_nothing(small):
    """Within it PyTorch runs past who looks at its operations."""
    model, x = small(), torch.rand(2, 3, 16, 16)
    report, given, judged = energy(model, x), energy_from_rates(model, 0.1, (3, 16, 16)), str(audit(model, x))
    with torch.inference_mode():
        assert energy(model, x.clone()).to_json() == report.to_json()
        assert energy_from_rates(model, 0.1, (3, 16, 16)).to_json() == given.to_json()
        assert str(audit(model, x.clone())) == judged
    assert len(report.layers) > 5 and report.total_mj > 0


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(6, 8), snntorch.Leaky(beta=0.9, init_hidden=True)
        self.fc2, self.lif2 = nn.Linear(8, 3), snntorch.Leaky(beta=0.8, init_hidden=True)
        nn.init.uniform_(self.fc1.weight, 0, 0.5)

    def forward(self, x):
        return torch.stack([self.lif2(self.fc2(self.lif1(self.fc1(x)))) for _ in range(4)])


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
def test_plain_snntorch_loop(batch):
    torch.manual_seed(0)
    net, x = Loop(), torch.rand(batch, 6)
    spikes = []
    net.lif1.register_forward_hook(lambda module, args, output: spikes.append(output.double().mean().item()))
    report = energy(net, x)
    assert report["fc1"].kind == "MAC" and report["fc1"].energy_mj == pytest.approx(E_MAC * PJ * 4 * 48)
    assert report["fc1"].once_mj == pytest.approx(E_MAC * PJ * 48)
    assert report["fc2"].kind == "AC" and report["fc2"].rate == pytest.approx(spikes)
    assert 0 < sum(spikes) < 4


def test_spike_input_only_adds():
    net = Loop()
    x = (torch.rand(3, 6) < 0.5).float()
    report = energy(net, x, spike_input=True)
    assert report["fc1"].kind == "AC"
    assert report["fc1"].energy_mj == pytest.approx(E_AC * PJ * 48 * 4 * x.double().mean().item())


class Mixed(nn.Module):
    """A softmax attention between neurons, its products written as functions, and a strided, grouped convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.neuron = nn.Conv1d(4, 8, 3, stride=2, groups=2), LIF()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x):
        tokens = self.conv(x).transpose(1, 2).expand(3, len(x), 5, 8)
        q, k, v = self.qkv(self.neuron(3 * tokens)).chunk(3, -1)
        return self.head((q @ k.transpose(-1, -2)).softmax(-1) @ v)


def test_products_written_as_functions():
    torch.manual_seed(0)
    report = energy(Mixed(), torch.rand(2, 4, 11))
    macs = {layer.name: (layer.kind, layer.macs) for layer in report.layers}
    assert macs == {
        "conv": ("MAC", 3 * 2 * 8 * 5),
        "qkv": ("AC", 5 * 8 * 24),
        "matmul": ("MAC", 5 * 5 * 8),
        "matmul1": ("MAC", 5 * 5 * 8),
        "head": ("MAC", 5 * 8 * 2),
    }
    assert report["matmul"].energy_mj == pytest.approx(E_MAC * PJ * 3 * 200)


class SpikeProducts(nn.Module):
    def __init__(self):
        super().__init__()
        self.neuron = LIF()

    def forward(self, x):
        s = self.neuron(x.expand(4, *x.shape))
        self.seen = s
        return s @ s.transpose(-1, -2)


def test_a_product_of_spikes_adds():
    torch.manual_seed(0)
    net = SpikeProducts()
    report = energy(net, 4 * torch.rand(2, 5, 8))
    layer = report["matmul"]
    assert layer.kind == "AC" and layer.macs == 5 * 5 * 8
    assert layer.rate == pytest.approx(net.seen.double().mean((1, 2, 3)).tolist())


class Fused(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_fused_attention():
    report = energy(Fused(), torch.rand(2, 3, 5, 8))
    assert [(layer.kind, layer.macs) for layer in report.layers] == [("MAC", 3 * 5 * 5 * 8)] * 2


def test_shared_layer_counts_each_time():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.neuron, self.fc = nn.Linear(6, 6), LIF(threshold=0.01), nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(self.fc(self.neuron(self.first(x).expand(4, *x.shape))))

    report = energy(Shared(), torch.rand(3, 6))
    assert report["fc"].macs == 2 * 36 and report["fc"].synaptic_operations > 0


def test_an_image_handed_over_for_every_step_is_one_image(small):
    """Direct coding costs the same whether the network shows the image, or its caller, as a view or as copies."""
    images = torch.rand(2, 3, 16, 16) * (torch.rand(2, 3, 16, 16) > 0.3)
    frames = images[:, None].expand(-1, 3, -1, -1, -1)
    reports = [energy(small(), x) for x in (images, frames, frames.contiguous())]
    changing = frames.clone()
    changing[1, 2, 0, 5, 5] += 1
    name = reports[0].layers[0].name
    for report in reports:
        assert report.total_mj == reports[0].total_mj and report.total_once_mj == reports[0].total_once_mj
        assert report[name].energy_mj == pytest.approx(3 * report[name].once_mj)
        for model, found in report.estimates.items():
            assert found.cost == reports[0].estimates[model].cost, model
    whole, recording = reports[0].estimates["executed"].rows[0], energy(small(), changing).estimates["executed"].rows[0]
    assert [step.total_mj > 0 for step in whole.steps] == [True, False, False]
    assert [step.total_mj > 0 for step in recording.steps] == [True] * 3
    # Of frames that change, what is not zero is charged.
    assert recording.steps[0].total_mj < 0.8 * whole.steps[0].total_mj


def test_a_layer_behind_the_mean_over_time_runs_once():
    class MeanFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.neuron, self.head = nn.Linear(6, 8), LIF(threshold=0.01), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.neuron(self.first(x).expand(4, len(x), 8)).mean(0) - 0.1)

    net, calls = MeanFirst(), []
    report = energy(net, torch.rand(3, 6))
    assert report["head"].synaptic_operations == 8 * 5 and report["first"].synaptic_operations == 4 * 6 * 8
    net.head.register_forward_hook(lambda *_: calls.append(1))
    net(torch.rand(3, 6))
    head = next(row for row in report.estimates["executed"].rows if row.name == "head")
    assert len(calls) == len(head.steps) == 1
    assert head.cost.compute_mj == pytest.approx((8 * 5 * E_MAC + 5 * E_AC) * PJ)


def test_a_first_layer_over_all_frames_runs_once():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.neuron, self.head = nn.Conv3d(2, 4, 3, padding=1), LIF(threshold=0.01), nn.Linear(4, 5)

        def forward(self, x):  # frames [T, B, 2, H, W], or a volume [B, 2, D, H, W] shown for four steps
            if x.shape[1] == 3:
                membrane = self.first(x.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4)
            else:
                membrane = self.first(x).expand(4, -1, -1, -1, -1, -1)
            return self.head(self.neuron(membrane).flatten(3).mean(-1)).mean(0)

    frames = energy(Video(), torch.rand(4, 3, 2, 6, 6))["first"]
    assert frames.synaptic_operations == 4 * 36 * 27 * 2 * 4 and frames.energy_mj == frames.once_mj > 0
    volume = energy(Video(), torch.rand(3, 2, 5, 6, 6))["first"]
    assert volume.synaptic_operations == 4 * (5 * 36 * 27 * 2 * 4) and volume.energy_mj == pytest.approx(
        4 * volume.once_mj
    )


def test_json_and_table(small, tmp_path):
    from rich.console import Console

    report = energy(small(), torch.rand(2, 3, 16, 16))
    content = json.loads(report.to_json(tmp_path / "energy.json"))
    assert content == json.loads((tmp_path / "energy.json").read_text())
    assert content["total_mj"] == pytest.approx(sum(layer["energy_mj"] for layer in content["layers"]))
    assert content["ann_ratio"] == pytest.approx(content["ann_mj"] / content["total_mj"])
    for layer in content["layers"]:
        picojoules = {"MAC": E_MAC, "AC": E_AC}[layer["kind"]]
        assert layer["energy_mj"] == pytest.approx(picojoules * PJ * layer["macs"] * sum(layer["rate"]))
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    assert all(layer.name in text for layer in report.layers)


def test_given_rates_by_name_and_pattern():
    model = on_meta("sdt_2_256")
    report = energy_from_rates(model, {"head": [0.1, 0.2, 0.3, 0.4], "blocks.*": 0.5, "patch.*": 0}, (3, 32, 32))
    assert report["head"].energy_mj == pytest.approx(E_AC * PJ * 2560 * 1.0)
    assert report["blocks.1.mlp.branch.fc1.conv"].rate == [0.5] * 4
    assert report["patch.stages.1.conv"].energy_mj == 0
    frames = energy_from_rates(
        on_meta("sdt_2_256_dvs"), {"patch.stages.0.conv": 0.2, "*": 0.1}, (16, 2, 64, 64), e_mac=3, e_ac=1
    )
    assert frames["patch.stages.0.conv"].energy_mj == pytest.approx(3 * PJ * 16 * 0.2 * 9 * 2 * 32 * 64 * 64)


def test_errors(small):
    model = on_meta("sdt_2_256")
    with pytest.raises(ValueError, match="no layer is called heads; the layers are patch"):
        energy_from_rates(model, {"*": 0.1, "heads": 1}, (3, 32, 32))
    with pytest.raises(ValueError, match="no rate fits the layer"):
        energy_from_rates(model, {"head": 0.1}, (3, 32, 32))
    with pytest.raises(ValueError, match="between 0 and 1, got"):
        energy_from_rates(model, 1.5, (3, 32, 32))
    with pytest.raises(ValueError, match="expected 4 rates, one a step, got 2"):
        energy_from_rates(model, {"*": [0.1, 0.2]}, (3, 32, 32))
    for rate in ("0.1", None, ["0.1"] * 4):  # such as the text in a CSV file
        with pytest.raises(TypeError, match="a firing rate is a number, or one number a step, got"):
            energy_from_rates(model, {"*": rate}, (3, 32, 32))
    with pytest.raises(ValueError, match="must not be negative"):
        energy(small(), torch.rand(1, 3, 16, 16), e_mac=-1)
    with pytest.raises(ValueError, match="no batch"):
        energy(small(), [])
    with pytest.raises(KeyError, match="there is no layer 'x'"):
        energy(small(), torch.rand(1, 3, 16, 16))["x"]


@pytest.mark.parametrize(
    ("shape", "error", "told"),
    [
        (3, TypeError, "input_shape must be whole numbers of at least 1, got 3"),
        ("3,32,32", TypeError, "input_shape must be whole numbers of at least 1, got '3,32,32'"),
        ((3, 32.0, 32), TypeError, r"each size in input_shape=\(3, 32.0, 32\) must be a whole number, got 32.0"),
        ((3, True, 32), TypeError, "must be a whole number, got True"),
        ((3, -32, 32), ValueError, r"input_shape must be whole numbers of at least 1, got \(3, -32, 32\)"),
        ((3, 32), ValueError, r"expected images \[B, 3, H, W\]"),
    ],
)
def test_an_odd_input_shape(shape, error, told):
    with pytest.raises(error, match=told):
        energy_from_rates(on_meta("sdt_2_256"), 0.1, shape)


class TimeFirst(nn.Module):
    """A network mixed from blocks that takes `[T, B, C, H, W]`."""

    def __init__(self):
        super().__init__()
        self.patch = SpikingPatchSplitting(16, in_channels=1, pooling="0001", neuron=ParametricLIF)
        self.blocks = nn.Sequential(
            MembraneShortcut(SpikingMLP(16, hidden=16)),
            MembraneShortcut(SpikeDrivenSelfAttention(16, num_heads=4, neuron=ParametricLIF), drop_path=0.1),
        )
        self.fire, self.head = LIF(tau=1.5, reset="subtract", surrogate="atan"), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.fire(self.blocks(self.patch(x)).mean((-2, -1)))).mean(0)


@pytest.mark.parametrize(("steps", "batch"), [(4, 3), (3, 4), (2, 4), (4, 2), (4, 4), (1, 3), (3, 1)])
def test_a_network_mixed_from_blocks(steps, batch):
    torch.manual_seed(0)
    net, x = TimeFirst(), torch.rand(steps, batch, 1, 8, 8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1, 3)
    calibrate_norms(net, x)
    inputs = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, args, output, name=name: inputs.update({name: args[0]}))
    report = energy(net, x)
    assert all(sum(report[f"patch.stages.{stage}.conv"].rate) > 0 for stage in (1, 2, 3))
    assert (report.steps, report.samples) == (steps, batch)
    assert [layer.kind for layer in report.layers] == ["MAC"] + ["AC"] * (len(report.layers) - 1)
    for name, value in inputs.items():
        direct = (value != 0).double().reshape(steps, -1).mean(1).tolist()
        assert report[name].rate == pytest.approx(direct), name
    assert report["blocks.0.branch.fc1.conv"].macs == 16 * 16 * 16
    assert audit(net, x).spike_driven
