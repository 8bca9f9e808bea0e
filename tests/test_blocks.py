"""Attention, MLP, patch splitting and shortcut, each alone."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdt_blocks import (
    LIF,
    MembraneShortcut,
    ParametricLIF,
    SpikeDrivenBlock,
    SpikeDrivenSelfAttention,
    SpikingMLP,
    SpikingPatchSplitting,
    calibrate_norms,
)
from sdt_blocks.analysis import firing_rates
from sdt_blocks.blocks import ConvNorm, MaskMixer, QKMixer
from sdt_blocks.blocks.integer import ScaledShortcut
from sdt_blocks.steps import project_and_mix, repeat_frame, shortcut


def record(module):
    seen = []
    module.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    return seen


@settings(max_examples=25, deadline=None)
@given(
    time_steps=st.integers(1, 4),
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 5]),
    width=st.integers(1, 3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    event_pooling=st.booleans(),
)
def test_attention_is_mask_and_addition(time_steps, batch, heads, width, size, event_pooling):
    """The equation as plain loops over spikes, head by head, for any size."""
    dim = heads * width
    block = SpikeDrivenSelfAttention(dim, num_heads=heads, event_pooling=event_pooling).eval()
    q, k, v = (torch.randint(0, 2, (time_steps, batch, dim, *size)).float() for _ in "qkv")
    got = block.mixer(q, k, v)

    def pool(x):
        return F.max_pool2d(x, 3, 1, 1)

    def by_head(x):  # [B, dim, H, W] -> [B, heads, N, width]
        return x.flatten(2).unflatten(1, (heads, width)).transpose(-1, -2)

    membrane = torch.zeros(batch, heads, width)
    for t in range(time_steps):
        k_t, v_t = (pool(k[t]), pool(v[t])) if event_pooling else (k[t], v[t])
        kv = by_head(k_t) * by_head(v_t)
        kv = pool(kv) if event_pooling else kv
        membrane = membrane + (kv.sum(2) - membrane) / 2
        fired = (membrane >= 0.5).float()
        membrane = membrane * (1 - fired)
        qa = by_head(q[t]) * fired.unsqueeze(2)
        qa = pool(qa) if event_pooling else qa
        expected = qa.transpose(-1, -2).reshape(batch, dim, *size)
        assert torch.equal(got[t], expected)


def test_one_coincidence_is_enough():
    block = SpikeDrivenSelfAttention(8)
    spike = torch.zeros(1, 1, 8, 2, 2)
    spike[0, 0, 3, 1, 1] = 1
    masked = block.mixer(torch.ones_like(spike), spike, spike)
    assert masked[0, 0, 3].eq(1).all() and masked.sum() == 4


@pytest.mark.parametrize("make", [MaskMixer, partial(QKMixer, over="tokens"), partial(QKMixer, num_heads=1)])
def test_a_mask_counts_exactly_in_half_precision(make):
    """257 spikes make h = 128.5, which fires, and not the 128 of what bfloat16 rounds them to; 256 do not."""
    mixer = make(512, neuron=partial(LIF, threshold=256.5))  # the mixer's own is half of it
    spikes = torch.zeros(1, 1, 512, 1, 257, dtype=torch.bfloat16)
    spikes[:, :, :257] = 1
    given = [spikes] * (3 if isinstance(mixer, MaskMixer) else 2)
    assert torch.equal(mixer(*given), spikes)
    spikes[..., 256] = spikes[:, :, 256] = 0
    assert not mixer(*given).any()


@pytest.mark.parametrize(("over", "masks"), [("channels", 2), ("tokens", 8)])
def test_qk_attention_learns_a_time_constant_for_each_of_its_masks(over, masks):
    mixer = QKMixer(8, num_heads=2, over=over, neuron={"name": "plif", "channels": True})
    spikes = torch.ones(2, 1, 8, 3, 3, requires_grad=True)
    mixer(spikes, spikes).sum().backward()
    assert mixer.neuron.w.grad.shape == (masks,) and mixer.neuron.w.grad.all()


def test_attention_hooks_see_every_spike():
    torch.manual_seed(2)
    block = SpikeDrivenSelfAttention(16, num_heads=4)
    seen = {
        name: record(block.get_submodule(name))
        for name in ("q_neuron", "mixer.k_pool", "mixer.v_pool", "mixer.coincidences", "mixer.masked")
    }
    block(torch.randn(3, 2, 16, 4, 4) * 3)
    q, k, v, kv, qa = (seen[name][0][1] for name in seen)
    assert torch.equal(kv, k * v) and kv.sum() > 0
    assert set(qa.unique().tolist()) == {0.0, 1.0} and (qa <= q).all()


@pytest.mark.parametrize("hidden", [None, 12, 16])
def test_mlp_equation(hidden):
    torch.manual_seed(0)
    block = SpikingMLP(16, hidden=hidden).eval()
    assert block.fc1.conv.out_channels == (hidden or 64)
    u = torch.randn(4, 2, 16, 3, 5).mul(2)

    def linear(conv, norm, s):
        y = torch.einsum("oi,tbihw->tbohw", conv.weight[..., 0, 0], s) + conv.bias.view(-1, 1, 1)
        return y / (1 + norm.eps) ** 0.5

    m = linear(block.fc1.conv, block.fc1.norm, LIF()(u))
    if hidden == 16:  # the inner shortcut: u + m, then u + m + second half
        expected = m + linear(block.fc2.conv, block.fc2.norm, LIF()(u + m))
    else:
        expected = linear(block.fc2.conv, block.fc2.norm, LIF()(m))
    torch.testing.assert_close(block(u), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "size"), [("1111", (2, 3)), ("0011", (8, 9)), ("0111", (4, 5)), ("0000", (32, 35))]
)
def test_patch_splitting_sizes_and_binary_convolution_inputs(pooling, size):
    patch = SpikingPatchSplitting(16, in_channels=2, pooling=pooling)
    inputs = [record(conv) for conv in [*(stage.conv for stage in patch.stages[1:]), patch.position.conv]]
    x = torch.rand(3, 2, 2, 32, 35)
    assert patch(x).shape == (3, 2, 16, *size)
    for seen in inputs:
        assert set(seen[0][0].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("training", [True, False])
def test_still_image_is_computed_once_and_equals_the_repeated_one(training, monkeypatch):
    torch.manual_seed(0)
    convolve, calls = nn.Conv2d._conv_forward, []
    x = torch.rand(1, 3, 3, 16, 16)
    once = SpikingPatchSplitting(16).train(training)
    calibrate_norms(once, x)
    assert not firing_rates(once, x, forward=lambda net, x: net(x.expand(5, -1, -1, -1, -1))).silence
    repeated = SpikingPatchSplitting(16).train(training)
    repeated.load_state_dict(once.state_dict())
    with monkeypatch.context() as patch:  # a hook would see every frame in training
        patch.setattr(
            nn.Conv2d, "_conv_forward", lambda conv, x, *weights: calls.append(x) or convolve(conv, x, *weights)
        )
        a = once(x.expand(5, -1, -1, -1, -1))
    b = repeated(x.repeat(5, 1, 1, 1, 1))
    assert len(calls[0]) == 3
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for (name, p), other in zip(once.named_parameters(), repeated.parameters(), strict=True):
        assert (p.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-6, name
    for (name, p), other in zip(once.named_buffers(), repeated.buffers(), strict=True):
        torch.testing.assert_close(p, other, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_repeated_running_variance_is_exact(momentum):
    norm, other = nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    for _ in range(3):
        x = torch.randn(1, 2, 4, 3, 3)
        repeat_frame(norm, x, 4)
        other(x.expand(4, -1, -1, -1, -1).flatten(0, 1))
        torch.testing.assert_close(norm.running_var, other.running_var)
        torch.testing.assert_close(norm.running_mean, other.running_mean)


def test_a_frame_is_repeated_by_a_norm_without_statistics():
    norm, x = nn.BatchNorm2d(4, track_running_stats=False), torch.randn(1, 2, 4, 3, 3)
    torch.testing.assert_close(repeat_frame(norm, x, 4), norm(x[0]).expand(4, -1, -1, -1, -1))


@pytest.mark.parametrize("make", [MembraneShortcut, partial(ScaledShortcut, 4)])
def test_drop_path_keeps_or_leaves_whole_samples(make):
    torch.manual_seed(0)
    shortcut = make(nn.Identity(), drop_path=0.25)
    if isinstance(shortcut, ScaledShortcut):
        assert (shortcut.scale == 1e-6).all()
        nn.init.ones_(shortcut.scale)
    u = torch.ones(3, 2000, 4, 1, 1)
    change = shortcut(u) - u
    assert torch.equal(change[0], change[1]) and torch.equal(change[:, :, 0], change[:, :, 3])
    kept = change[0, :, 0, 0, 0]
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 1 / 0.75]))
    assert abs((kept > 0).float().mean() - 0.75) < 0.04
    assert torch.equal(shortcut.eval()(u), 2 * u)


def test_neuron_is_injected_everywhere():
    made = []

    def factory(threshold):
        made.append(ParametricLIF(threshold=threshold, init_tau=3.0))
        return made[-1]

    blocks = [
        SpikeDrivenSelfAttention(16, neuron=factory),
        SpikingMLP(16, neuron=factory),
        SpikingPatchSplitting(16, neuron=factory),
    ]
    assert [m for b in blocks for m in b.modules() if isinstance(m, LIF)] and len(made) == 5 + 2 + 4
    assert [n.threshold for n in made].count(0.5) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpikeDrivenSelfAttention(20, num_heads=8), "positive multiple of 8, got 20"),
        (lambda: SpikeDrivenSelfAttention(16, num_heads=0), "num_heads must be positive, got 0"),
        (lambda: SpikeDrivenSelfAttention(16)(torch.zeros(2, 16, 4, 4)), r"\[T, B, 16, H, W\].*got \[2, 16, 4, 4\]"),
        (lambda: SpikingMLP(16)(torch.zeros(0, 1, 16, 4, 4)), "T >= 1"),
        (lambda: SpikingMLP(16, hidden=0), "hidden must be positive, got 0"),
        (lambda: SpikingMLP(16, hidden=24.0), "hidden must be a whole number, got 24.0"),
        (lambda: SpikingMLP("16"), "dim must be a whole number, got '16'"),
        (lambda: SpikeDrivenSelfAttention(16, num_heads=True), "num_heads must be a whole number, got True"),
        (lambda: SpikingPatchSplitting(16.5), "dim must be a whole number, got 16.5"),
        (lambda: SpikeDrivenSelfAttention("16"), "must be a whole number, got '16'"),
        (lambda: SpikeDrivenSelfAttention(16, event_pooling="no"), "event_pooling must be True or False, got 'no'"),
        (lambda: SpikeDrivenBlock(16, mlp_ratio="4"), "mlp_ratio must be a number, got '4'"),
        (lambda: SpikeDrivenBlock(16, mlp_ratio=math.inf), "mlp_ratio must be positive and finite, got inf"),
        (lambda: SpikeDrivenBlock(16, mlp_ratio=0.01), "at least one hidden channel of dim=16, got 0.01"),
        (lambda: SpikingMLP(16)(torch.zeros(2, 1, 16, 4, 4).byte()), "in floating point, got torch.uint8"),
        (lambda: SpikingPatchSplitting(12), "positive multiple of 8, got 12"),
        (lambda: SpikingPatchSplitting(16, pooling="111"), "four flags"),
        (lambda: SpikingPatchSplitting(16, pooling="0021"), "four flags"),
        (lambda: SpikingPatchSplitting(16, pooling=1111), "four flags .*, got 1111"),
        (lambda: SpikingPatchSplitting(16)(torch.zeros(4, 1, 2, 8, 8)), r"\[T, B, 3, H, W\]"),
        (lambda: MembraneShortcut(nn.Identity(), drop_path=1.0), r"probability in \[0, 1\), got 1.0"),
        (lambda: MembraneShortcut(nn.Identity(), drop_path="0.1"), "drop_path must be a number, got '0.1'"),
        (lambda: shortcut(torch.ones(1, 2, 4), torch.ones(1, 2, 4), 1.0), r"probability in \[0, 1\), got 1.0"),
        (lambda: MembraneShortcut(lambda x: x), "must be an nn.Module, got function"),
        (lambda: MembraneShortcut(nn.Linear(4, 1))(torch.zeros(2, 3, 4)), "must keep the shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_blocks_mix_with_other_modules():
    net = nn.Sequential(
        SpikingPatchSplitting(32, in_channels=1, pooling="0001", neuron=partial(LIF, tau=1.5, surrogate="atan")),
        MembraneShortcut(SpikingMLP(32, hidden=32)),
        MembraneShortcut(SpikeDrivenSelfAttention(32, num_heads=4, neuron="plif"), drop_path=0.1),
    )
    out = net(torch.rand(2, 3, 1, 10, 7))
    assert out.shape == (2, 3, 32, 5, 4)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_parts_have_the_names_of_the_released_weights_too():
    attention, mlp, patch = SpikeDrivenSelfAttention(16), SpikingMLP(16), SpikingPatchSplitting(16)
    assert attention.q_conv is attention.q.conv and attention.attention_neuron is attention.mixer.neuron
    assert mlp.norm2 is mlp.fc2.norm and patch.convs[1] is patch.stages[1].conv
    assert not any("q_conv" in name for name in attention.state_dict())
    mlp.conv1 = other = nn.Conv2d(16, 64, 1)
    assert mlp.fc1.conv is other and sum(p is other.weight for p in mlp.parameters()) == 1
    with pytest.raises(AttributeError, match="stages"):
        patch.convs = nn.ModuleList()
    with pytest.raises(AttributeError, match="no attribute 'q_convolution'"):
        attention.q_convolution  # noqa: B018


def counts(q, k, v):
    return q * (k * v).sum((-2, -1), keepdim=True)


class Counts(SpikeDrivenSelfAttention):
    attend = staticmethod(counts)


@pytest.mark.parametrize("make", [Counts, SpikeDrivenSelfAttention])
def test_an_attend_of_ones_own_replaces_the_mixer(make):
    torch.manual_seed(0)
    block = make(8, num_heads=2).eval()
    if make is SpikeDrivenSelfAttention:
        block.attend = counts
    for unit in (block.q, block.k, block.v):
        nn.init.constant_(unit.norm.bias, 2.0)
    seen = record(block.proj.conv)
    block(torch.rand(2, 2, 8, 3, 3) * 4)
    assert seen[0][0].max() > 1


def firing_units():
    """Units of q, k and v in eval mode that make about half of the neurons fire."""
    torch.manual_seed(0)
    units = [ConvNorm(8, 8).eval() for _ in "qkv"]
    for unit in units:
        nn.init.normal_(unit.conv.weight)
        nn.init.constant_(unit.norm.bias, 1.0)
    return units


def test_the_attention_of_a_still_image_is_that_of_its_repetition():
    units, neurons, mixer = firing_units(), [LIF() for _ in "qkv"], MaskMixer(8)
    spikes = torch.randint(0, 2, (1, 2, 8, 3, 3)).float()
    still, repeated = (
        project_and_mix(units, neurons, mixer, x)
        for x in (spikes.expand(4, -1, -1, -1, -1), spikes.repeat(4, 1, 1, 1, 1))
    )
    assert torch.equal(still, repeated) and not torch.equal(still[0], still[1])


class Sum(nn.Module):
    """A mixer that claims an op of its own, which says that it was asked."""

    emits = "counts"

    def forward(self, q, k, v):
        return q + k + v

    def fused(self, norms, neurons, x):
        return torch.full_like(x[0], -1.0)


class Difference(Sum):
    """Another forward, which the inherited op knows nothing of."""

    def forward(self, q, k, v):
        return q - k * v


def hooked(mixer):
    mixer.register_forward_hook(lambda module, args, output: 2 * output)
    return mixer


def watched(mixer):
    mixer.register_forward_pre_hook(lambda module, args: tuple(1 - part for part in args))
    return mixer


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Sum, None),
        (lambda: hooked(Sum()), lambda q, k, v: 2 * (q + k + v)),
        (lambda: watched(Sum()), lambda q, k, v: 3 - q - k - v),
        (Difference, lambda q, k, v: q - k * v),
        (lambda: hooked(MaskMixer(8)), lambda q, k, v: 2 * MaskMixer(8)(q, k, v)),
    ],
)
def test_the_op_of_a_mixer_is_taken_only_where_it_does_what_the_mixer_does(make, expected):
    units, neurons = firing_units(), [LIF() for _ in "qkv"]
    spikes = torch.randint(0, 2, (4, 2, 8, 3, 3)).float()
    with torch.no_grad():
        got = project_and_mix(units, neurons, make(), spikes)
        fired = [
            neuron(unit(spikes.flatten(0, 1)).view_as(spikes)) for unit, neuron in zip(units, neurons, strict=True)
        ]
    assert all(part.any() and not part.all() for part in fired)
    assert (got == -1).all() if expected is None else torch.equal(got, expected(*fired)) and got.any()
