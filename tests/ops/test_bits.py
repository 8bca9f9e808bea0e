"""Spikes kept at one bit each, and what a layer keeps in all."""

import pytest
import torch
from snntorch import surrogate as snntorch_surrogate
from torch import nn

from sdt_blocks import LIF, SpikeDrivenSelfAttention, SpikeDrivenTransformer, SpikingMLP, SpikingPatchSplitting
from sdt_blocks.blocks import LinearSpikeAttention, LinearSpikeMixer, QKMixer
from sdt_blocks.ops.bits import SpikesAsBits, are_spikes, as_spikes, gapless, wants_bits
from sdt_blocks.ops.dispatch import kernels
from sdt_blocks.ops.spec import Affine, NeuronSpec, Spikes, arrange, state_dtype
from sdt_blocks.steps import normalize_and_fire, per_frame


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 511, 512, 513, 70001])
def test_round_trip(backend, device, size, dtype):
    torch.manual_seed(0)
    spikes = (torch.rand(size, device=device) < 0.3).to(dtype)
    bits = kernels(spikes).pack_bits(spikes)
    assert bits.numel() == (size + 7) // 8
    back = torch.full_like(spikes, 5)
    kernels(spikes).unpack_bits(bits, back)
    assert torch.equal(back, spikes)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan")])
def test_graded_spikes_are_kept_whole(monkeypatch, value):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    spikes = torch.zeros(3000)
    spikes[-1] = value
    assert kernels(spikes).pack_bits(spikes) is None
    weight = torch.ones(3000, requires_grad=True)
    with SpikesAsBits(as_spikes(spikes)):
        y = spikes * weight
    torch.testing.assert_close(torch.autograd.grad(y.sum(), weight)[0], spikes, equal_nan=True)


FIRST, LAST = (0, 1, 2, 3, 4), (0, 1, 3, 4, 2)


def inputs(shape, order, dtype, device):
    """x `[T, B, C, H, W]` with its axes in another order of memory."""
    x = torch.randn([shape[axis] for axis in order], device=device).mul(2).to(dtype)
    return x.permute([order.index(axis) for axis in range(5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "order", "bytes_are_whole"),
    [
        ((4, 2, 3, 2, 4), FIRST, True),
        ((5, 3, 16, 3, 1), LAST, True),
        ((11, 1, 8, 3, 3), LAST, True),
        ((2, 1, 3, 20, 20), FIRST, True),
        ((3, 8, 1, 3, 3), FIRST, True),
        ((3, 2, 4, 3, 3), FIRST, False),
        ((3, 2, 12, 3, 3), LAST, False),
    ],
)
def test_kernels_that_fire_write_the_bits(backend, device, shape, order, bytes_are_whole, dtype):
    """Those of the neurons, normalized, and of the attention's masked spikes: what packing these gives."""
    torch.manual_seed(0)
    x, layout = arrange(inputs(shape, order, dtype, device), shape[0], per_channel=True)
    module, values = kernels(x), torch.rand(3, shape[2], dtype=state_dtype(x), device=device)
    norm, neuron = Affine(values, values + 0.5, [*values], [*values], True), NeuronSpec(0.3)
    bits, of_masked = (layout.empty_bits(x, wanted=True) for _ in range(2))
    assert not layout.empty_bits(x, wanted=False).numel()
    assert bits.numel() * 8 == (x.numel() if bytes_are_whole else 0)
    if not bytes_are_whole:
        return
    expected, last = module.lif_forward(x, layout, neuron, norm.row(0), None, None, keep_membrane=True)
    spikes, of_state = module.lif_forward(x, layout, neuron, norm.row(0), None, None, keep_membrane=True, bits=bits)
    assert torch.equal(spikes, expected) and torch.equal(of_state, last) and 0.05 < spikes.float().mean() < 0.9
    assert torch.equal(bits, module.pack_bits(spikes))
    masked, sums = torch.empty_like(spikes), values.new_empty(2, *x.shape[:3])
    module.attend([x, x, x], Spikes(masked, of_masked), None, sums, layout, [neuron] * 4, norm, None)
    assert masked.any() and torch.equal(of_masked, module.pack_bits(masked))


@pytest.fixture
def packed(monkeypatch):
    """What is packed from here on: the tensor, and whether it became bits."""
    calls = []
    original = SpikesAsBits._pack

    def pack(self, tensor):
        kept = original(self, tensor)
        calls.append((tensor, kept))
        return kept

    monkeypatch.setattr(SpikesAsBits, "_pack", pack)
    return lambda: [(tensor, kept.bits) for tensor, kept in calls if hasattr(kept, "bits")]


def neurons_spikes(device="cpu", *shape):
    """Spikes `[2, 3, 6, 5, 5]` of a neuron."""
    torch.manual_seed(0)
    return LIF()((torch.rand(*(shape or (2, 3, 6, 5, 5)), device=device) * 3).requires_grad_())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_gradients(backend, device, kernel, autocast, packed):
    conv = nn.Conv2d(6, 9, kernel, padding=kernel // 2).to(device)
    spikes = neurons_spikes(device)
    assert 0.2 < spikes.mean() < 0.8
    gradients = []
    for call in (lambda: per_frame(conv, spikes), lambda: conv(spikes.flatten(0, 1)).unflatten(0, (2, 3))):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = call()
        gradients.append(torch.autograd.grad(y.square().sum(), [spikes, *conv.parameters()]))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert [tensor.dtype for tensor, _ in packed()] == [torch.bfloat16 if autocast else torch.float32]


def test_autocast_leaves_float64_as_it_is():
    spikes, conv = LIF()((torch.rand(2, 1, 3, 4, 4).double() * 3).requires_grad_()), nn.Conv2d(3, 4, 1).double()
    assert are_spikes(spikes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(per_frame(conv, spikes), conv(spikes.flatten(0, 1)).unflatten(0, (2, 1)))


def test_spikes_for_several_layers_are_packed_once(packed, monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    spikes = neurons_spikes()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            per_frame(nn.Conv2d(6, 6, 1), spikes), per_frame(nn.Conv2d(6, 6, 1), spikes)
    assert len(packed()) == 4 and len({bits.data_ptr() for _, bits in packed()}) == 1


class Counts(nn.Module):
    def forward(self, q, k, v):
        return q * (k * v).sum((-2, -1), keepdim=True)


class Doubled(LIF):
    def forward(self, x, membrane=None, **options):
        return super().forward(x, membrane, **options) * 2


class Levels(LIF):
    def forward(self, x, membrane=None, **options):
        return x.round().clamp(0, 4)


def counting_attention(channels):
    block = SpikeDrivenSelfAttention(channels, num_heads=2)
    block.mixer = Counts()
    return block


def scaled_by_a_hook(channels):
    block = SpikingMLP(channels, hidden=12)
    block.neuron1.register_forward_hook(lambda module, inputs, output: output * 3)
    return block


def scaled_in_place(channels):
    block = SpikingMLP(channels, hidden=12)
    block.neuron2.register_forward_hook(lambda module, inputs, output: output.mul_(3))
    return block


def scaled_before_the_convolution(channels):
    block = SpikeDrivenSelfAttention(channels, num_heads=2)
    block.q.conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    return block


def scaled_behind_the_mask(channels):
    block = SpikeDrivenSelfAttention(channels, num_heads=2)
    block.mixer.masked = nn.Hardtanh(0, 0.5)
    return block


def dropout_between(channels):
    block = SpikeDrivenSelfAttention(channels, num_heads=2)
    block.proj.conv = nn.Sequential(nn.Dropout(0.5), block.proj.conv)
    return block


def scaled_by_a_backward_hook(channels):
    block = SpikingMLP(channels, hidden=12)
    block.neuron1.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 2,))
    return block


def averaged(channels):
    block = SpikingPatchSplitting(16, in_channels=channels)
    block.pools[0] = nn.AvgPool2d(2)
    return block


def smooth_spikes(channels):
    return SpikingMLP(channels, hidden=12, neuron=lambda threshold: LIF(surrogate=snntorch_surrogate.fast_sigmoid()))


NO_SPIKES = {
    "counting mixer": counting_attention,
    "hook": scaled_by_a_hook,
    "hook in place": scaled_in_place,
    "hook of the convolution": scaled_before_the_convolution,
    "layer behind the mask": scaled_behind_the_mask,
    "dropout": dropout_between,
    "backward hook": scaled_by_a_backward_hook,
    "average pooling": averaged,
    "subclass": lambda channels: SpikingMLP(channels, hidden=12, neuron=Doubled),
    "integer levels": lambda channels: SpikeDrivenSelfAttention(channels, num_heads=2, neuron=Levels),
    "surrogate of one's own": smooth_spikes,
}


@pytest.mark.parametrize("make", NO_SPIKES.values(), ids=NO_SPIKES)
@pytest.mark.parametrize("everywhere", [False, True], ids=["", "global hook"])
def test_what_is_no_spike_gives_the_gradients_of_the_equations(backend, device, monkeypatch, make, everywhere):
    x = torch.rand(2, 2, 4, 8, 8, device=device, generator=torch.Generator(device).manual_seed(0)) * 4
    hook = None
    if everywhere:
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: output * 2 if isinstance(module, LIF) else None
        )
    try:
        gradients = []
        for name in (backend, "reference"):
            monkeypatch.setenv("SDT_BLOCKS_BACKEND", name)
            torch.manual_seed(0)
            block = make(4).to(device)
            for module in block.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.constant_(module.bias, 1.0)
            (block(x) * torch.linspace(-1, 1, 16, device=device).view(-1, 1, 1)[: block.dim]).sum().backward()
            gradients.append([parameter.grad for parameter in block.parameters()])
    finally:
        if hook is not None:
            hook.remove()
    assert sum(gradient.abs().sum() for gradient in gradients[1]) > 1
    for fused, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)


def test_only_what_a_neuron_made_is_known_as_spikes(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    spikes = neurons_spikes()
    assert are_spikes(spikes) and not are_spikes(spikes * 1) and not are_spikes(torch.ones(3))
    assert not are_spikes(as_spikes(spikes + 1, spikes, torch.ones(3)))
    assert all(are_spikes(QKMixer(6, num_heads=2, over=over)(spikes, spikes)) for over in ("channels", "tokens"))
    spikes.mul_(2)
    assert not are_spikes(spikes)
    with pytest.raises(ValueError, match="as_spikes"):
        SpikesAsBits(spikes)
    with torch.no_grad():
        assert not are_spikes(neurons_spikes())


@pytest.mark.parametrize("event_pooling", [False, True])
def test_every_layer_that_spikes_drive_keeps_bits(backend, device, packed, event_pooling):
    torch.manual_seed(0)
    model = SpikeDrivenTransformer(depth=1, dim=16, num_heads=2, event_pooling=event_pooling, pooling="0100").to(device)
    model(torch.rand(2, 3, 8, 8, device=device))
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(packed()) == len(convolutions) - 1


def test_a_change_in_place_is_noticed(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    conv = nn.Conv2d(6, 2, 1)
    y = per_frame(conv, neurons_spikes())
    with torch.no_grad():
        conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


@pytest.mark.parametrize("order", [FIRST, LAST])
def test_spikes_are_not_read_again_for_their_bits(backend, device, monkeypatch, order):
    """Of a block's four convolutions, where a byte is of one channel: 6 x 6 tokens are not a multiple of 8."""
    torch.manual_seed(0)
    block = SpikeDrivenTransformer(depth=1, dim=16, num_heads=2).blocks[0].to(device)
    x, calls, gradients = 2 * inputs((2, 1, 16, 6, 6), order, torch.float32, device), [], []
    module = kernels(x)
    original = module.pack_bits
    monkeypatch.setattr(module, "pack_bits", lambda spikes: calls.append(spikes) or original(spikes))
    packs = 0 if order == LAST else 2
    for written, expected in ((True, packs), (False, 4)):
        monkeypatch.setattr(module, "writes_bits", written)
        calls.clear()
        result = block(x.detach().requires_grad_())
        assert len(calls) == expected
        gradients.append(torch.autograd.grad(result.square().sum(), list(block.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs) and ours.isfinite().all()
    assert sum(gradient.abs().sum() for gradient in gradients[0]) > 1


def test_bits_are_written_only_where_gradients_run(backend, device):
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, requires_grad=True, device=device)
    assert wants_bits(x, None, 0.5, weight) == (backend == "triton") and not wants_bits(x, None, 0.5)
    with torch.no_grad():
        assert not wants_bits(weight)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 5.0), (torch.bfloat16, 2.2)])
def test_memory_of_a_layer(monkeypatch, packed, dtype, most):
    """Convolution, norm and neuron together keep the norm's input and one bit for each spike they are fed."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    conv, norm, neuron = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), LIF()
    spikes = as_spikes((torch.rand(4, 2, 32, 16, 16) < 0.2).to(dtype).requires_grad_())
    conv.to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = normalize_and_fire(norm, neuron, per_frame(conv, spikes))
    tensors = [*kept, *(bits for _, bits in packed())]
    total = sum(t.numel() * t.element_size() for t in tensors if not isinstance(t, nn.Parameter))
    assert packed()
    assert 0 < total / result.numel() <= most


def test_the_linear_attention_keeps_q_k_and_v_as_bits(backend, device, packed):
    """Each of its products of spikes: four chains by their first convolution, q, k and v within the mixer."""
    torch.manual_seed(0)
    block = LinearSpikeAttention(16, num_heads=2).to(device)
    membrane = torch.randn(2, 3, 16, 4, 4, device=device) * 3
    for dtype in (None, torch.bfloat16):
        with torch.autocast(device, torch.bfloat16, enabled=dtype is not None):
            block(membrane)
    assert [tensor.dtype for tensor, _ in packed()].count(torch.bfloat16) == 4
    assert len(packed()) == 2 * 7


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_mixing_bits_gives_the_gradients_of_the_equation(packed, monkeypatch, memory_format):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    membranes = (torch.rand(6, 6, 5, 5).mul(3).contiguous(memory_format=memory_format) for _ in range(3))
    q, k, v = (LIF()(membrane.unflatten(0, (2, 3)).requires_grad_()) for membrane in membranes)
    heads, gradients = LinearSpikeMixer(6, num_heads=2), []
    for spikes in ((q, k, v), [x * 1 for x in (q, k, v)]):
        counts = heads(*spikes)
        gradients.append(torch.autograd.grad(counts.square().sum(), [q, k, v]))
    assert len(packed()) == 3 and all(gradient.any() for gradient in gradients[0])
    for bits, floats in zip(*gradients, strict=True):
        assert torch.equal(bits, floats)


def test_spikes_that_are_written_into_are_kept_as_they_are_then(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    spikes, weight = as_spikes((torch.rand(6, 16) < 0.3).float()), torch.randn(16, 4, requires_grad=True)
    before = spikes.clone()
    with SpikesAsBits(spikes) as (kept,):
        first = (kept @ weight).sum()
    first.backward()
    with SpikesAsBits(spikes) as (kept,):
        second = (kept.mul_(3) @ weight).sum()
    (found,) = torch.autograd.grad(second, weight)
    expected = before.sum(0)[:, None].expand(16, 4)
    torch.testing.assert_close(weight.grad, expected)
    torch.testing.assert_close(found, 3 * expected)


def test_what_fills_a_stretch_of_memory():
    """An axis of one element may say what it likes."""
    x = torch.zeros(2, 6, 4)
    for view, whole in (
        (x, True), (x.permute(2, 0, 1), True), (x.as_strided((4, 1, 12), (12, 7, 1)), True), (x[:, :, None], True),
        (x[:, ::2], False), (x[..., :3], False), (x[:1].expand(2, 6, 4), False), (x[1], True),
    ):  # fmt: skip
        assert gapless(view) == whole


def test_the_gradients_of_several_products_share_what_is_unpacked(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    module, unpacked = kernels(torch.ones(1)), []
    original = module.unpack_bits
    monkeypatch.setattr(module, "unpack_bits", lambda bits, x: unpacked.append(x) or original(bits, x))
    torch.manual_seed(0)
    spikes = (torch.rand(6, 16) < 0.3).float()
    weights = [torch.randn(16, 4, requires_grad=True) for _ in range(3)]
    with SpikesAsBits(as_spikes(spikes)) as (kept,):
        result = sum((kept @ weight).square().sum() for weight in weights)
    expected = [2 * spikes.T @ (spikes @ weight) for weight in weights]
    assert all(of.norm() > 0 for of in expected)
    for times in (1, 4):
        found = torch.autograd.grad(result, weights, retain_graph=True)
        # A second time nobody knows who still comes.
        assert len(unpacked) == times
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
