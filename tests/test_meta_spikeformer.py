"""Meta-SpikeFormer against the authors' code, its variants, its released files, any size and number of steps."""

import argparse
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdt_blocks import (
    LIF,
    LinearSpikeAttention,
    MetaSpikeFormer,
    ParametricLIF,
    calibrate_norms,
    convert_released_state_dict,
    create_model,
    load_model,
    load_released_checkpoint,
    optimize_for_inference,
    save_model,
)
from sdt_blocks.analysis import firing_rates
from sdt_blocks.inference.dense import Mixed
from sdt_blocks.models.meta_spikeformer import FAMILY
from sdt_blocks.steps import Unit, project

PUBLISHED = {
    "sdt_v2_15m": (15_112_208, 15_473_208),
    "sdt_v2_31m": (31_333_864, 31_814_864),
    "sdt_v2_55m": (55_350_248, 55_991_248),
    "sdt_v2_124m": (123_741_160, 124_702_160),
}
WITHOUT_EFFECT = re.compile(r"(downsamplings\.\d\.conv|fc[12])\.conv\.bias$|\.(q|k|v|proj)\.conv\.norm\.(weight|bias)$")
"""What stands right in front of a batch normalization, which undoes it."""
TINY = {"dims": (16, 16, 16, 24), "depths": (1, 1, 1, 1, 1), "num_classes": 5, "time_steps": 2}


def neuron_names():
    """The 77 neurons: released names and ours."""
    names = {f"downsample{name}.encode_lif": f"downsamplings.{i}.neuron" for i, name in enumerate(("1_2", 2, 3, 4), 1)}
    for theirs, ours in {"1_1": "0.0", "1_2": "1.0", "2_1": "2.0", "2_2": "2.1"}.items():
        for n in "12":
            names[f"ConvBlock{theirs}.0.Conv.lif{n}"] = f"stages.{ours}.separable.branch.neuron{n}"
            names[f"ConvBlock{theirs}.0.lif{n}"] = f"stages.{ours}.neuron{n}"
    attention = {"head": "neuron", "q": "q_neuron", "k": "k_neuron", "v": "v_neuron", "attn": "mixer_neuron"}
    for stage, depth in ((3, 6), (4, 2)):
        for i in range(depth):
            for theirs, ours in attention.items():
                names[f"block{stage}.{i}.attn.{theirs}_lif"] = f"stages.{stage}.{i}.attention.branch.{ours}"
            for n in "12":
                names[f"block{stage}.{i}.mlp.fc{n}_lif"] = f"stages.{stage}.{i}.mlp.branch.neuron{n}"
    return names | {"lif": "head_neuron"}


def alive(**options):
    """A small model in eval mode whose neurons all fire, and images for it."""
    torch.manual_seed(0)
    model = MetaSpikeFormer(**{**TINY, **options})
    images = torch.rand(2, model.in_channels, 40, 56)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            # Means over tokens, which the head sees, differ by channel alone.
            last = re.match(r"downsamplings\.4|stages\.4.*(proj|fc2)\.norm", name)
            nn.init.normal_(module.bias, *((0.5, 0.7) if last else (1.5, 0.3)))
    calibrate_norms(model, images)
    return model.eval(), images


# ---- the authors' code


@torch.no_grad()
def test_logits(v2_golden):
    logits = v2_golden.model()(v2_golden.tensors["input"])
    torch.testing.assert_close(logits, v2_golden.tensors["logits_eval"], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("path", ["reference", "compiled", "triton"])
def test_every_neuron_spikes_alike(v2_golden, path, monkeypatch, large_programs):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", path)
    model, seen = v2_golden.model(), {}
    for theirs, ours in neuron_names().items():
        model.get_submodule(ours).register_forward_hook(
            lambda module, args, output, name=theirs: seen.__setitem__(name, output)
        )
    model(v2_golden.tensors["input"])
    expected = v2_golden.group("hook")
    assert seen.keys() == expected.keys() and len(seen) == 77
    assert sum(isinstance(module, LIF) for module in model.modules()) == 77
    for name, spikes in expected.items():
        assert 0.2 < spikes.float().mean() < 0.8, name
        assert torch.equal(seen[name].reshape(spikes.shape), spikes.float()), name


@pytest.mark.parametrize("path", ["reference", "compiled", "triton", "observed"])
def test_training_step(v2_golden, path, monkeypatch, large_programs):
    """Every path is held to the released figures; with hooks the layers run one by one, without them fused."""
    model = v2_golden.model().train()
    if path == "observed":
        for module in model.modules():
            module.register_forward_hook(lambda *args: None)
    else:
        monkeypatch.setenv("SDT_BLOCKS_BACKEND", path)
    logits = model(v2_golden.tensors["input"])
    torch.testing.assert_close(logits, v2_golden.tensors["logits_train"], atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits, v2_golden.tensors["target"])
    assert abs(loss.item() - v2_golden.tensors["loss_train"].item()) < 1e-4
    loss.backward()

    expected = convert_released_state_dict(v2_golden.group("grad"))
    without_effect = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if WITHOUT_EFFECT.search(name):
            # Zero in theory, noise in fact.
            without_effect += 1
            assert parameter.grad.abs().max() < 1e-5 and expected[name].abs().max() < 1e-5, name
        else:
            error = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert error < 1e-3, (name, error)
    assert without_effect == 5 + 8 * (4 * 2 + 2)

    state = model.state_dict()
    for name, value in convert_released_state_dict(v2_golden.group("after_step")).items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-5, check_dtype=False, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("sparse", [False, True])
def test_folded_and_event_driven(v2_golden, sparse):
    fast = optimize_for_inference(v2_golden.model(), compile=False, sparse=sparse)
    torch.testing.assert_close(fast(v2_golden.tensors["input"]), v2_golden.tensors["logits_eval"], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("sparse", [False, True])
def test_inference_at_any_size_and_number_of_steps(sparse):
    model, _ = alive(distillation=True)
    fast = optimize_for_inference(model, compile=False, sparse=sparse)
    for shape in ((2, 3, 37, 51), (1, 1, 3, 20, 33), (2, 5, 3, 33, 20)):
        x = torch.rand(shape)
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_chains_side_by_side_are_the_attention():
    """q, k and v as one chain of three products, the last with a group each, exact in float64, borders included."""
    torch.manual_seed(0)
    model = MetaSpikeFormer(dims=(16, 16, 16, 24), depths=(0, 0, 1, 1, 1), num_classes=4, time_steps=2).double()
    images = torch.rand(2, 3, 40, 56).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias, 1.0, 0.5)
    calibrate_norms(model, images)
    fast = optimize_for_inference(model, torch.float64, paths="chain")
    mixers = [form.product for form in fast.forms.values() if isinstance(form, Mixed)]
    assert [product.paths for product in mixers] == [["chain"]] * 2
    assert [[part.geometry.groups for part in product.chain] for product in mixers] == [[1, 48, 3], [1, 72, 3]]
    expected = model.eval()(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(fast(images), expected, atol=1e-10, rtol=0)
    for attention in (model.stages[3][0].attention.branch, model.stages[4][0].attention.branch):
        spikes = (torch.rand(2, 2, attention.dim, 3, 4) < 0.3).double()
        parts = torch.cat([project(unit, spikes) for unit in (attention.q, attention.k, attention.v)], dim=2)
        product = mixers.pop(0)
        found = product(spikes.movedim(2, -1).flatten(0, 1).contiguous()).movedim(-1, 1).unflatten(0, (2, 2))
        torch.testing.assert_close(found, parts, atol=1e-10, rtol=0)


def test_a_small_training_step_on_every_path(same_on_every_path):
    model, _ = alive(dims=(8, 8, 8, 8), depths=(1, 0, 0, 1, 0))
    x = torch.rand(3, 3, 13, 18, generator=torch.Generator().manual_seed(1))
    same_on_every_path(model, x, torch.tensor([0, 1, 2]))


# ---- variants, sizes, heads


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        models = [create_model(name, distillation=distillation) for distillation in (False, True)]
    assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (" ".join(PUBLISHED), {"num_heads": 8, "time_steps": 4, "neuron": "lif", "distillation": False}),
    ],
)
def test_published_settings_that_no_weight_shows(names, settings):
    for name in names.split():
        with torch.device("meta"):
            config = create_model(name).config
        assert {key: config[key] for key in settings} == settings, name


def test_names_and_options():
    assert list(FAMILY.variants) == list(PUBLISHED)
    with pytest.raises(ValueError, match=r"'sdt_v2_15' is unknown; did you mean sdt_v2_15m"):
        create_model("sdt_v2_15")
    with pytest.raises(TypeError, match="unknown model option pooling; the options are dims, depths"):
        create_model("sdt_v2_15m", pooling="0011")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (16, 16, 16)}, r"dims must be four widths .* got \[16, 16, 16\]"),
        ({"dims": (15, 16, 16, 16)}, r"dims\[0\] must be a positive multiple of 2, got 15"),
        ({"dims": (16, 16, 20, 16)}, "must be a positive multiple of 8, got 20"),
        ({"dims": (16, 0, 16, 16)}, r"dims\[1\] must be at least 1 .*got 0"),
        ({"depths": (1, 1, 1, -1, 1)}, r"depths\[3\] must be at least 0 .*got -1"),
        ({"time_steps": 0}, "time_steps must be at least 1 .*got 0"),
        ({"num_classes": 0, "distillation": True}, "distillation needs classes"),
        ({"neuron": "izhikevich"}, "neuron 'izhikevich' is unknown"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        MetaSpikeFormer(**{**TINY, **options})


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 40), (37, 51), (1, 17), (16, 16)])
@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_any_size(size, backend, monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", backend)
    model, _ = alive()
    x = torch.rand(2, 3, *size)
    features = model.forward_features(x)
    assert features.shape == (2, 2, 24, -(-size[0] // 16), -(-size[1] // 16)) and features.isfinite().all()
    assert model(x).shape == (2, 5)
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\] .* got \[2, 1, 37, 51\]"):
        model(torch.rand(2, 1, 37, 51))


@pytest.mark.parametrize("time_steps", range(1, 9))
def test_any_number_of_steps_on_both_paths(time_steps, monkeypatch):
    model, images = alive(time_steps=time_steps)
    results = []
    for path in ("reference", "compiled"):
        monkeypatch.setenv("SDT_BLOCKS_BACKEND", path)
        with torch.no_grad():
            results.append([model(images), model(images.unsqueeze(1).repeat(1, time_steps, 1, 1, 1))])
    assert results[0][0].std(0).any()
    for result in (results[0][1], *results[1]):
        torch.testing.assert_close(result, results[0][0], atol=1e-5, rtol=1e-4)


def test_per_step_logits_average_to_the_mean():
    model, images = alive(per_step=True)
    per_step = model(images)
    assert per_step.shape == (2, 2, 5) and per_step.std(0).any()
    model.per_step = False
    torch.testing.assert_close(model(images), per_step.mean(0))


def test_two_heads():
    """Training returns both outputs, evaluation their average; both heads read the same spikes."""
    model, images = alive(distillation=True)
    spikes = []
    model.head_neuron.register_forward_hook(lambda module, args, output: spikes.append(output))
    result = model(images)
    logits, distilled = (head(spikes[0]).mean(0) for head in (model.head, model.distillation_head))
    assert not torch.equal(logits, distilled)
    torch.testing.assert_close(result, (logits + distilled) / 2)
    logits, distilled = model.train()(images)
    assert logits.shape == distilled.shape == (2, 5)
    distilled.sum().backward()
    assert model.head.weight.grad is None and model.distillation_head.weight.grad.any()
    assert model.downsamplings[0].conv.conv.weight.grad.any()


def test_without_a_head():
    model, images = alive(num_classes=0)
    assert model(images).shape == (2, 24) and model(images).any()
    assert not [key for key in model.state_dict() if key.startswith("head.")]


@torch.no_grad()
def test_weights_see_spikes_but_for_the_chains():
    """Merged, every weight but the first is fed by spikes: the premise of an energy figure."""
    model, images = alive()
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, Unit | nn.Linear):
            first = (
                module
                if isinstance(module, nn.Linear)
                else next(m for m in module.modules() if isinstance(m, nn.Conv2d))
            )
            first.register_forward_hook(lambda m, args, output, name=name: inputs.__setitem__(name, args[0]))
    model(images)
    for name, x in inputs.items():
        values = set(x.unique().tolist())
        assert values == {0.0, 1.0} or name == "downsamplings.0.conv", name
    assert len(inputs) == 5 + 3 * 4 + 2 * 6 + 1


@pytest.mark.parametrize("neuron", ["plif", ParametricLIF])
def test_another_neuron_everywhere(neuron):
    model, images = alive(neuron=neuron)
    neurons = [module for module in model.modules() if isinstance(module, ParametricLIF)]
    assert len(neurons) == 4 + 3 * 4 + 2 * 7 + 1
    model.train()(images).square().sum().backward()
    assert sum(bool(neuron.w.grad) for neuron in neurons) > 20


def test_mixed_precision_training_step():
    model, images = alive(distillation=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits, distilled = model.train()(images)
        loss = F.cross_entropy(logits, torch.tensor([1, 2])) + F.cross_entropy(distilled, torch.tensor([3, 4]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_frames_come_chunk_by_chunk():
    model, _ = alive(per_step=True)
    frames = torch.rand(2, 5, 3, 40, 40)
    stream = model.stream()
    torch.testing.assert_close(torch.cat([stream(frames[:, :2]), stream(frames[:, 2:])]), model(frames))


# ---- files


def released(golden, **more):
    """The content of a released file: model, optimizer, epoch, scaler and args."""
    args = argparse.Namespace(model="metaspikformer_8_512", time_steps=golden.config["T"], kd=False, **more)
    state = golden.group("state")
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    return {"model": state, "optimizer": optimizer, "epoch": 19, "scaler": {"scale": 65536.0}, "args": args}


@torch.no_grad()
@pytest.mark.parametrize("bare", [False, True])
def test_released_file(v2_golden, tmp_path, bare):
    path = tmp_path / "checkpoint-19.pth"
    content = released(v2_golden)
    torch.save(content["model"] if bare else content, path)
    model = load_released_checkpoint(path, **({"time_steps": 2} if bare else {}))
    assert isinstance(model, MetaSpikeFormer) and not model.training and model.config == v2_golden.model().config
    logits = model(v2_golden.tensors["input"])
    torch.testing.assert_close(logits, v2_golden.tensors["logits_eval"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_second_head_is_read_from_the_keys(v2_golden, tmp_path):
    content = released(v2_golden)
    state = content["model"]
    state |= {"head_kd.weight": state["head.weight"].flip(0), "head_kd.bias": state["head.bias"].flip(0)}
    torch.save(content, tmp_path / "55M_kd.pth")
    model = load_released_checkpoint(tmp_path / "55M_kd.pth")
    one = v2_golden.tensors["logits_eval"]
    torch.testing.assert_close(model(v2_golden.tensors["input"]), (one + one.flip(1)) / 2, atol=1e-4, rtol=0)


def test_wrong_and_mixed_files_are_named(v2_golden, static_golden, tmp_path):
    state, path = v2_golden.group("state"), tmp_path / "x.pth"

    def refused(content, message, **options):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_released_checkpoint(path, **options)

    without = {key: value for key, value in state.items() if key != "block4.1.attn.q_conv.0.body.1.bn.bias"}
    refused(without, r"x.pth: .*missing: stages.4.1.attention.branch.q.conv.border.norm.bias$")
    refused(
        {key: value for key, value in state.items() if not key.startswith("block3.2.")}, r"x.pth: .*block3.5 is there"
    )
    refused({**state, "head_lif.w": torch.zeros(())}, r"x.pth: .*a released MetaSpikeFormer; unexpected: head_lif.w$")
    refused(
        {**static_golden.group("state"), "downsample2.encode_bn.bias": torch.zeros(3)}, "Transformer; unexpected: down"
    )
    refused({"model": state, "args": None}, "has no 'state_dict_ema' .*; it holds model, args", ema=True)
    refused({"model": [1], "args": None}, r"has no 'state_dict' \(nor model, .*it holds model, args")
    refused(state, r"the head has 10 classes.*new_head=True", num_classes=7)


def test_conversion_gives_exactly_the_weights_of_the_model(v2_golden):
    converted = convert_released_state_dict(v2_golden.group("state"))
    expected = v2_golden.model().state_dict()
    assert {key: value.shape for key, value in converted.items()} == {k: v.shape for k, v in expected.items()}


@torch.no_grad()
def test_save_and_load(tmp_path):
    model, images = alive(distillation=True)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded(images), model(images))
    assert load_model(tmp_path, num_classes=0, distillation=False)(images).shape == (2, 24)
    tuned = load_model(tmp_path, num_classes=3, new_head=True, distillation=False)
    assert tuned.distillation_head is None and tuned(images).shape == (2, 3)
    config = tmp_path / "config.json"
    text = config.read_text()
    assert '"model": "MetaSpikeFormer"' in text
    for wrong in ("16", '[16, 16, 16, "x"]', "[16, 16, 16, 1e99]", "[16, 16, 16, true]", "[16, 16, 16]"):
        config.write_text(re.sub(r'"dims": \[[^]]*\]', f'"dims": {wrong}', text))
        with pytest.raises(ValueError, match=r"config\.json: .*dims"):
            load_model(tmp_path)
    config.write_text(text.replace("MetaSpikeFormer", "SpikeDrivenTransformer"))
    with pytest.raises(ValueError, match=r"config\.json: unknown model option depths, dims"):
        load_model(tmp_path)


@pytest.mark.parametrize("training", [True, False])
def test_linear_attention_is_compiled_whole(training):
    torch.manual_seed(0)
    block = LinearSpikeAttention(16, num_heads=4).train(training)
    for norm in (module for module in block.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 0.0
        nn.init.constant_(norm.bias, 1.0)
    x = 3 * torch.rand(2, 2, 16, 4, 4)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    expected = block(x)
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    assert firing_rates(block, x.clone())["mixer_neuron"].mean > 0.05 and expected.std() > 0
