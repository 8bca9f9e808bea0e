"""Networks in 8 bits as a GPU computes them, in Triton's interpreter without one, against the CPU's form in 8 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sdt_blocks import LIF, ParametricLIF, Stream, optimize_for_inference, steps
from sdt_blocks.inference import ByteProduct, Bytes, Events, IntegerProduct
from sdt_blocks.neuron import IntegerNeuron

pytestmark = pytest.mark.cuda
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch):
    """Calls with a backend's Triton kernels, and without."""

    def call(function, *given):
        with monkeypatch.context() as patch:
            patch.setenv("SDT_BLOCKS_BACKEND", "triton")
            return function(*given)

    return call


def in_bytes(model: nn.Module, **options) -> nn.Module:
    return optimize_for_inference(model.to(DEVICE), torch.int8, **options)


def first(answer: Tensor | tuple[Tensor, ...]) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer


LONG = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("sdt_2_256", "sdt_v3_83m", "spikformer_4_384", "qkformer_4_384")
]
"""Counts of shortcuts between spikes, levels of integer neurons, 3x3, strides, chains."""


@pytest.mark.parametrize("name", ["sdt_v2_15m", "sdt_v3_5m", *LONG])
@torch.no_grad()
def test_every_family_answers_as_on_a_cpu(make_small, on_gpu, name: str) -> None:
    """Weights and sums are the same numbers, and no membrane here is within rounding of its threshold."""
    small = make_small(name)
    images = small.images[:1]
    expected = optimize_for_inference(copy.deepcopy(small.model), torch.int8)
    assert isinstance(expected, Events)
    fast = on_gpu(in_bytes, small.model)
    assert isinstance(fast, Bytes) and fast.dtype == torch.int8
    found, wanted = first(on_gpu(fast, images.to(DEVICE))).cpu(), first(expected(images))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert wanted.std() > 1e-4 and not torch.equal(wanted, first(small.model.cpu()(images)))
    rows = [integers_of(model) for model in (fast, expected)]
    assert torch.equal(*rows) and rows[0].abs().max() == 127


def integers_of(model: nn.Module) -> Tensor:
    """All weights in 8 bits, in their order; q, k and v of a CPU's attention stand apart, or padded to whole words."""
    found = []
    for module in model.modules():
        if isinstance(module, ByteProduct):
            found.append(module.integers.permute(0, 3, 1, 2).flatten().cpu())
        elif isinstance(module, IntegerProduct):
            rows, parts = module.integers, module.parts
            if parts:
                found += [part[:count].flatten() for part, count in zip(rows.chunk(len(parts)), parts, strict=True)]
            else:
                found.append(rows.flatten())
    return torch.cat(found)


@torch.no_grad()
def test_spikes_layer_by_layer(firing_model, on_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every product fires is what the CPU's product fires, bit by bit, from an image to the head."""
    x = torch.rand(1, 3, 16, 16)
    model = firing_model(x, depth=1, dim=24, num_heads=2, pooling="0011")
    by_cpu, by_gpu = [], []
    cpu = optimize_for_inference(copy.deepcopy(model), torch.int8)
    for _, product in cpu.products():
        product.register_forward_hook(lambda part, _, given: by_cpu.append((part.parts, given[1])))
    fast = on_gpu(in_bytes, model)
    for part in fast.modules():
        if isinstance(part, ByteProduct):
            part.register_forward_hook(lambda _, __, given: by_gpu.append(given[1]))
    expected, found = cpu(x), on_gpu(fast, x.to(DEVICE))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert len(by_gpu) == len(by_cpu) > 6
    fired = 0
    for (parts, packed), spikes in zip(by_cpu, by_gpu, strict=True):
        assert (packed is None) == (spikes is None)
        if packed is not None:
            wanted = torch.cat([part.unpack().movedim(2, -1) for part in packed.split(parts or [packed.channels])], -1)
            assert torch.equal(spikes.cpu().float(), wanted) and wanted.any()
            fired += 1
    assert fired > 4


@torch.no_grad()
def test_integer_neurons_fire_with_the_sums_in_front_of_them(make_small, on_gpu) -> None:
    """Those of an attention too: levels go on as bytes, and only the last product gives its membrane to the head."""
    small, fired = make_small("sdt_v3_5m"), []
    fast = on_gpu(in_bytes, small.model)
    for part in fast.modules():
        if isinstance(part, ByteProduct):
            part.register_forward_hook(lambda _, __, given: fired.append(given[1]))
    on_gpu(fast, small.images[:1].to(DEVICE))
    *levels, last = fired
    assert last is None and len(levels) > 10
    assert all(one.dtype == torch.int8 and one.min() == 0 for one in levels) and max(one.max() for one in levels) > 1


class Layers(nn.Module):
    """Layers of one's own: unlike neurons, an uneven kernel with a stride, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a = nn.Conv2d(2, 12, 3, padding=1), LIF(threshold=0.2)
        self.second, self.b = (
            nn.Conv2d(12, 20, (3, 2), stride=(2, 1), bias=False),
            ParametricLIF(init_tau=3.0, channels=20, reset="subtract", threshold=0.1),
        )
        nn.init.uniform_(self.b.w, -1.0, 1.0)
        self.grouped, self.c = nn.Conv2d(20, 20, 1, groups=4), LIF(threshold=0.1, strict=True)
        self.last = nn.Conv2d(20, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = steps.fire(self.a, steps.project(self.first, x))
        x = steps.fire(self.b, steps.project(self.second, x))
        x = steps.fire(self.c, steps.project(self.grouped, x))
        return steps.project(self.last, x)


@torch.no_grad()
def test_a_network_of_ones_own(on_gpu) -> None:
    """What bytes do not know, here the groups, stays in float32, as on a CPU."""
    model, x = Layers().eval(), torch.rand(3, 1, 2, 9, 7)
    expected, fast = optimize_for_inference(copy.deepcopy(model), torch.int8), on_gpu(in_bytes, model)
    count = sum(isinstance(part, ByteProduct) for part in fast.modules())
    assert count == len(list(expected.products())) > 0
    found = on_gpu(fast, x.to(DEVICE))
    torch.testing.assert_close(found.cpu(), expected(x), rtol=1e-5, atol=1e-6)
    assert found.std() > 0.01


class Doubled(nn.Module):
    """As many spikes as `2 ** times`, in no product."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.first, self.a, self.times = nn.Conv2d(1, 8, 1), LIF(threshold=0.1), times
        nn.init.constant_(self.first.bias, 10.0)

    def forward(self, x: Tensor) -> Tensor:
        spikes = steps.fire(self.a, steps.project(self.first, x))
        for _ in range(self.times):
            spikes = spikes + spikes
        return spikes


@pytest.mark.parametrize("times", [6, 7])
@torch.no_grad()
def test_counts_that_a_byte_does_not_hold_are_floats(on_gpu, times: int) -> None:
    model, x = Doubled(times).eval(), torch.rand(2, 1, 1, 3, 3)
    fast = on_gpu(in_bytes, model)
    assert on_gpu(fast, x.to(DEVICE)).eq(2**times).all()


@torch.no_grad()
def test_a_state_is_saved_and_a_stream_goes_on(firing_model, on_gpu) -> None:
    x = torch.rand(1, 3, 8, 8)
    options = {"depth": 1, "dim": 16, "num_heads": 2, "pooling": "0000", "time_steps": 2}
    model = firing_model(x, **options)
    expected_form = optimize_for_inference(copy.deepcopy(model), torch.int8)
    fast, other = on_gpu(in_bytes, model), on_gpu(in_bytes, firing_model(torch.rand(2, 3, 8, 8) * 3, **options))
    expected = on_gpu(fast, x.to(DEVICE))
    assert not torch.equal(on_gpu(other, x.to(DEVICE)), expected)
    other.load_state_dict(fast.state_dict())
    assert torch.equal(on_gpu(other, x.to(DEVICE)), expected)
    int8 = [value for value in fast.state_dict().values() if value.dtype == torch.int8]
    assert sum(value.numel() for value in int8) > 0.8 * sum(p.numel() for p in model.blocks.parameters())
    frames = torch.rand(3, 1, 1, 3, 8, 8)
    stream, by_cpu = Stream(fast), Stream(expected_form)
    for frame in frames:
        found, wanted = on_gpu(stream, frame.to(DEVICE)).cpu(), by_cpu(frame)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, Stream(expected_form)(frames[-1]))


def test_what_does_not_fit_is_refused_at_the_door(make_small, on_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_small("sdt_2_256").model
    with pytest.raises(ValueError, match=r"in float32 on one device; the model has torch.float64 on .*model.float"):
        on_gpu(in_bytes, copy.deepcopy(model).double())
    layers = Layers()
    layers.a = IntegerNeuron(levels=128, norm=8.0)
    with pytest.raises(ValueError, match=r"second takes values up to 128, and a byte holds 127; leave torch.int8 out"):
        on_gpu(in_bytes, layers.eval())
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"of .* differ in their windows"):
        patch.setattr("sdt_blocks.inference.bytes.side_by_side", lambda units: None)
        on_gpu(in_bytes, copy.deepcopy(model))
    with pytest.raises(ValueError, match="cuda_graph=True is for dense products; leave sparse and exact out"):
        on_gpu(lambda: in_bytes(model, cuda_graph=True, sparse=True))
    with pytest.raises(ValueError, match="paths='linear' pins"):
        on_gpu(lambda: in_bytes(model, paths="linear"))
