import copy
import json
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sdt_blocks import LIF, ParametricLIF, SpikeDrivenTransformer, calibrate_norms, create_model, list_models
from sdt_blocks.analysis import firing_rates
from sdt_blocks.models.sdt import FAMILY
from sdt_blocks.surrogate import atan

PUBLISHED = {
    "sdt_8_384": 16_816_536,
    "sdt_10_384": 20_374_040,
    "sdt_6_512": 23_373_736,
    "sdt_8_512": 29_689_896,
    "sdt_10_512": 36_006_056,
    "sdt_8_768": 66_339_144,
}
TINY = {"depth": 1, "dim": 16, "num_heads": 2, "num_classes": 5, "pooling": "0011", "time_steps": 2}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones_less_the_unused(name, count):
    with torch.device("meta"):
        model = create_model(name)
    unused_talking_heads = 64 * len(model.blocks)
    assert sum(p.numel() for p in model.parameters()) == count - unused_talking_heads


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        ("sdt_8_384 sdt_10_384 sdt_6_512 sdt_8_512 sdt_10_512 sdt_8_768", {"pooling": "1111", "time_steps": 4}),
        ("sdt_2_256 sdt_2_512", {"pooling": "0011", "time_steps": 4, "event_pooling": False}),
        ("sdt_2_256_dvs", {"pooling": "0011", "time_steps": 16, "event_pooling": True, "num_heads": 8}),
        ("sdt_2_256_gesture", {"pooling": "0111", "time_steps": 16, "event_pooling": False}),
    ],
)
def test_published_settings_that_no_weight_shows(names, settings):
    for name in names.split():
        with torch.device("meta"):
            config = create_model(name).config
        assert {key: config[key] for key in settings} == settings, name


def test_names():
    assert list(FAMILY.variants) == [*PUBLISHED, "sdt_2_256", "sdt_2_512", "sdt_2_256_dvs", "sdt_2_256_gesture"]
    assert set(FAMILY.variants) < set(list_models())
    with pytest.raises(ValueError, match=r"'sdt_8_348' is unknown; did you mean .*sdt_8_384"):
        create_model("sdt_8_348")
    with pytest.raises(TypeError, match="unknown model option widht; the options are depth, dim"):
        create_model("sdt_8_384", widht=3)
    assert {"depth", "pooling", "neuron", "drop_path"} <= set(FAMILY.options)


@pytest.mark.parametrize("name", ["sdt_2_256", "sdt_2_256_dvs", "sdt_2_256_gesture"])
@torch.no_grad()
def test_small_variants_run(name):
    model = create_model(name, time_steps=2).eval()
    x = torch.rand(1, 3, 32, 32) if name == "sdt_2_256" else torch.rand(1, 3, 2, 32, 32)
    calibrate_norms(model, x)
    assert firing_rates(model, x)["blocks.0.mlp.branch.neuron1"].mean > 0
    assert model(x).shape == (1, model.num_classes)
    assert model.config["event_pooling"] == (name == "sdt_2_256_dvs")


def test_image_equals_its_repetition_and_event_frames_take_any_number_of_steps(firing_model):
    model = firing_model(**TINY)
    images = torch.rand(2, 3, 16, 20)
    assert model(images).std(0).all()
    torch.testing.assert_close(model(images), model(images.unsqueeze(1).expand(-1, 2, -1, -1, -1)))
    for steps in (1, 7):
        assert model(torch.rand(2, steps, 3, 16, 20)).shape == (2, 5)


def test_per_step_logits_average_to_the_mean(firing_model):
    x = torch.rand(2, 3, 16, 16)
    model = firing_model(**TINY, per_step=True)
    per_step = model(x)
    assert per_step.shape == (2, 2, 5) and per_step.std(0).any()
    model.per_step = False
    torch.testing.assert_close(model(x), per_step.mean(0))


def test_headless_and_features(firing_model):
    model = firing_model(**{**TINY, "num_classes": 0})
    x = torch.rand(2, 3, 16, 16)
    assert model(x).shape == (2, 16) and model(x).any() and model.forward_features(x).shape == (2, 2, 16, 4, 4)
    assert not [key for key in model.state_dict() if key.startswith("head.")]


def test_drop_path_grows_with_depth():
    model = SpikeDrivenTransformer(**{**TINY, "depth": 3}, drop_path=0.2)
    assert [block.attention.drop_path for block in model.blocks] == pytest.approx([0, 0.1, 0.2])


def test_deepcopy_pickle_and_neuron_factory(firing_model):
    model = firing_model(**TINY, neuron=partial(LIF, tau=1.5)).train()
    x = torch.rand(2, 3, 16, 16)
    model(x).sum().backward()
    model.eval()
    assert model(x).std(0).any()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    assert {m.tau for m in model.modules() if isinstance(m, LIF)} == {1.5}


def test_options_are_kept_as_plain_python():
    """NumPy's numbers are numbers; what a config holds, JSON can hold."""
    model = SpikeDrivenTransformer(
        **{**TINY, "dim": np.int64(16)}, mlp_ratio=np.float32(2.5), neuron=partial(LIF, tau=3.0, surrogate=atan(1.5))
    )
    assert type(model.config["dim"]) is int and model.config["mlp_ratio"] == 2.5
    assert model.config["neuron"] == {"name": "lif", "tau": 3.0, "surrogate": {"kind": "atan", "alpha": 1.5}}
    assert json.loads(json.dumps(model.config)) == model.config
    assert SpikeDrivenTransformer(**TINY, neuron=ParametricLIF).config["neuron"] == "plif"


def test_a_threshold_is_a_factor_of_the_layers_own():
    for neuron in ({"name": "lif", "threshold": 3.0}, partial(LIF, threshold=3.0), partial(_Mine, threshold=3.0)):
        model = SpikeDrivenTransformer(**TINY, neuron=neuron)
        assert model.head_neuron.threshold == 3 and model.blocks[0].attention.branch.mixer.neuron.threshold == 1.5


class _Mine(LIF):
    pass


def test_one_time_constant_a_channel():
    model = SpikeDrivenTransformer(**TINY, neuron={"name": "plif", "channels": True})
    assert model.head_neuron.w.shape == (16,) and model.blocks[0].mlp.branch.neuron2.w.shape == (64,)


def test_autocast_keeps_the_neuron_state_in_float32():
    model = SpikeDrivenTransformer(**TINY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.rand(2, 3, 16, 16))
    logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.eval().to(torch.bfloat16)(torch.rand(2, 3, 16, 16).bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": -1}, "depth must be at least 0 .*got -1"),
        ({"time_steps": 0}, "time_steps must be at least 1 .*got 0"),
        ({"dim": 24, "num_heads": 16}, "multiple of 16, got 24"),
        ({"neuron": "izhikevich"}, "'izhikevich' is unknown"),
        ({"neuron": {"name": "lif", "tau": 0.5}}, "tau must be at least 1"),
        ({"neuron": {"name": "lif", "taus": 2.0}}, "'lif' has no option taus; its options are tau, threshold"),
        ({"neuron": {"tau": 2.0}}, "neuron None is unknown"),
        ({"drop_path": 1.5}, "drop_path"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio must be finite"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be finite"),
        ({"num_classes": 10**40}, "num_classes must be .*a whole number of more than 30 digits"),
        ({"time_steps": 1.5}, r"time_steps must be a whole number, got 1.5"),
        ({"depth": True}, r"depth must be a whole number, got True \(bool\)"),
        ({"dim": "32"}, r"dim must be a whole number, got '32' \(str\)"),
        ({"in_channels": None}, r"in_channels must be a whole number, got None"),
        ({"per_step": "no"}, r"per_step must be True or False, got 'no'"),
        ({"event_pooling": 1}, r"event_pooling must be True or False, got 1"),
        ({"pooling": 1111}, r"pooling must be text, got 1111"),
        ({"neuron": 3}, r"neuron must be a name"),
        ({"neuron": partial(LIF, tau="2")}, r"tau must be a number"),
    ],
)
def test_impossible_models_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SpikeDrivenTransformer(**{**TINY, "depth": 2, **options})


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 1, 16, 16), (0, 3, 16, 16)])
def test_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\] or frames \[B, T, 3, H, W\]"):
        SpikeDrivenTransformer(**TINY)(torch.rand(shape))


def test_images_in_whole_numbers_are_refused():
    with pytest.raises(TypeError, match=r"in floating point, got torch.uint8: scale them"):
        SpikeDrivenTransformer(**TINY)(torch.ones(2, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("x", [[[1.0]], np.ones((1, 3, 16, 16)), None])
def test_what_is_no_tensor_is_refused(x):
    model = SpikeDrivenTransformer(**TINY)
    for module in (model, model.patch, model.blocks[0].mlp.branch, model.head_neuron):
        with pytest.raises(TypeError, match=rf"tensor.*got {type(x).__name__}"):
            module(x)


def test_learns_to_tell_two_patterns():
    """A handful of updates: the loss of bright against dark images falls to a fraction."""
    torch.manual_seed(0)
    model = SpikeDrivenTransformer(**{**TINY, "num_classes": 2, "in_channels": 1})
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(30):
        labels = torch.arange(16) % 2
        stripes = torch.arange(8).view(1, 1, 8, 1).expand(16, 1, 8, 8) % 2
        x = torch.where(labels.view(-1, 1, 1, 1) == 1, stripes, stripes.transpose(2, 3)).float() + 0.1 * torch.randn(
            16, 1, 8, 8
        )
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("neuron", ["lif", "plif"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 3, 33, 20), (2, 1, 2, 8, 40), (2, 3, 1, 16, 16)], ids=str)
@pytest.mark.parametrize("pooling", ["1111", "0110"])
def test_a_fused_training_step_is_that_of_the_equations(
    firing_model, monkeypatch, pooling, shape, channels_last, neuron
):
    """Loss, gradients and running statistics in float64, where no membrane is within rounding of its threshold."""
    x = torch.rand(shape)
    model = firing_model(x, dim=16, depth=1, in_channels=shape[-3], pooling=pooling, neuron=neuron).double().train()
    x = x.double()
    if channels_last:
        model.to(memory_format=torch.channels_last)
        x = x if x.ndim == 5 else x.contiguous(memory_format=torch.channels_last)
    other, results = copy.deepcopy(model), []
    for own, backend in ((model, "compiled"), (other, "reference")):
        monkeypatch.setenv("SDT_BLOCKS_BACKEND", backend)
        own(x).square().sum().backward()
        results.append({**{n: p.grad for n, p in own.named_parameters()}, **dict(own.named_buffers())})
    for name, theirs in results[1].items():
        if theirs is not None and theirs.numel():
            torch.testing.assert_close(
                results[0][name], theirs, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
