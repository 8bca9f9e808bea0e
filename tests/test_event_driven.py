"""The event-driven transformer against the model it was made from, and the golden files."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import sdt_blocks
from sdt_blocks.event_driven import EventDrivenTransformer
from sdt_blocks.neuron import LIF


@torch.no_grad()
def firing_model(x: torch.Tensor, **options) -> sdt_blocks.SpikeDrivenTransformer:
    """Random weights with norms fitted to x, so that every layer fires."""
    torch.manual_seed(0)
    model = sdt_blocks.SpikeDrivenTransformer(
        **{"num_classes": 10, "pooling": "0011", "depth": 2, "dim": 64, **options}
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.6, 1.4)
            nn.init.normal_(module.bias, 0.0, 0.3)
    model.train()(x)
    return model.eval()


@pytest.mark.parametrize("dense", [False, True])
def test_golden_logits(golden, dense):
    fast = EventDrivenTransformer(golden.model())
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
def test_answers_are_those_of_the_model(options):
    channels = options.get("in_channels", 3)
    x = torch.rand(3, 5, channels, 24, 20) if channels == 2 else torch.rand(3, channels, 24, 20)
    model = firing_model(x, **options)
    if options.get("neuron") == "plif":
        for name, parameter in model.named_parameters():
            if name.endswith(".w"):
                nn.init.normal_(parameter, 0, 0.5)
    before = copy.deepcopy(model.state_dict())
    fast = EventDrivenTransformer(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_image_is_answered_alike_in_any_batch():
    x = torch.rand(5, 3, 32, 32)
    fast = EventDrivenTransformer(firing_model(x))
    whole = fast(x)
    assert torch.equal(torch.cat([fast(image[None]) for image in x]), whole)


def test_a_layer_too_dense_for_events_is_convolved(monkeypatch):
    x = torch.rand(2, 3, 32, 32)
    fast = EventDrivenTransformer(firing_model(x))
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


def test_hundreds_of_images_get_the_same_class():
    x = torch.rand(300, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    model = firing_model(x[:32])
    fast = EventDrivenTransformer(model)
    with torch.no_grad():
        assert torch.equal(fast(x).argmax(1), model(x).argmax(1))


@pytest.mark.slow
def test_a_trained_model_gives_the_same_classes_and_logits():
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = sdt_blocks.SpikeDrivenTransformer(depth=1, dim=32, in_channels=1, num_classes=10, pooling="0001")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(5):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    fast = EventDrivenTransformer(model.eval())
    with torch.no_grad():
        found, expected = fast(x), model(x)
    assert (expected.argmax(1) == y).float().mean() > 0.8
    assert torch.equal(found.argmax(1), expected.argmax(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class OwnBlock(sdt_blocks.SpikeDrivenBlock):
    def forward(self, membrane):
        return super().forward(membrane) * 2


def test_other_models_are_refused():
    model = firing_model(torch.rand(2, 3, 16, 16))
    with pytest.raises(TypeError, match="got Linear"):
        EventDrivenTransformer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="float64 on cpu"):
        EventDrivenTransformer(copy.deepcopy(model).double())
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        EventDrivenTransformer(model)(torch.rand(2, 1, 16, 16))
    with pytest.raises(RuntimeError, match="only evaluates"):
        EventDrivenTransformer(model).train()
    model.blocks[1] = OwnBlock(64)
    with pytest.raises(TypeError, match=r"OwnBlock \(blocks.1\)"):
        EventDrivenTransformer(model)
