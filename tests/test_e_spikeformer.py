"""E-SpikeFormer against the authors' code: both families, their neuron, variants and released files."""

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdt_blocks import (
    ESpikeFormer,
    ESpikeFormerLarge,
    calibrate_norms,
    create_model,
    load_model,
    load_released_checkpoint,
    optimize_for_inference,
    save_model,
)
from sdt_blocks.analysis import audit
from sdt_blocks.blocks import LinearSpikeMixer
from sdt_blocks.blocks.integer import LinearChain
from sdt_blocks.inference import Dense, choice, events
from sdt_blocks.inference.choice import ProductCosts
from sdt_blocks.inference.dense import Mixed
from sdt_blocks.inference.plan import FIRE
from sdt_blocks.models import e_spikeformer
from sdt_blocks.neuron import IntegerNeuron, integer
from sdt_blocks.ops import dense
from sdt_blocks.ops.packed import PackedSpikes
from sdt_blocks.steps import Unit

NAMES = ("sdtv3_base_64", "sdtv3_large_kd_64")
PUBLISHED = {
    "sdt_v3_3m": 2_702_048,
    "sdt_v3_5m": 5_105_608,
    "sdt_v3_10m": 10_023_112,
    "sdt_v3_19m": 18_987_504,
    "sdt_v3_19m_har_dvs": 18_740_004,
    "sdt_v3_6m_gesture": 5_604_315,
    "sdt_v3_83m": 82_502_952,
    "sdt_v3_171m": 170_971_714,
}
WITH_SECOND_HEAD = {"sdt_v3_83m": 83_015_952, "sdt_v3_171m": 171_740_714}
WITHOUT_EFFECT = re.compile(
    r"(downsamplings\.\d\.conv|conv[12]|fc[12])\.conv\.bias$|\.(q|k|v|proj)\.conv\.(norm1\.bias|norm2\.(weight|bias))$"
)
"""What stands right in front of a batch normalization, which undoes it."""
NEURONS = {
    r"downsample(1_2|[234])\.encode_(spike|lif)": lambda m: (
        f"downsamplings.{['1_2', '2', '3', '4'].index(m[1]) + 1}.neuron"
    ),
    r"ConvBlock([12]_[12])\.0\.Conv\.spike([123])": lambda m: f"{_block(m[1])}.0.branch.neurons.{int(m[2]) - 1}",
    r"ConvBlock([12]_[12])\.0\.spike([12])": lambda m: f"{_block(m[1])}.1.branch.neuron{m[2]}",
    r"ConvBlock([12]_[12])\.0\.neuron([12])": lambda m: f"{_block(m[1])}.branch.neuron{m[2]}",
    r"block([34])\.(\d)\.conv\.spike([123])": lambda m: f"stages.{m[1]}.{m[2]}.0.branch.neurons.{int(m[3]) - 1}",
    r"block([34])\.(\d)\.attn\.(\w+)_spike": lambda m: f"stages.{m[1]}.{m[2]}.1.branch.{_role(m[3])}",
    r"block([34])\.(\d)\.mlp\.fc([12])_spike": lambda m: f"stages.{m[1]}.{m[2]}.2.branch.neuron{m[3]}",
    r"block3\.(\d)\.attn\.(\w+)_lif": lambda m: f"stages.3.{m[1]}.attention.branch.{_role(m[2])}",
    r"block3\.(\d)\.mlp\.fc([12])_lif": lambda m: f"stages.3.{m[1]}.mlp.branch.neuron{m[2]}",
    r"spike": lambda m: "head_neuron",
    r"lif": lambda m: "distillation_neuron",
}


def _block(name):
    return "stages." + {"1_1": "0.0", "1_2": "1.0", "2_1": "2.0", "2_2": "2.1"}[name]


def _role(name):
    return {"head": "neuron", "attn": "mixer_neuron"}.get(name, f"{name}_neuron")


def our_name(released):
    (pattern,) = [pattern for pattern in NEURONS if re.fullmatch(pattern, released)]
    return NEURONS[pattern](re.fullmatch(pattern, released))


@pytest.fixture(params=NAMES)
def released(request, named_golden):
    """Each of the golden files in turn."""
    return named_golden(request.param)


# ---- the authors' code


@torch.no_grad()
def test_every_neuron_has_the_level(released):
    model, seen = released.model(), {}
    expected = released.group("hook")
    for theirs in expected:
        model.get_submodule(our_name(theirs)).register_forward_hook(
            lambda module, args, output, name=theirs: seen.__setitem__(name, output * module.norm)
        )
    torch.testing.assert_close(model(released.tensors["input"]), released.tensors["logits_eval"], atol=1e-6, rtol=0)
    assert seen.keys() == expected.keys() and len(seen) == sum(isinstance(m, IntegerNeuron) for m in model.modules())
    for name, levels in expected.items():
        assert torch.equal(seen[name].reshape(levels.shape), levels.float()), name
    assert sum(levels.max() == 4 for levels in expected.values()) > len(expected) / 2


@pytest.mark.parametrize("path", ["reference", "compiled", "triton"])
def test_training_step(released, path, monkeypatch, large_programs):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", path)
    model = released.model().train()
    logits = model(released.tensors["input"])
    target, two = released.tensors["target"], isinstance(logits, tuple)
    if two:
        logits, distilled = logits
        torch.testing.assert_close(distilled, released.tensors["logits_train_kd"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, released.tensors["logits_train"], atol=1e-5, rtol=0)
    loss = F.cross_entropy(logits, target)
    if two:
        loss = (loss + F.cross_entropy(distilled, released.tensors["teacher_logits"].argmax(1))) / 2
    assert abs(loss.item() - released.tensors["loss_train"].item()) < 1e-5
    loss.backward()
    released.check_step(model, WITHOUT_EFFECT)


@pytest.mark.cuda
def test_a_block_by_triton(released, monkeypatch):
    """The last block's kernels, in float64, on what comes to it from the golden images."""
    from sdt_blocks.ops.triton import levels as kernels

    launched, found = set(), []
    for name in ("levels", "levels_backward", "norm_levels", "norm_levels_backward"):
        of = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, of=of, name=name: (launched.add(name), of(*given))[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, given = released.model().double(), []
    model.stages[-1][-1].register_forward_pre_hook(lambda block, inputs: given.extend(inputs))
    model(released.tensors["input"][:2].double())
    for path in ("reference", "triton"):
        monkeypatch.setenv("SDT_BLOCKS_BACKEND", path)
        block = released.model().double().stages[-1][-1].train().to(device)
        leaf = given[0].detach().to(device).requires_grad_()
        out = block(leaf)
        (out * leaf.detach().cos()).sum().backward()
        found.append([out, leaf.grad, *(parameter.grad for parameter in block.parameters()), *block.buffers()])
    assert len(launched) == 4
    # What stands in front of a norm has no gradient but for rounding.
    least = 1e-9 * max(value.abs().max().item() for value in found[0])
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, atol=least, rtol=1e-9)
    assert sum(value.abs().max() > least for value in found[0]) > len(found[0]) / 2


@torch.no_grad()
@pytest.mark.parametrize("sparse", [False, True])
def test_folded(released, sparse):
    fast = optimize_for_inference(released.model(), compile=False, sparse=sparse)
    if not sparse:
        # q, k and v are one product, whose norms are in its weights.
        mixed = [form for form in fast.forms.values() if isinstance(form, Mixed)]
        assert len(mixed) == sum(released.config["depths"][3:]) and not any(
            isinstance(m, nn.BatchNorm2d) for m in fast.modules()
        )
    torch.testing.assert_close(fast(released.tensors["input"]), released.tensors["logits_eval"], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("way", ["asked for", "cheap events", "costly events", "dense is faster"])
def test_levels_run_by_events_or_densely(released, way, monkeypatch):
    """Every convolution that the kernels know adds the weights of D binary steps, or is dense where `sparse="auto"`
    finds that cheaper; either way the next levels are the same."""
    model, x = released.model(), released.tensors["input"]
    by_events, densely = ProductCosts(1e-9, 2e-9, 1.0), ProductCosts(1.0, 2.0, 1e-9)
    costs, seconds = {
        "cheap events": (by_events, [1.0, 1.0, 2.0]),
        "costly events": (densely, [1.0, 2.0, 2.0]),
        "dense is faster": (densely, [2.0, 2.0, 1.0]),
    }.get(way, (None, None))
    monkeypatch.setattr(ProductCosts, "of", lambda places, product: costs)
    monkeypatch.setattr(choice, "_in_turn", lambda ways, *rounds: [run() for run in ways] and seconds)
    how = {"sparse": True} if way == "asked for" else {"sparse": "auto", "calibrate": [x]}
    fast, seen, expected = optimize_for_inference(model, compile=False, **how), [], []
    neurons = [m for m in model.modules() if isinstance(m, IntegerNeuron)]
    hooks = [n.register_forward_hook(lambda n, given, values: expected.append(values * n.norm)) for n in neurons]
    model(x)
    for hook in hooks:
        hook.remove()
    fired, attended = integer.levels, events._fired

    def noted(x, spec):
        values = fired(x, spec)
        seen.append(values * spec.norm)
        return values

    def noted_of_attention(product, neuron, x):
        values = attended(product, neuron, x)
        seen.append(values.unpack() * neuron.norm)
        return values

    class Noted(dict):
        def __setitem__(self, node, value):
            super().__setitem__(node, value)
            if node.op == FIRE and isinstance(value, PackedSpikes):
                seen.append(value.unpack() * value.norm)

    monkeypatch.setattr(integer, "levels", noted)
    monkeypatch.setattr(dense, "levels", noted)
    monkeypatch.setattr(events, "_fired", noted_of_attention)
    computed = events.Events._computed
    monkeypatch.setattr(events.Events, "_computed", lambda self, values: computed(self, Noted(values)))
    torch.testing.assert_close(fast(x), released.tensors["logits_eval"], atol=1e-5, rtol=0)
    assert len(seen) == len(expected) == len(neurons)
    # The channels of frames are the third axis or the last one.
    orders = [[levels, levels.movedim(-1, 2)] if levels.ndim == 5 else [levels] for levels in seen]
    assert all(any(map(partial(torch.equal, of), order)) for of, order in zip(expected, orders, strict=True))
    assert sum(levels.max() > 1 for levels in seen) > len(seen) / 2
    if way == "dense is faster":
        assert isinstance(fast, Dense) and not fast.calibration.event_driven
        return
    kernels = [module.kernel() for module in model.modules() if isinstance(module, Unit)]
    known = [conv for conv in kernels if conv.groups == 1 and conv.stride == (1, 1) and conv.in_channels > 3]
    products = [product for _, product in fast.products()]
    assert len(products) == len(known) > 10 and {product.planes for product in products} == {4}
    if way != "asked for":
        layers = fast.calibration.layers
        assert {layer.break_even for layer in layers} == {1.0 if way == "cheap events" else 0.0}
        assert len(layers) == len(products) and all(0 < layer.rate < 1 for layer in layers)


@torch.no_grad()
def test_binary_steps_are_the_integer_model_in_float64(released):
    """Every weight that sees levels, whatever its stride and groups, adds up D binary steps before a neuron decides."""
    model, x = released.model().double(), released.tensors["input"].double()
    seen: list = []
    neurons = [m for m in model.modules() if isinstance(m, IntegerNeuron)]
    for neuron in neurons:
        neuron.register_forward_hook(lambda neuron, given, output: seen.append(neuron.level(*given)))
    logits = model(x)
    expected, seen[:] = list(seen), []
    unfolded = set()

    def in_steps(layer, given, output):
        levels = 4 * given[0]
        if not torch.equal(levels, levels.round().clamp(0, 4)):
            return output  # the image, or sums between the layers of one unit
        unfolded.add(layer)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        steps = ((levels > step).double() for step in range(4))
        added = sum(F.conv2d(step, layer.weight, None, *geometry) for step in steps) / 4
        return added if layer.bias is None else added + layer.bias.view(-1, 1, 1)

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for layer in convolutions:
        layer.register_forward_hook(in_steps)
    torch.testing.assert_close(model(x), logits, atol=1e-12, rtol=0)
    assert len(seen) == len(neurons) and all(torch.equal(*both) for both in zip(seen, expected, strict=True))
    inner = sum(isinstance(m, LinearChain) for m in model.modules())
    assert len(unfolded) == len(convolutions) - 1 - inner and sum(levels.max() > 1 for levels in seen) > len(seen) / 2


# ---- the neuron


def test_levels_and_gradients_by_hand():
    x = torch.tensor([-0.5, 0.0, 0.5, 1.5, 2.5, 3.5, 4.0, 4.2], requires_grad=True)
    for rounding, levels, gradient in (
        ("even", [0, 0, 0, 2, 2, 4, 4, 4], [0, 1, 1, 1, 1, 1, 1, 0]),
        ("up", [0, 0, 1, 2, 3, 4, 4, 4], [0, 0, 1, 1, 1, 1, 0, 0]),
    ):
        neuron = IntegerNeuron(levels=4, rounding=rounding)
        (found,) = torch.autograd.grad(neuron(x).sum(), x)
        assert (neuron(x) * 4).tolist() == levels and (found * 4).tolist() == gradient
        assert neuron.unfold(x).sum(0).tolist() == levels and neuron.unfold(x).unique().tolist() == [0, 1]
        # Integrate and fire, once all input is in: from half a threshold up, soft reset, nothing more comes.
        membrane, fired = x.detach() + 0.5, torch.zeros(8)
        for _ in range(4):
            spike = (membrane >= 1).float()
            membrane, fired = membrane - spike, fired + spike
        assert torch.equal(fired, neuron.level(x)) == (rounding == "up")
    for options, message in (
        ({"levels": 0}, "levels must be positive and finite, got 0"),
        ({"levels": 2.5}, "levels must be a whole number, got 2.5"),
        ({"levels": True}, "levels must be a number, got True"),
        ({"norm": 0.0}, "norm must be positive and finite, got 0.0"),
        ({"threshold": math.inf}, "threshold must be positive and finite, got inf"),
        ({"threshold": "1"}, "threshold must be a number, got '1'"),
        ({"rounding": "down"}, "rounding 'down' is unknown; choose one of even, up"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            IntegerNeuron(**options)


@torch.no_grad()
def test_a_product_of_levels_is_that_of_their_steps():
    """Exact in float64: a weight layer adds the rows of D binary steps, its bias once."""
    torch.manual_seed(0)
    neuron, layer = IntegerNeuron(levels=8), nn.Linear(32, 16).double()
    x = 8 * torch.rand(5, 32).double()
    steps = neuron.unfold(x)
    assert torch.equal(steps.sum(0), neuron.level(x)) and 0.2 < steps.mean() < 0.8
    added = sum(F.linear(step, layer.weight) for step in steps) / neuron.norm + layer.bias
    torch.testing.assert_close(added, layer(neuron(x)), atol=1e-14, rtol=0)


# ---- variants, sizes, files


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == PUBLISHED[name]
        if name in WITH_SECOND_HEAD:
            model = create_model(name, distillation=True)
            assert sum(p.numel() for p in model.parameters()) == WITH_SECOND_HEAD[name]
    assert [*e_spikeformer.BASE, *e_spikeformer.LARGE] == list(PUBLISHED)


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        ("sdt_v3_5m sdt_v3_10m sdt_v3_19m", {"num_heads": 8, "time_steps": 1, "levels": 4, "level_norm": None}),
        ("sdt_v3_19m_har_dvs", {"num_heads": 8, "time_steps": 8, "levels": 4, "level_norm": 1}),
        ("sdt_v3_83m sdt_v3_171m", {"num_heads": 8, "time_steps": 1, "levels": 4, "distillation": False}),
    ],
)
def test_published_settings_that_no_weight_shows(names, settings):
    for name in names.split():
        with torch.device("meta"):
            config = create_model(name).config
        assert {key: config[key] for key in settings} == settings, name


@torch.no_grad()
@pytest.mark.parametrize("outer", [False, True])
def test_a_linear_chain_is_one_convolution(outer):
    torch.manual_seed(0)
    unit = LinearChain(6, 9, outer=outer).double()
    x = torch.randn(4, 6, 5, 3).double()
    calibrate_norms(unit, x)
    for norm in (m for m in unit.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    torch.testing.assert_close(unit.norm(unit.eval().kernel()(x)), unit(x), atol=1e-12, rtol=0)


EVENTS = {"in_channels": 2, "layer_scale": True, "level_norm": 1}
SMALL = {
    "base": (ESpikeFormer, {"dims": (16, 16, 16, 24), "depths": (1, 1, 1, 1, 1)}),
    "events": (ESpikeFormer, {"dims": (16, 16, 16, 24), "depths": (1, 1, 1, 2, 0), **EVENTS}),
    "large": (ESpikeFormerLarge, {"dims": (16, 16, 24), "depths": (1, 1, 1, 2), "rep_conv": True, "levels": 8}),
}


@torch.no_grad()
@pytest.mark.parametrize("family", SMALL)
def test_any_size_and_frames(family, tmp_path):
    torch.manual_seed(0)
    kind, options = SMALL[family]
    model = kind(num_classes=5, **options)
    for name, parameter in model.named_parameters():
        if name.endswith(".scale"):
            nn.init.normal_(parameter)
    channels = model.in_channels
    calibrate_norms(model, torch.rand(4, channels, 48, 64))
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 1.0, 0.5)
    fast, events = (optimize_for_inference(model, compile=False, sparse=sparse) for sparse in (False, True))
    for shape in ((2, channels, 37, 51), (2, 3, channels, 20, 33)):
        x = torch.rand(shape)
        frames = x if x.ndim == 5 else x.unsqueeze(1)
        # Frames meet in the mean after the head alone.
        expected = torch.stack([model(frame) for frame in frames.unbind(1)]).mean(0)
        assert expected.shape == (2, 5) and expected.std() > 1e-3
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(x.flip(0)).flip(0), expected, atol=1e-5, rtol=1e-5)
        for made in (fast, events):
            torch.testing.assert_close(made(x), expected, atol=1e-4, rtol=1e-4)
    features = model.features(torch.rand(2, model.in_channels, 48, 64))
    for feature, info in zip(features, model.feature_info, strict=True):
        assert feature.shape == (2, info["num_chs"], 48 // info["reduction"], 64 // info["reduction"])
    save_model(model, tmp_path)
    x = torch.rand(2, channels, 37, 51)
    assert torch.equal(load_model(tmp_path)(x), model(x))


@torch.no_grad()
def test_the_models_of_events_by_the_base_family():
    """Factors of one are none, and levels that are not divided by 4 need weights a fourth as large: exact."""
    torch.manual_seed(0)
    options = {**SMALL["base"][1], "in_channels": 2, "num_classes": 5}
    base = ESpikeFormer(**options).double()
    for norm in (module for module in base.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias, 1.0, 0.5)
    x = torch.poisson(torch.full((2, 3, 2, 48, 48), 0.2)).double()
    calibrate_norms(base, x)
    events = ESpikeFormer(**{**options, **EVENTS}).double().eval()
    ones = {key: torch.ones_like(p) for key, p in events.named_parameters() if key.endswith(".scale")}
    assert len(ones) == 3 * 2
    events.load_state_dict(base.state_dict() | ones)
    _, *others = (module for module in events.modules() if isinstance(module, nn.Conv2d))
    for conv in others:
        conv.weight /= 4
    for mixer in (module for module in events.modules() if isinstance(module, LinearSpikeMixer)):
        mixer.scale /= 4**3
    expected = base.eval()(x)
    assert torch.equal(events(x), expected) and expected.std() > 1e-3
    assert audit(events, x).spike_driven
    for name, parameter in events.named_parameters():
        if name.endswith(".scale"):
            nn.init.zeros_(parameter)
    assert not torch.equal(events(x), expected)
    for name, norm in (("sdt_v3_19m_har_dvs", 1), ("sdt_v3_6m_gesture", 8)):
        with torch.device("meta"):
            *neurons, last = (m for m in create_model(name).modules() if isinstance(m, IntegerNeuron))
        assert {(neuron.levels, neuron.norm, neuron.rounding) for neuron in neurons} == {(4, norm, "even")}
        assert (last.levels, last.norm, last.rounding) == (4, 1, "even")


def test_levels_and_drop_path_reach_every_part():
    large = ESpikeFormerLarge(
        dims=(16, 16, 24), depths=(1, 1, 1, 3), levels=8, drop_path=0.2, distillation=True, num_classes=5
    )
    for model in (ESpikeFormer(dims=(16, 16, 16, 24), depths=(1, 1, 1, 1, 1), levels=8), large):
        assert {module.levels for module in model.modules() if isinstance(module, IntegerNeuron)} == {8}
    for part in ("attention", "mlp"):
        assert [getattr(block, part).drop_path for block in large.stages[3]] == pytest.approx([0, 0.1, 0.2])


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"dims must be 4 widths and depths 5 numbers of blocks, got \[16, 16, 16\]"):
        ESpikeFormer(dims=(16, 16, 16))
    with pytest.raises(ValueError, match=r"dims\[0\] must be a positive multiple of 2, got 15"):
        ESpikeFormerLarge(dims=(15, 16, 16))
    with pytest.raises(ValueError, match="distillation needs classes"):
        ESpikeFormerLarge(dims=(16, 16, 16), num_classes=0, distillation=True)
    with pytest.raises(ValueError, match="levels must be at least 1 and at most 1024, got 0"):
        ESpikeFormer(dims=(16, 16, 16, 16), levels=0)


@torch.no_grad()
def test_released_files(released, tmp_path):
    state, depths = released.group("state"), released.config["depths"]
    torch.save({"model": state, "epoch": 3, "args": {"time_steps": 3}}, tmp_path / "x.pth")
    model = load_released_checkpoint(tmp_path / "x.pth")
    assert [len(stage) for stage in model.stages] == depths and model.time_steps == 3
    torch.testing.assert_close(model(released.tensors["input"]), released.tensors["logits_eval"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_factors_of_the_models_of_events_are_read(named_golden, tmp_path):
    """The golden weights with the factors that the authors' event models have: of one, and one of them larger."""
    golden = named_golden(NAMES[0])
    state, x = golden.group("state"), golden.tensors["input"]
    for name, value in golden.group("state").items():
        if name.endswith("attn.proj_conv.1.weight"):
            state |= {f"{name.split('.attn')[0]}.layer_scale{i}": torch.ones_like(value) for i in (1, 2, 3)}
    torch.save({"model": state}, tmp_path / "x.pth")
    model = load_released_checkpoint(tmp_path / "x.pth")
    assert model.config["layer_scale"]
    torch.testing.assert_close(model(x), golden.tensors["logits_eval"], atol=1e-6, rtol=0)
    state["block3.0.layer_scale2"] += 1
    torch.save({"model": state}, tmp_path / "x.pth")
    model = load_released_checkpoint(tmp_path / "x.pth", level_norm=8)
    assert (model.stages[3][0][1].scale == 2).all() and model.stages[3][0][1].branch.neuron.norm == 8


@torch.no_grad()
@pytest.mark.parametrize("called", [True, False])
def test_rep_conv_is_read_unless_it_was_never_called(called, named_golden, tmp_path):
    """One released file has a norm of 1.5 times its convolution's outputs there, which nothing could run."""
    golden = named_golden(NAMES[1])
    state, x = golden.group("state"), golden.tensors["input"]
    dim, width = 48, 48 if called else 72
    for i in range(golden.config["depths"][3]):
        for layer in (1, 2):
            name, norm = f"block3.{i}.rep_conv.conv{layer}", width if layer == 1 else dim
            state[f"{name}.0.weight"] = torch.eye(dim).unsqueeze(-1)
            state |= {f"{name}.1.{key}": torch.zeros(norm) for key in ("weight", "bias", "running_mean")}
            state |= {f"{name}.1.running_var": torch.ones(norm), f"{name}.1.num_batches_tracked": torch.tensor(1)}
    torch.save({"model": state}, tmp_path / "x.pth")
    model = load_released_checkpoint(tmp_path / "x.pth")
    assert model.config["rep_conv"] is called
    # With norms that multiply by zero it adds nothing; with ones it does.
    torch.testing.assert_close(model(x), golden.tensors["logits_eval"], atol=1e-5, rtol=0)
    if called:
        model.stages[3][0].rep_conv.branch.unit.norm.bias += 1
        assert (model(x) - golden.tensors["logits_eval"]).abs().max() > 0.01
