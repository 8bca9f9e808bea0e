"""Networks with weights of 8 bits, and networks whose every sum has one order."""

from __future__ import annotations

import copy
import io
import itertools
from functools import partial

import pytest
import torch
from safetensors.torch import load, save
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sdt_blocks import LIF, create_model, example_model, optimize_for_inference
from sdt_blocks.analysis import firing_rates
from sdt_blocks.blocks import LinearSpikeMixer, MaskMixer, QKMixer
from sdt_blocks.inference import Events, IntegerProduct, choice, events, forms
from sdt_blocks.inference.forms import DenseSums
from sdt_blocks.inference.integers import OrderedSums, ordered_mean
from sdt_blocks.inference.timings import Timings

GOLDEN = [
    "sdt_lif_static_64",
    "sdt_lif_dvsmode_tet_32",
    "sdtv2_grads_T2_64",
    "sdtv3_base_64",
    "sdtv3_large_kd_64",
    "spikformer_cifar_32",
    "qkformer_cifar_32",
]
"""Each family, its neurons, levels, depthwise and strided convolutions."""
REALS = (DenseSums, OrderedSums)
"""Products of real values."""


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as `example_model` takes them: `[1797, 1, 16, 16]`, and their labels."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    images = nn.functional.interpolate(images, size=16, mode="bilinear")
    return (images - 0.3) / 0.35, torch.tensor(found.target)


def first(answer: Tensor | tuple[Tensor, ...]) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer


@torch.no_grad()
def test_accuracy_on_digits_is_that_of_float32():
    model, (images, labels) = example_model(), digits()
    right = (model(images).argmax(1) == labels).float().mean()
    assert right > 0.97
    found = optimize_for_inference(model, torch.int8)(images)
    assert not torch.equal(found, model(images))
    assert abs((found.argmax(1) == labels).float().mean() - right) <= 0.002


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_events_and_dense_products_give_the_same_bits(named_golden, name):
    golden = named_golden(name)
    model, x = golden.model(), golden.tensors["input"]
    densely, by_events = (optimize_for_inference(model, torch.int8, sparse=sparse) for sparse in (False, True))
    assert {type(product) for _, product in by_events.products()} == {IntegerProduct}
    assert all(product.break_even == 0 for _, product in densely.products())
    assert any(product.has_events and product.break_even == 1 for _, product in by_events.products())
    found = first(densely(x))
    assert torch.equal(found, first(by_events(x))) and found.std() > 0


@pytest.mark.parametrize("name", [*GOLDEN[:1], *GOLDEN[2:4], *GOLDEN[5:]])
@torch.no_grad()
def test_mixers_take_packed_spikes(named_golden, name, monkeypatch):
    """Their own forward, on unpacked spikes, is not called, and would give the same bits."""
    golden = named_golden(name)
    fast, x = optimize_for_inference(golden.model(), torch.int8), golden.tensors["input"]
    with monkeypatch.context() as unpacked:
        unpacked.setattr(events, "_packs", lambda mixer, parts: False)
        expected = first(fast(x))
    for mixer in (MaskMixer, LinearSpikeMixer, QKMixer):
        monkeypatch.setattr(mixer, "forward", lambda self, *spikes: pytest.fail("unpacked"))
    assert torch.equal(first(fast(x)), expected) and expected.std() > 0


@torch.no_grad()
def test_a_still_image_is_pooled_once(named_golden, monkeypatch):
    golden, pooled = named_golden("qkformer_imagenet_64"), []
    fast, images = optimize_for_inference(golden.model(), torch.int8), golden.tensors["input"]
    pool = forms.real_pool
    monkeypatch.setattr(forms, "real_pool", lambda x, **into: pooled.append(len(x)) or pool(x, **into))
    found = fast(images)
    assert images.ndim == 4 and pooled[0] == 1 and found.std() > 0
    steps = images.unsqueeze(1).expand(-1, golden.model().time_steps, -1, -1, -1).clone()
    pooled.clear()
    assert torch.equal(fast(steps), found) and pooled[0] == steps.shape[1] > 1


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["spikformer_cifar_32", "qkformer_cifar_32", "qkformer_imagenet_64"])
@torch.no_grad()
def test_sums_of_spikes_meet_whole_numbers_too(named_golden, name, sparse):
    """Shortcuts between spikes make counts: their products run in integers, and only the image meets real weights."""
    golden = named_golden(name)
    fast = optimize_for_inference(golden.model(), torch.int8, sparse=sparse)
    largest, planes = {}, {}

    def note(product, given):
        largest[product] = max(largest.get(product, 0), int(given[0].unpack().max()))
        planes[product] = given[0].planes

    for _, product in fast.products():
        product.register_forward_pre_hook(note)
    fast(golden.tensors["input"])
    assert max(largest.values()) >= 2 and max(planes.values()) > 2
    assert all(planes[product] == product.planes for product in planes)
    plain = optimize_for_inference(golden.model(), sparse=True)
    meet_reals, meet_counts = (sum(isinstance(form, REALS) for form in one.modules()) for one in (fast, plain))
    assert meet_reals == 1 < meet_counts, "in float32 counts keep the roundings of the network's own product"


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_exact_answers_do_not_depend_on_the_batch_the_threads_or_the_way(named_golden, name):
    golden = named_golden(name)
    model, x = golden.model(), golden.tensors["input"]
    x = torch.cat([x, x.flip(-1), 1 - x])[:3]
    found = check_one_answer(model, x, batches=(3, 2, 1))
    torch.testing.assert_close(found, first(model(x)), rtol=0, atol=1e-4)


def check_one_answer(model: nn.Module, x: Tensor, batches: tuple[int, ...]) -> Tensor:
    """Two ways, some batch sizes, one thread and two: the same bits."""
    expected, before = None, torch.get_num_threads()
    for sparse in (False, True):
        fast = optimize_for_inference(model, sparse=sparse, exact=True)
        for batch, threads in zip((*batches, batches[-1]), itertools.cycle((1, 2)), strict=False):
            torch.set_num_threads(threads)
            try:
                parts = [first(fast(part)) for part in x.split(batch)]
            finally:
                torch.set_num_threads(before)
            # Logits of each step come as [T, B, classes].
            found = torch.cat(parts, dim=1 if parts[0].ndim == 3 else 0)
            expected = found if expected is None else expected
            assert torch.equal(found, expected), (sparse, batch, threads)
    assert expected is not None and expected.std() > 0
    return expected


@pytest.mark.slow
@torch.no_grad()
def test_exact_answers_of_a_wide_network():
    torch.manual_seed(0)
    model = create_model("sdt_8_384")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.normal_(module.bias, 0.3, 0.2)
    images = torch.rand(4, 3, 96, 96)
    model.train()(images)
    rates = firing_rates(model.eval(), images[:1])
    assert sum(rate.mean > 0.01 for rate in rates.layers.values()) > len(rates.layers) / 2
    check_one_answer(model, images, batches=(4, 3, 1))


@torch.no_grad()
def test_a_folder_holds_a_quarter_and_gives_the_same_bits(firing_model):
    x = torch.rand(2, 3, 32, 32)
    model = firing_model(x, dim=128, num_heads=4)
    fast = optimize_for_inference(model, torch.int8)
    expected = fast(x)
    file, whole = (save({k: v.contiguous() for k, v in one.state_dict().items()}) for one in (fast, model))
    assert len(file) < 0.29 * len(whole)
    for sparse in (False, True):
        other = optimize_for_inference(firing_model(dim=128, num_heads=4), torch.int8, sparse=sparse)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(load(file))
        assert torch.equal(other(x), expected)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    assert torch.equal(copy.deepcopy(fast)(x), expected)


@torch.no_grad()
def test_auto_chooses_between_ways_that_give_the_same_bits(firing_model, monkeypatch, tmp_path):
    store = Timings(tmp_path / "costs.json")
    monkeypatch.setattr(choice, "timings", lambda: store)
    x = torch.rand(2, 3, 32, 32)
    model = firing_model(x)
    expected = optimize_for_inference(model, torch.int8)(x)
    fast = optimize_for_inference(model, torch.int8, sparse="auto", calibrate=[x])
    assert torch.equal(fast(x), expected)
    layers = fast.calibration.layers
    assert len(layers) == len(list(fast.products())) and all(0 < layer.rate < 1 for layer in layers)
    assert "int8 spikes" in store.path.read_text()
    chosen = {name: product.break_even for name, product in fast.products()}
    wanted = {layer.name: layer.break_even for layer in layers}
    assert chosen == (wanted if fast.calibration.event_driven else dict.fromkeys(wanted, 0.0))


@torch.no_grad()
def test_products_that_events_cannot_compute_are_dense(named_golden, monkeypatch):
    golden = named_golden("sdtv2_grads_T2_64")
    fast = optimize_for_inference(golden.model(), torch.int8, sparse=True)
    strided = [product for _, product in fast.products() if not product.has_events]
    assert strided and any(product.windows.stride == (2, 2) for product in strided)
    for product in strided:
        monkeypatch.setattr(product, "events", lambda *_, **__: pytest.fail("by events"))
    fast(golden.tensors["input"])


@torch.no_grad()
def test_networks_of_odd_sizes_and_many_steps(firing_model):
    for options, shape in (
        ({"in_channels": 1, "dim": 40, "num_heads": 4, "time_steps": 64, "depth": 1}, (1, 1, 1, 1)),
        ({"neuron": partial(LIF, reset="subtract", tau=3.0, strict=True), "pooling": "1111"}, (2, 3, 33, 50)),
        ({"event_pooling": True, "in_channels": 2, "per_step": True}, (2, 5, 2, 24, 20)),
    ):
        x = torch.rand(shape)
        model = firing_model(**options)
        for dtype in (torch.int8, torch.float32):
            ways = [optimize_for_inference(model, dtype, sparse=sparse, exact=True) for sparse in (False, True)]
            found, again = (way(x) for way in ways)
            assert torch.equal(found, again) and found.std() > 0
        torch.testing.assert_close(found, model(x), atol=1e-4, rtol=1e-4)


def test_the_ordered_mean():
    x = torch.randn(3, 7, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ordered_mean(x, (1, 2)), x.double().mean((1, 2)).float(), rtol=0, atol=1e-6)
    assert torch.equal(ordered_mean(x, [-1]), ((x[..., 0] + x[..., 2]) + (x[..., 1] + x[..., 3])) / 4)


class Softened(nn.Module):
    """A network with a sum whose order a library chooses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.soft = model, nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.soft(self.model(x))


def test_errors_at_the_door(firing_model):
    model = firing_model()
    with pytest.raises(ValueError, match="float32 or int8"):
        optimize_for_inference(model, torch.bfloat16, sparse=True)
    with pytest.raises(ValueError, match=r"exact=True .* torch\.bfloat16"):
        optimize_for_inference(model, torch.bfloat16, exact=True)
    with pytest.raises(ValueError, match="paths='linear'"):
        optimize_for_inference(model, torch.int8, paths="linear")
    with pytest.raises(ValueError, match=r"got torch\.uint8"):
        optimize_for_inference(model, torch.uint8)
    with pytest.raises(ValueError, match="at least one batch"):
        optimize_for_inference(model, torch.int8, sparse="auto")
    with pytest.raises(ValueError, match="float64 on cpu"):
        optimize_for_inference(copy.deepcopy(model).double(), torch.int8)
    with pytest.raises(ValueError, match=r"fixed order.*soft \(Softmax\); leave exact out"):
        optimize_for_inference(Softened(model), exact=True)
    assert isinstance(optimize_for_inference(Softened(model), torch.int8), Events)
    with pytest.raises(RuntimeError, match="only evaluates"):
        optimize_for_inference(model, torch.int8).train()
