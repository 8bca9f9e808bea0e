"""optimize_for_inference: the answers of the model it was made from, for every V1 setting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sdt_blocks
from sdt_blocks import LIF, ParametricLIF, SpikeDrivenTransformer, SpikingMLP, optimize_for_inference
from sdt_blocks.inference import dense, product
from sdt_blocks.inference.timings import Timings

MakeModel = Callable[..., SpikeDrivenTransformer]


def differing(found: Tensor, expected: Tensor) -> float:
    """Share of samples whose logits are further apart than rounding explains: a spike there fell on the other side."""
    apart = (found - expected).abs().amax(-1) > 1e-3 * max(1.0, expected.abs().max().item())
    return apart.float().mean().item()


@torch.no_grad()
def test_golden_logits(golden) -> None:
    logits = optimize_for_inference(golden.model(), compile=False)(golden.tensors["input"])
    torch.testing.assert_close(logits, golden.tensors["logits_eval"], atol=1e-3, rtol=0)


@torch.no_grad()
def test_random_images_with_golden_weights(static_golden) -> None:
    model = static_golden.model()
    images = torch.rand(1000, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found, expected = optimize_for_inference(model, compile=False)(images), model(images)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.999
    assert differing(found, expected) <= 0.02


SETTINGS = {
    "images": ({}, (3, 3, 16, 16)),
    "one step": ({"time_steps": 1}, (2, 3, 16, 16)),
    "not square, odd": ({"pooling": "1111"}, (2, 3, 50, 31)),
    "learned tau": ({"neuron": "plif"}, (3, 3, 16, 16)),
    "learned tau a channel": ({"neuron": lambda channels, **o: ParametricLIF(channels=channels, **o)}, (3, 3, 16, 16)),
    "gray": ({"in_channels": 1, "pooling": "0111"}, (2, 1, 28, 28)),
    "gray, pooled at once": ({"in_channels": 1, "pooling": "1101"}, (2, 1, 28, 28)),
    "gray, one step": ({"in_channels": 1, "pooling": "0111", "time_steps": 1}, (2, 1, 28, 28)),
    "frames": ({"in_channels": 2, "pooling": "0111"}, (2, 5, 2, 32, 32)),
    "one frame": ({"in_channels": 2}, (2, 1, 2, 16, 16)),
    "event pooling": ({"event_pooling": True, "num_heads": 4, "in_channels": 2}, (2, 3, 2, 16, 16)),
    "per step": ({"per_step": True}, (2, 3, 16, 16)),
    "no head": ({"num_classes": 0}, (2, 3, 16, 16)),
    "no blocks": ({"depth": 0}, (2, 3, 16, 16)),
    "hidden width of dim": ({"mlp_ratio": 1, "depth": 2}, (2, 3, 16, 16)),
    "no pooling": ({"pooling": "0000"}, (1, 3, 8, 8)),
    "reset by subtraction": ({"neuron": partial(LIF, reset="subtract", tau=3.0)}, (2, 3, 16, 16)),
    "fires above the threshold": ({"neuron": partial(LIF, strict=True)}, (2, 3, 16, 16)),
}


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_every_setting_answers_as_the_model(firing_model: MakeModel, setting: str, compile: bool) -> None:
    options, shape = SETTINGS[setting]
    model = firing_model(**options)
    x = torch.rand(shape)
    found, expected = optimize_for_inference(model, compile=compile)(x), model(x)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", ["convolution", "linear", "integers", "digits"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_path_computes_the_product(path: str, kernel: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 24, kernel, kernel) * torch.rand(40, 1, 1, 1).exp(), torch.randn(40)
    weight[3] = 0
    if path == "linear" and kernel == 3:
        with pytest.raises(ValueError, match="choose one of auto, convolution, integers"):
            product.Product(weight, bias, path=path)
        return
    layer = product.Product(weight, bias, path=path)
    spikes = (torch.rand(3, 7, 5, 24) < 0.3).to(layer.input_dtype(torch.Size((3, 7, 5, 24))))
    images = spikes.double().permute(0, 3, 1, 2)
    true = nn.functional.conv2d(images, weight.double(), bias.double(), padding=kernel // 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(spikes).double(), true, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["integers", "digits"])
def test_integers_are_as_exact_as_float32(path: str) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(64, 1536, 1, 1), torch.zeros(64)
    spikes = torch.rand(1, 16, 16, 1536) < 0.2
    true = spikes.double() @ weight.double().flatten(1).T
    layer = product.Product(weight, bias, path=path)
    found = layer(spikes.to(layer.input_dtype(spikes.shape)))
    # float32 as it is on every machine: added input by input. A library sums in blocks, whose size is the machine's.
    added = torch.zeros_like(true, dtype=torch.float32)
    for channel in range(1536):
        added += spikes[..., channel, None] * weight[:, channel, 0, 0]
    errors = [(sums.double() - true).square().mean().sqrt().item() for sums in (found, added)]
    assert errors[0] <= errors[1]


def test_integers_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for kernel in (1, 3):
        layer = product.Product(torch.randn(16, 8, kernel, kernel), torch.randn(16), path="integers")
        spikes = (torch.rand(5, 4, 4, 8) < 0.3).to(torch.uint8)
        whole = layer(spikes)
        monkeypatch.setattr(product, "_SLICE_BYTES", 4 * 16 * 16 * 2)
        assert torch.equal(layer(spikes), whole)
        monkeypatch.undo()


def test_the_fastest_path_is_found_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(product, "timings", lambda: Timings(tmp_path / "timings.json"))
    timed = []

    def seconds(self: product.Product, name: str, frames: Tensor) -> float:
        timed.append(name)
        return {"convolution": 3.0, "linear": 1.0, "integers": 2.0, "digits": 4.0}[name]

    monkeypatch.setattr(product.Product, "_seconds", seconds)
    layer = product.Product(torch.randn(8, 8, 1, 1), torch.zeros(8))
    shape = torch.Size((2, 4, 4, 8))
    assert layer.input_dtype(shape) == torch.float32 and layer._choose(shape) == "linear"
    layer(torch.zeros(shape))
    assert sorted(timed) == sorted(["convolution", "digits", "integers", "linear"] * product._ROUNDS)
    # Another process reads what this one has measured.
    assert product.Product(torch.randn(8, 8, 1, 1), torch.zeros(8))._choose(shape) == "linear"
    assert len(timed) == 4 * product._ROUNDS


def test_a_path_that_fails_or_errs_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Wrong(product.Convolution):
        def __call__(self, frames: Tensor) -> Tensor:
            return super().__call__(frames) * 1.01

    class Broken(product.Convolution):
        def __call__(self, frames: Tensor) -> Tensor:
            raise RuntimeError("no such kernel on this processor")

    monkeypatch.setattr(product, "timings", lambda: Timings(tmp_path / "timings.json"))
    monkeypatch.setattr(product, "PATHS", {"convolution": product.Convolution, "wrong": Wrong, "broken": Broken})
    monkeypatch.setattr(product.Product, "_seconds", lambda self, name, frames: float(name == "convolution"))
    layer = product.Product(torch.randn(8, 8, 1, 1), torch.zeros(8))
    assert layer._choose(torch.Size((2, 4, 4, 8))) == "convolution"


@torch.no_grad()
def test_the_model_stays_untouched(firing_model: MakeModel) -> None:
    model = firing_model().train()
    before = copy.deepcopy(model.state_dict())
    fast = optimize_for_inference(model, compile=False)
    fast(torch.rand(2, 3, 16, 16))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert fast(torch.rand(2, 3, 16, 16)).std() > 0.01


@torch.no_grad()
def test_batches_are_answered_image_by_image(firing_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = optimize_for_inference(firing_model(per_step=True), compile=False)
    images = torch.rand(5, 3, 16, 16)
    whole = fast(images)
    monkeypatch.setattr(dense, "_PASS_BYTES", 1)
    torch.testing.assert_close(fast(images), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blocks_of_other_makes_stay_as_they_are(firing_model: MakeModel) -> None:
    class Mixer(nn.Module):
        def forward(self, membrane: Tensor) -> Tensor:
            return membrane + 0.5 * LIF()(membrane).roll(1, -1)

    class OtherLIF(LIF):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    model = firing_model(depth=3)
    model.blocks[0] = Mixer()
    model.blocks[1].attention.branch.q_neuron = OtherLIF()
    model.blocks[2].mlp.branch.fc1.conv = nn.Sequential(model.blocks[2].mlp.branch.fc1.conv)
    x, frames = torch.rand(2, 3, 16, 16), torch.rand(2, 5, 3, 16, 16)
    for _ in range(2):
        fast = optimize_for_inference(model, compile=False)
        for given in (x, frames):
            expected = model(given)
            assert expected.std() > 0.01
            torch.testing.assert_close(fast(given), expected, atol=1e-4, rtol=1e-4)
        model.patch.neurons[0] = OtherLIF()


def test_errors_at_the_door(firing_model: MakeModel) -> None:
    with pytest.raises(TypeError, match="got type"):
        optimize_for_inference(SpikeDrivenTransformer)
    with pytest.raises(ValueError, match="paths must be"):
        optimize_for_inference(firing_model(), paths="fastest")
    with pytest.raises(ValueError, match=r"int8, got torch\.float16"):
        optimize_for_inference(firing_model(), torch.float16)
    fast = optimize_for_inference(firing_model(), compile=False)
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\]"):
        fast(torch.rand(2, 4, 16, 16))
    with pytest.raises(RuntimeError, match="only evaluates"):
        fast.train()
    assert fast.eval() is fast
    with pytest.raises(TypeError, match=r"x must be a tensor \[T, B, ...\], got str"):
        optimize_for_inference(SpikingMLP(8), compile=False)("image.png")


@torch.no_grad()
def test_bfloat16_answers_nearly_alike(static_golden) -> None:
    model = static_golden.model()
    images = torch.rand(200, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = optimize_for_inference(model, torch.bfloat16, compile=False)(images)
    assert found.dtype == torch.float32
    assert (found.argmax(1) == model(images).argmax(1)).float().mean() >= 0.95


@torch.no_grad()
def test_copies_and_state(static_golden) -> None:
    model, x = static_golden.model(), static_golden.tensors["input"]
    fast = optimize_for_inference(model, compile=False)
    expected = fast(x)
    assert torch.equal(copy.deepcopy(fast)(x), expected)
    other = optimize_for_inference(sdt_blocks.SpikeDrivenTransformer(**model.config), compile=False)
    other(x)
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), expected)
    for path in ("integers", "digits"):
        one, two = (
            optimize_for_inference(part, compile=False, paths=path) for part in (model, type(model)(**model.config))
        )
        two(x)
        two.load_state_dict(one.state_dict())
        assert torch.equal(two(x), one(x))


@torch.no_grad()
def test_inference_mode_and_gradients_outside(firing_model: MakeModel) -> None:
    fast = optimize_for_inference(firing_model(), compile=False)
    with torch.inference_mode():
        x = torch.rand(1, 3, 16, 16)
        logits = fast(x)
    assert not logits.is_inference() and not logits.requires_grad
    with torch.enable_grad():
        assert not fast(x.clone().requires_grad_()).requires_grad


@torch.no_grad()
def test_compiled_answers_as_uncompiled(golden) -> None:
    x = golden.tensors["input"]
    for dtype in (torch.float32, torch.bfloat16):
        found, expected = (optimize_for_inference(golden.model(), dtype, compile)(x) for compile in (True, False))
        assert torch.equal(found, expected)
    assert torch.equal(
        optimize_for_inference(golden.model())(x[:1]), optimize_for_inference(golden.model())(x)[..., :1, :]
    )
