"""The event-driven transformer against the model it was made from, and the golden files."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import sdt_blocks
from sdt_blocks import SpikingMLP, calibrate_norms, optimize_for_inference
from sdt_blocks.blocks import ConvNorm
from sdt_blocks.inference import EventProduct, Events, choice, forms, plan
from sdt_blocks.inference.choice import ProductCosts
from sdt_blocks.inference.timings import Timings
from sdt_blocks.neuron import LIF, IntegerNeuron
from sdt_blocks.ops.packed import Epilogue, spike_neuron
from sdt_blocks.steps import fire, project, shortcut


@pytest.mark.parametrize("dense", [False, True])
def test_golden_logits(golden, dense):
    fast = Events(plan(golden.model()))
    for _, product in fast.products():
        product.break_even = 0.0 if dense else 1.0
    torch.testing.assert_close(fast(golden.tensors["input"]), golden.tensors["logits_eval"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"neuron": "plif", "mlp_ratio": 1},
        {"depth": 0},
        {"dim": 48, "num_heads": 4, "mlp_ratio": 2.5, "pooling": "1010", "time_steps": 1},
        {"event_pooling": True, "in_channels": 2, "per_step": True},
        {
            "neuron": lambda threshold: LIF(tau=1.5, threshold=threshold, reset="subtract", strict=True),
            "num_classes": 0,
        },
        {"neuron": lambda threshold: LIF(tau=3.0, threshold=threshold, reset="none"), "time_steps": 7},
    ],
)
def test_answers_are_those_of_the_model(firing_model, options):
    channels = options.get("in_channels", 3)
    x = torch.rand(3, 5, channels, 24, 20) if channels == 2 else torch.rand(3, channels, 24, 20)
    model = firing_model(x, **options)
    before = copy.deepcopy(model.state_dict())
    fast = Events(plan(model))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_norms_are_rounded_as_in_the_model():
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(96).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        tensor.normal_(generator=generator)
    norm.running_var.uniform_(0.01, 2, generator=generator)
    x = torch.randn(2, 1, 6, 6, 96, generator=generator)
    found, _ = spike_neuron(x, forms.epilogue_of(norm, None, channels=96), 2, membrane=True)
    assert torch.equal(found, norm(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1).view_as(x))


def test_an_image_is_answered_alike_in_any_batch(firing_model):
    x = torch.rand(5, 3, 32, 32)
    fast = Events(plan(firing_model(x)))
    whole = fast(x)
    assert torch.equal(torch.cat([fast(image[None]) for image in x]), whole)


def test_a_layer_too_dense_for_events_is_convolved(firing_model, monkeypatch):
    x = torch.rand(2, 3, 32, 32)
    fast = Events(plan(firing_model(x)))
    expected = fast(x)
    rates = {}
    for name, product in fast.products():
        product.register_forward_hook(lambda _, given, __, name=name: rates.update({name: given[0].rate()}))
    fast(x)
    convolved = []
    for name, product in fast.products():
        product.break_even = 0.1
        dense = product.dense
        monkeypatch.setattr(product, "dense", lambda *a, n=name, d=dense, **k: (convolved.append(n), d(*a, **k))[1])
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5)
    assert set(convolved) == {name for name, rate in rates.items() if rate > 0.1} and convolved


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("levels", "norm"), [(1, 1.0), (1, 2.0), (3, 2.0)])
def test_levels_are_divided_by_their_norm(levels, norm, dense):
    def neuron(threshold):
        return IntegerNeuron(levels=levels, norm=norm, threshold=threshold)

    model, x = (
        nn.Sequential(SpikingMLP(8, neuron=neuron), SpikingMLP(8, neuron=neuron)).eval(),
        torch.rand(2, 2, 8, 4, 4),
    )
    fast = Events(plan(calibrated(model, x)))
    for _, product in fast.products():
        product.break_even = 0.0 if dense else 1.0
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)


def calibrated(model, x):
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias, 0.5, 1.0)
    calibrate_norms(model, x)
    return model


def test_hundreds_of_images_get_the_same_class(firing_model):
    x = torch.rand(300, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    model = firing_model(x[:32])
    fast = Events(plan(model))
    with torch.no_grad():
        assert torch.equal(fast(x).argmax(1), model(x).argmax(1))


@pytest.mark.parametrize("golden", ["sdt_lif_static_64", "sdt_plif_static_32"], indirect=True)
@torch.no_grad()
def test_a_thousand_images_get_the_class_that_golden_weights_give(golden):
    model, size = golden.model(), golden.tensors["input"].shape[-1]
    generator = torch.Generator().manual_seed(1)
    # Patterns of every contrast: plain noise would give all images one class.
    patterns = nn.functional.interpolate(torch.randn(1000, 3, 4, 4, generator=generator), size, mode="bilinear")
    images = patterns * torch.rand(1000, 1, 1, 1, generator=generator) * 4
    found, expected = Events(plan(model))(images), model(images)
    assert len(expected.argmax(1).unique()) > 1
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert ((found - expected).abs().amax(1) <= 1e-4).float().mean() >= 0.99


@pytest.mark.slow
def test_a_trained_model_gives_the_same_classes_and_logits():
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = sdt_blocks.SpikeDrivenTransformer(depth=1, dim=32, in_channels=1, num_classes=10, pooling="0001")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(10):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    fast = Events(plan(model.eval()))
    with torch.no_grad():
        found, expected = fast(x), model(x)
    assert (expected.argmax(1) == y).float().mean() > 0.8
    assert torch.equal(found.argmax(1), expected.argmax(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_auto_returns_the_faster_model_and_says_why(firing_model, costs_file):
    x = torch.rand(2, 3, 32, 32)
    model = firing_model(x)
    fast = sdt_blocks.optimize_for_inference(model, sparse="auto", calibrate=[(x, torch.zeros(2)), x])
    calibration = fast.calibration
    assert isinstance(fast, Events) == calibration.event_driven
    assert calibration.event_driven == (calibration.event_driven_seconds <= 0.98 * calibration.dense_seconds)
    rates = {}
    reference = Events(plan(model))
    for name, product in reference.products():
        product.register_forward_pre_hook(lambda _, given, name=name: rates.update({name: given[0].rate()}))
    reference(x)
    assert {layer.name: layer.rate for layer in calibration.layers} == pytest.approx(rates)
    assert all(0 <= layer.break_even <= 1 for layer in calibration.layers)
    *table, choice, costs = str(calibration).splitlines()
    assert len(table) == 1 + len(rates) and all(name in line for name, line in zip(rates, table[1:], strict=True))
    assert f"chosen: {'event-driven' if calibration.event_driven else 'dense'}" in choice
    assert str(costs_file) in costs
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-4)


def test_costs_are_measured_once_a_machine(costs_file, monkeypatch):
    product, places = EventProduct(torch.rand(40, 24, 3, 3), Epilogue(40)), (2, 3, 4, 5)
    costs = ProductCosts.of(places, product)
    assert min(costs) > 0
    (name,) = json.loads(costs_file.read_text())
    assert name.endswith(", membranes 2x3x4x5 24x1->40 3x3")
    other = ProductCosts(0.1, 0.2, 0.3)
    monkeypatch.setattr(ProductCosts, "measure", lambda *given: other)
    monkeypatch.setattr(choice, "timings", partial(Timings, costs_file))
    assert ProductCosts.of(places, product) == costs
    costs_file.write_text("{")
    assert ProductCosts.of(places, product) == other
    assert list(json.loads(costs_file.read_text())) == [name]


def test_break_even_is_where_both_ways_take_as_long():
    costs = ProductCosts(silent=1.0, firing=3.0, dense=4.0)
    assert costs.break_even() == pytest.approx(0.3)
    assert [costs._replace(dense=dense).break_even() for dense in (0.5, 99.0)] == [0, 1]
    # Where additions cannot be told from none, the silent input decides.
    assert [ProductCosts(1.0, 0.9, dense).break_even() for dense in (0.95, 1.05)] == [0, 1]


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_costs_that_mislead_do_not_keep_auto_from_the_faster_form(firing_model, costs_file, monkeypatch, limit):
    x = torch.rand(2, 3, 32, 32)
    model = firing_model(x)
    monkeypatch.setattr(ProductCosts, "break_even", lambda costs: limit)
    # Seconds of the form by layer, of all by events, and of the dense one.
    monkeypatch.setattr(choice, "_in_turn", lambda ways, rounds, seconds=0.0: [3.0, 1.0, 2.0][: len(ways)])
    fast = sdt_blocks.optimize_for_inference(model, sparse="auto", calibrate=x)
    assert isinstance(fast, Events) and fast.calibration.event_driven_seconds == 1.0
    assert {product.break_even for _, product in fast.products()} == {1.0}
    assert {layer.break_even for layer in fast.calibration.layers} == {1.0}


def test_sparse_arguments_are_checked(firing_model):
    model = firing_model(torch.rand(2, 3, 16, 16))
    assert isinstance(sdt_blocks.optimize_for_inference(model, sparse=True), Events)
    with pytest.raises(ValueError, match="sparse must be"):
        sdt_blocks.optimize_for_inference(model, sparse="sometimes")
    with pytest.raises(ValueError, match="float32"):
        sdt_blocks.optimize_for_inference(model, torch.bfloat16, sparse=True)
    with pytest.raises(ValueError, match="at least one batch"):
        sdt_blocks.optimize_for_inference(model, sparse="auto")
    for sparse in (True, False):
        with pytest.raises(ValueError, match=f"calibrate .* leave it out for sparse={sparse}"):
            sdt_blocks.optimize_for_inference(model, sparse=sparse, calibrate=[torch.rand(1, 3, 16, 16)])
    with pytest.raises(TypeError, match="a batch must be a tensor or a tuple that starts with one, got str"):
        sdt_blocks.optimize_for_inference(model, sparse="auto", calibrate=["a"])
    with pytest.warns(UserWarning, match="float64"):
        fast = sdt_blocks.optimize_for_inference(
            copy.deepcopy(model).double(), sparse="auto", calibrate=[torch.rand(1, 3, 16, 16)]
        )
    assert not isinstance(fast, Events)


@pytest.fixture
def costs_file(tmp_path, monkeypatch):
    """Where this test's costs are kept."""
    store = Timings(tmp_path / "costs.json")
    monkeypatch.setattr(choice, "timings", lambda: store)
    return store.path


class Doubled(sdt_blocks.SpikeDrivenBlock):
    """A block of one's own that steps describe."""

    def forward(self, membrane):
        return super().forward(membrane) * 2


class Branching(nn.Module):
    """A part whose forward nobody can trace."""

    def forward(self, membrane):
        return membrane + 0.1 if membrane.mean() > -1 else membrane


class Scaled(sdt_blocks.LIF):
    """A neuron of one's own, which emits other values than 0 and 1."""

    def forward(self, x, membrane=None, **options):
        return 1.5 * super().forward(x, membrane, **options)


def foreign_parts(model):
    model.blocks[0] = nn.Sequential(Doubled(32), Branching())
    model.blocks[1].attention.branch.k_neuron = Scaled()
    model.blocks[1].mlp.branch.fc1 = nn.Conv2d(32, 128, 1)
    model.blocks[1].mlp.branch.fc2 = sdt_blocks.blocks.ConvNorm(128, 32, 5, groups=4)
    return model.eval()


def test_foreign_parts_run_as_they_are_and_the_rest_by_events(firing_model):
    x = torch.rand(3, 3, 16, 16)
    model = foreign_parts(firing_model(x))
    with pytest.warns(UserWarning, match=r"blocks.0.1 \(symbolically traced"):
        fast = Events(plan(model))
    names = [name for name, _ in fast.products()]
    assert "blocks.0.0.mlp.branch.fc1" in names and "blocks.1.mlp.branch.fc1" in names
    assert "blocks.1.mlp.branch.fc2" not in names  # five by five, in groups
    with torch.no_grad():
        expected = model(x)
        assert expected.std() > 0.01
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5)


def test_errors_at_the_door(firing_model):
    model = firing_model(torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match="float64 on cpu"):
        Events(plan(copy.deepcopy(model).double()))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        Events(plan(model))(torch.rand(2, 1, 16, 16))
    with pytest.raises(RuntimeError, match="only evaluates"):
        Events(plan(model)).train()


class ReadBetween(nn.Module):
    """A shortcut that is read once more between a product and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = ConvNorm(2, 8, 3), ConvNorm(8, 8, 1), nn.Linear(8, 2)
        self.neurons = nn.ModuleList(LIF(threshold=0.3) for _ in range(2))

    def forward(self, x):
        membrane = project(self.first, x)
        change = project(self.second, fire(self.neurons[0], membrane))
        means = membrane.mean((-2, -1))
        total = shortcut(membrane, change)
        return self.head(fire(self.neurons[1], total).mean((-2, -1)) + means) + total.mean()


@pytest.mark.parametrize("options", [{"sparse": True}, {"dtype": torch.int8}])
@torch.no_grad()
def test_a_sum_does_not_overwrite_a_shortcut_that_is_still_read(options):
    model, x = ReadBetween(), torch.rand(3, 2, 2, 6, 6)
    nn.init.normal_(model.first.norm.bias, 0.3)
    calibrate_norms(model, [x])
    if "dtype" in options:  # whole numbers of 8 bits hold these weights
        model.second.conv.weight.copy_(model.second.conv.weight.sign() * 127)
        model.second.conv.weight[:, 0] = 127
    expected = model.eval()(x)
    torch.testing.assert_close(optimize_for_inference(model, **options)(x), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.01
