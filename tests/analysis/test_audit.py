"""The audit on V1 and on blocks that break the property, each of which it must name."""

import re

import pytest
import snntorch
import torch
import torch.nn.functional as F
from torch import nn

from sdt_blocks import LIF, MembraneShortcut, SpikingMLP, calibrate_norms, create_model
from sdt_blocks.analysis import NotSpikeDrivenError, audit
from sdt_blocks.blocks.spike_level import AcrossImages


def test_v1_multiplies_in_the_first_convolution_only(golden):
    result = audit(golden.model(), golden.tensors["input"])
    assert result.spike_driven
    assert [product.module for product in result.of("MAC")] == ["patch.stages.0.conv"]
    convolutions = [n for n, m in golden.model().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [product.module for product in result.of("AC")] == convolutions[1:]
    assert {product.verdict for product in result.products} == {"MAC", "AC", "mask", "scale", "leak"}
    trained = audit(golden.model(), golden.tensors["input"], as_trained=True)
    assert len(trained.of("fold")) == sum(isinstance(m, nn.BatchNorm2d) for m in golden.model().modules())
    assert [p for p in trained.products if p.verdict != "fold"] == result.products
    # k * v and q * a, in each block.
    assert [product.calls for product in result.of("mask")] == [2] * golden.config["depth"]


class Net(nn.Module):
    """Convolution, neuron, the part under test, convolution."""

    def __init__(self, part):
        super().__init__()
        self.conv, self.neuron = nn.Conv2d(3, 8, 3, padding=1), LIF()
        self.part, self.last = part, nn.Conv2d(8, 8, 1)

    def forward(self, x):
        spikes = self.neuron(3 * self.conv(x).expand(4, *x.shape[:1], 8, *x.shape[2:]))
        return self.last(self.part(spikes.flatten(0, 1)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, spikes):
        return self.function(spikes)


class LayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.neuron = nn.LayerNorm(8), LIF()

    def forward(self, spikes):
        return self.neuron(self.norm(spikes.transpose(1, -1)).transpose(1, -1).unsqueeze(0))[0]


class SoftmaxAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.neuron = nn.MultiheadAttention(8, 2, batch_first=True), LIF()

    def forward(self, spikes):
        tokens = spikes.flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.neuron(mixed.transpose(1, 2).reshape(spikes.shape).unsqueeze(0))[0]


class SpikeResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.neuron = nn.Conv2d(8, 8, 1), LIF()

    def forward(self, spikes):
        return spikes + self.neuron(self.conv(spikes).unsqueeze(0))[0]


class Squeeze(nn.Module):
    """Squeeze and excitation: a gate of real numbers times spikes."""

    def forward(self, spikes):
        return spikes * spikes.mean((-2, -1), keepdim=True).sigmoid()


@torch.no_grad()
def run(part):
    torch.manual_seed(0)
    return audit(Net(part).eval(), torch.rand(2, 3, 8, 8))


BROKEN = {
    "layer norm": (LayerNorm(), "part.norm", "standard deviation"),
    "softmax attention": (SoftmaxAttention(), "part.attention", ""),
    "residual of spikes": (SpikeResidual(), "last", "a sum of spikes in part, which can exceed 1"),
    "average pool": (nn.AvgPool2d(2), "last", "avg_pool2d of spikes in part"),
    "global average": (nn.AdaptiveAvgPool2d(1), "last", "mean of spikes in part"),
    "gate": (Squeeze(), "part", "sigmoid|not known"),
    "no neuron": (nn.Conv2d(8, 8, 1), "last", "no neuron since part"),
    "instance norm": (nn.Sequential(nn.InstanceNorm2d(8)), "part.0", "standard deviation"),
    "group norm": (nn.GroupNorm(2, 8), "part", "standard deviation"),
    "bn of spikes": (nn.BatchNorm2d(8), "last", "batch_norm of spikes in part"),
    "gelu": (nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU()), "part.1", "not known"),
    "integers": (Function(lambda s: s.cumsum(1)), "last", "cumsum of spikes"),
    "product": (Function(lambda s: s.cumsum(1) * s.cumsum(2)), "part", "neither is spikes"),
    "quotient": (Function(lambda s: s / (s.sum() + 1)), "part", "divides by a value that depends on the input"),
    "own copy": (Function(lambda s: torch.zeros_like(s).copy_(s.cumsum(1))), "last", "cumsum of spikes"),
    "written in parts": (Function(lambda s: _written(s)), "last", "cumsum of spikes|written together"),
    "written through another view": (
        Function(lambda s: _by_another_view(s)[0]),
        "last",
        "add in part|written together",
    ),
    "a number among spikes": (Function(lambda s: s.masked_fill(s.flip(1) > 0, 0.5)), "last", "other than 0 and 1"),
    "a number around spikes": (Function(lambda s: F.pad(s, (1, 1), value=0.5)), "last", "other than 0 and 1"),
    "a number in a place": (Function(lambda s: _with_half(s)), "last", "other than 0 and 1"),
    "a number that was read": (Function(lambda s: s * s.cumsum(1).mean().item()), "part", "read from a value"),
}


def _written(spikes):
    whole = torch.zeros_like(spikes)
    whole[0], whole[1] = spikes[0], spikes[1].cumsum(0)
    return whole


def _with_half(spikes):
    copied = spikes.clone()
    copied[:, 0] = 0.5
    return copied


def _by_another_view(spikes):
    """A view of spikes to which real values are added by another name, and one of a part that they do not reach."""
    first, second = spikes.clone().chunk(2)
    view = first.transpose(-1, -2)
    first += first.mean()
    return view, second


READERS = {
    "item": lambda s: s * (2 * s.cumsum(1).mean().item()),
    "float": lambda s: s * (2 * float(s.cumsum(1).mean())),
    "tolist": lambda s: s * torch.tensor([2 * row for row in s.mean((1, 2, 3)).tolist()]).view(-1, 1, 1, 1),
    "numpy": lambda s: s * float(s.numpy().mean()) * 2,
}


@pytest.mark.parametrize("name", READERS)
def test_numbers_that_python_computes_with_are_said(name):
    with pytest.warns(UserWarning, match="Not judged is what Python computes with numbers read from values, in part"):
        result = run(Function(READERS[name]))
    assert result.reads == ["part"] and result.unjudged in result.summary()
    assert not run(Function(lambda s: s if s.any() else -s)).reads


@pytest.mark.parametrize("name", BROKEN)
def test_broken_blocks(name):
    part, where, why = BROKEN[name]
    result = run(part)
    assert not result.spike_driven
    found = [product for product in result.violations if product.module.startswith(where)]
    assert any(re.search(why, product.reason) for product in found), result.violations
    with pytest.raises(NotSpikeDrivenError, match=f"it multiplies in(.|\n)*{where}"):
        result.raise_for_violations()


SOUND = {
    "nothing": nn.Identity(),
    "max pool": nn.MaxPool2d(3, 2, 1),
    "mask": Function(lambda s: s * s.flip(1)),
    "complement": Function(lambda s: 1 - s),
    "scale": Function(lambda s: s * 0.5),
    "cat": Function(lambda s: torch.cat([s[:, 4:], s[:, :4]], 1)),
    "pad": nn.ZeroPad2d(1),
    "own neuron": Function(lambda s: (s.cumsum(1) >= 2).float()),
    "buffer": Function(lambda s: torch.zeros_like(s).copy_(s)),
    "nearest": nn.Upsample(scale_factor=2),
    "beside what is written": Function(lambda s: _by_another_view(s)[1]),
    "pool then neuron": nn.Sequential(nn.AvgPool2d(2), nn.Unflatten(0, (4, 2)), LIF(), nn.Flatten(0, 1)),
    "weights of its own": Function(lambda s: F.conv2d(s, torch.ones(8, 8, 1, 1)).ge(1).to(s.dtype)),
    "memory format": Function(lambda s: s.view(s.shape).contiguous(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_blocks(name):
    result = run(SOUND[name])
    assert result.spike_driven, result.violations
    assert any(product.module == "last" for product in result.of("AC"))
    result.raise_for_violations()


def test_scaled_spikes_are_told_apart():
    result = run(SOUND["scale"])
    assert [p.operands for p in result.of("AC") if p.module == "last"] == ["scaled spikes x constant"]
    assert [p.operation for p in result.of("scale") if p.module == "part"] == ["mul"]


def test_a_block_mixed_into_v1_is_caught(small):
    model = small()
    assert not audit(model, torch.rand(1, 3, 16, 16)).silence
    assert audit(model, torch.rand(1, 3, 16, 16), strict=True).spike_driven
    model.blocks.append(MembraneShortcut(nn.Sequential(SpikingMLP(32), nn.AdaptiveAvgPool3d((32, None, None)))))
    model.blocks.append(MembraneShortcut(Residual()))
    with pytest.raises(NotSpikeDrivenError, match=r"blocks\.2\.branch\.conv"):
        audit(model, torch.rand(1, 3, 16, 16), strict=True)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.neuron, self.conv = LIF(), nn.Conv3d(3, 3, 1)

    def forward(self, u):
        return self.conv((u + self.neuron(u)).transpose(0, 1)).transpose(0, 1)


def test_plain_snntorch_loop():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(6, 8), snntorch.Leaky(beta=0.9, init_hidden=True)
            self.fc2, self.lif2 = nn.Linear(8, 3), snntorch.Leaky(beta=0.8)

        def forward(self, x):
            membrane, out = self.lif2.init_leaky(), []
            for _ in range(4):
                spikes, membrane = self.lif2(self.fc2(self.lif1(self.fc1(x))), membrane)
                out.append(spikes)
            return torch.stack(out).sum(0)

    result = audit(Loop(), torch.rand(2, 6))
    assert result.spike_driven
    assert [(p.module, p.calls) for p in result.of("MAC") + result.of("AC")] == [("fc1", 4), ("fc2", 4)]


def test_a_neuron_that_emits_more_than_spikes():
    class Graded(LIF):
        def forward(self, x):
            return super().forward(x) * x

    net = Net(nn.Identity())
    net.neuron = Graded()
    result = audit(net, torch.rand(2, 3, 8, 8))
    assert [p.module for p in result.violations] == ["last"]
    assert "neuron, a neuron that emits other values" in result.violations[0].reason


def test_foreign_neurons_by_type():
    class Foreign(nn.Module):
        def forward(self, x):
            soft = torch.sigmoid(4 * (x - 1))
            return (x >= 1).to(x.dtype).detach() + soft - soft.detach()

    net = Net(nn.Identity())
    net.neuron = Foreign()
    assert not audit(net, torch.rand(2, 3, 8, 8)).spike_driven
    result = audit(net, torch.rand(2, 3, 8, 8), neurons=[Foreign])
    assert [p.module for p in result.of("leak")] == ["neuron"]


def test_text():
    result = run(BROKEN["average pool"][0])
    text = str(result)
    assert text.startswith("The network is NOT spike-driven.")
    assert "1 violation: a real multiplication" in text and "avg_pool2d of spikes in part" in text


def test_levels_and_counts_are_told_from_real_values():
    """Layers of every family: what multiplies in them, and what adds whole numbers."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32)
    small = {"dims": (16, 32, 64), "depths": (1, 1, 1, 1)}
    found = {}
    for name, options in {
        "spikformer_4_384": {"depth": 1, "dim": 32, "num_heads": 4},
        "sdt_v3_5m": {"dims": (*small["dims"], 64), "depths": (1, 1, 1, 1, 1)},
        "sdt_v3_83m": {**small, "rep_conv": False},
        "sdt_v2_15m": {"dims": (*small["dims"], 64), "depths": (1, 1, 1, 1, 1)},
    }.items():
        model = create_model(name, num_classes=10, **options)
        calibrate_norms(model, images)
        found[name] = audit(model, images)
        assert not found[name].dead
    spikformer, base, large, v2 = found.values()
    blamed = [product.module for product in spikformer.violations]
    inside = [f"blocks.0.attention.branch.{part}.conv" for part in "qkv"]
    assert blamed == [*inside, "blocks.0.mlp.branch.fc1.conv", "head"]
    assert spikformer.reasons[0] == "4 layer(s) multiply counts of spikes"
    assert spikformer.reasons[1].startswith("head: its input is not spikes: mean of counts")
    assert "1 product(s) of counts with spikes, each of which adds a whole number" in spikformer.reasons
    # q k^T and the product with v, in both attentions of V2 and of the base family.
    for one, of_counts in ((v2, 2), (base, 2), (large, 1)):
        assert sum("counts" in product.operands for product in one.of("AC")) == of_counts
    assert v2.spike_driven and base.spike_driven and "levels" in " ".join(base.reasons)
    # Its head reads the mean membrane itself.
    assert [product.module for product in large.violations] == ["head"]


# ---- samples of a batch


def mixing(found):
    return [product.module for product in found.of("mixing")]


@pytest.mark.parametrize(("name", "count"), [("qkformer_cifar_32", 1), ("qkformer_imagenet_64", 2)])
def test_the_released_qkformer_mixes_the_images_of_a_batch(name, count, named_golden):
    golden = named_golden(name)
    released, repaired = (golden.model(mixes_images=mixes) for mixes in (True, False))
    x = golden.tensors["input"][:count]
    found = audit(released, x)
    # The first neuron that does it: what comes behind is given mixed values already.
    assert mixing(found) == ["stages.2.0.attention.branch.proj_neuron"]
    assert "answers depend on what else is in the batch" in found.finding
    assert any("proj_neuron: what it gives for one sample depends on others" in reason for reason in found.reasons)
    with pytest.raises(NotSpikeDrivenError, match=r"mixed in\n  stages.2.0.attention.branch.proj_neuron, batch: what"):
        found.raise_for_violations()
    sound = audit(repaired, x)
    assert not mixing(sound) and "batch" not in sound.finding and not sound.spike_driven
    others = [product for product in found.products if product.verdict != "mixing"]
    assert [(p.module, p.verdict) for p in others] == [(p.module, p.verdict) for p in sound.products]


def test_mixing_alone_breaks_the_property(small):
    model, x = small(depth=2), torch.rand(3, 3, 16, 16)
    assert audit(model, x).spike_driven
    mlp = model.blocks[1].mlp.branch
    mlp.neuron2 = AcrossImages(mlp.neuron2)
    for given in (x, x[:1]):
        found = audit(model, given)
        assert [product.module for product in found.violations] == ["blocks.1.mlp.branch.neuron2"]


class AgainstTheOthers(nn.Module):
    """An attention of one's own, in which tokens of all images meet."""

    def __init__(self):
        super().__init__()
        self.neuron = LIF()

    def forward(self, u):
        spikes = self.neuron(u)
        return u + spikes - spikes.mean(1, keepdim=True)


def test_whatever_lets_samples_meet_is_named(small):
    model, x = small(), torch.rand(3, 3, 16, 16)
    model.blocks.append(AgainstTheOthers())
    assert mixing(audit(model, x)) == ["blocks.1"]
    model.blocks[0].mlp.branch.fc1.norm = nn.BatchNorm2d(128, track_running_stats=False)
    with pytest.warns(UserWarning, match="blocks.0.mlp.branch.fc1 .it is no plain convolution"):
        assert mixing(audit(model, x)) == ["blocks.0.mlp.branch.fc1.norm"]
    # Time first, as many samples as steps, and other outputs than answers.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), LIF(), nn.Linear(6, 4)).eval()
    sequence = 3 * torch.randn(4, 4, 6)
    assert not mixing(audit(net, sequence)) and net[1](net[0](sequence)).any()
    net[1] = AcrossImages(LIF())
    assert mixing(audit(net, sequence)) == ["1"]


def test_one_value_for_a_batch_and_chance_are_not_answers(small):
    class Noisy(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            logits = self.model(x + 0.1 * torch.rand_like(x))
            return {"logits": logits, "largest": logits.max()}

    assert not mixing(audit(Noisy(small()), torch.rand(3, 3, 16, 16)))
