"""Spikformer and QKFormer against the authors' code, their parts, variants and released files."""

import argparse
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdt_blocks import (
    QKFormer,
    Spikformer,
    Stream,
    calibrate_norms,
    create_model,
    load_model,
    load_released_checkpoint,
    optimize_for_inference,
    save_model,
)
from sdt_blocks.analysis import attention_maps, audit, energy, firing_rates
from sdt_blocks.blocks import QKAttention, QKMixer, SpikeLevelMLP, SpikeShortcut, SpikingSelfAttention
from sdt_blocks.models import qkformer, spikformer
from sdt_blocks.neuron import find_neurons
from sdt_blocks.steps import find_mixers, project

NAMES = ("spikformer_imagenet_64", "spikformer_cifar_32", "qkformer_imagenet_64", "qkformer_cifar_32")
PUBLISHED = {
    "spikformer_8_384": 16_816_024,
    "spikformer_6_512": 23_373_352,
    "spikformer_8_512": 29_689_384,
    "spikformer_10_512": 36_005_416,
    "spikformer_8_768": 66_338_632,
    "spikformer_4_256": 4_155_178,
    "spikformer_2_384": 5_765_050,
    "spikformer_4_384": 9_324_730,
    "spikformer_2_256_dvs": 2_566_666,
    "spikformer_2_256_gesture": 2_566_923,
    "qkformer_10_384": 16_473_688,
    "qkformer_10_512": 29_079_336,
    "qkformer_10_768": 64_962_760,
    "qkformer_4_384": 6_706_234,
    "qkformer_2_256_dvs": 1_504_138,
    "qkformer_2_256_gesture": 1_504_395,
}
WITHOUT_EFFECT = re.compile(r"(q|k|v|proj|fc[12])\.conv\.bias$")
"""What stands right in front of a batch normalization, which undoes it."""
SMALL = {
    "spikformer": (Spikformer, {"depth": 1, "dim": 32, "pooling": "0011"}),
    "qkformer": (QKFormer, {"depths": (1, 1, 1), "dim": 32, "form": "cifar"}),
    "qkformer of events": (QKFormer, {"depths": (1, 1), "dim": 32, "form": "events", "in_channels": 2}),
}


@pytest.fixture(params=NAMES)
def released(request, named_golden):
    """Each of the golden files in turn, and the options of the model as it was released."""
    golden = named_golden(request.param)
    return golden, {"mixes_images": True} if golden.config["family"] == "qkformer" else {}


def alive(kind, **options):
    """A small model in eval mode whose neurons all fire, and images for it."""
    torch.manual_seed(0)
    model = kind(**{"num_heads": 4, "num_classes": 5, "time_steps": 3, **options})
    images = torch.rand(4, model.in_channels, *((48, 64) if options.get("form") == "events" else (16, 24)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0.9, 0.4)
    calibrate_norms(model, images)
    return model.eval(), images


@pytest.fixture(params=SMALL)
def small(request):
    kind, options = SMALL[request.param]
    return alive(kind, **options)


# ---- the authors' code


@torch.no_grad()
@pytest.mark.parametrize("path", ["reference", "compiled", "triton"])
def test_every_neuron_spikes_alike(released, path, monkeypatch, large_programs):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", path)
    golden, options = released
    model, seen = golden.model(**options), {}
    family = qkformer.FAMILY if options else spikformer.FAMILY
    expected = golden.group("hook")
    for theirs in expected:
        ours = family.keys.renamed(f"{theirs}.w").removesuffix(".w")
        model.get_submodule(ours).register_forward_hook(
            lambda module, args, output, name=theirs: seen.__setitem__(name, output)
        )
    logits = model(golden.tensors["input"])
    torch.testing.assert_close(logits, golden.tensors["logits_eval"], atol=1e-5, rtol=0)
    assert len(find_neurons(model)) == len(seen) == len(expected)
    for name, spikes in expected.items():
        assert 0.01 < spikes.float().mean() < 0.95, name
        assert torch.equal(seen[name].reshape(spikes.shape), spikes.float()), name


@pytest.mark.parametrize("path", ["reference", "compiled", "triton"])
def test_training_step(released, path, monkeypatch, large_programs):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", path)
    golden, options = released
    model = golden.model(**options).train()
    logits = model(golden.tensors["input"])
    torch.testing.assert_close(logits, golden.tensors["logits_train"], atol=1e-5, rtol=0)
    loss = F.cross_entropy(logits, golden.tensors["target"])
    assert abs(loss.item() - golden.tensors["loss_train"].item()) < 1e-5
    loss.backward()
    golden.check_step(model, WITHOUT_EFFECT)


@pytest.mark.parametrize("family", SMALL)
def test_a_small_training_step_on_every_path(family, same_on_every_path):
    kind, options = SMALL[family]
    released = {"mixes_images": True} if kind is QKFormer else {}
    model, _ = alive(kind, **{**options, **released, "dim": 16, "num_heads": 2, "time_steps": 2})
    side = 16 if "events" in family else 8
    x = torch.rand(3, model.in_channels, side, side, generator=torch.Generator().manual_seed(1))
    same_on_every_path(model, x, torch.tensor([0, 1, 2]))


@torch.no_grad()
@pytest.mark.parametrize("sparse", [False, True])
def test_folded_and_event_driven(released, sparse):
    golden, options = released
    fast = optimize_for_inference(golden.model(**options), compile=False, sparse=sparse)
    torch.testing.assert_close(fast(golden.tensors["input"]), golden.tensors["logits_eval"], atol=1e-5, rtol=0)
    assert not sparse or len(list(fast.products())) >= 4


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES[2:])
def test_an_image_is_answered_for_itself_unless_asked_otherwise(name, named_golden):
    golden = named_golden(name)
    x, alone = golden.tensors["input"], golden.tensors["logits_eval_single"]
    repaired, released = golden.model(), golden.model(mixes_images=True)
    torch.testing.assert_close(repaired(x), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(repaired(x.flip(0)).flip(0), alone, atol=1e-5, rtol=0)
    assert (released(x.flip(0)).flip(0) - released(x)).abs().max() > 0.1
    torch.testing.assert_close(torch.cat([released(image[None]) for image in x]), alone, atol=1e-5, rtol=0)
    with pytest.raises(TypeError, match="no state for a stream; use mixes_images=False"):
        Stream(released)(x)


# ---- parts


@torch.no_grad()
def test_the_stems_of_events_pool_where_the_authors_do():
    """Layers 1, 2 and 3 of the first stem pool before they fire, and layer 1 of the second; no golden file has them."""
    model, images = alive(QKFormer, depths=(0, 0), dim=32, form="events", in_channels=2)
    (first, second), frames = model.double().embeddings, images.double().expand(3, *images.shape)

    def fired(stem, number, x, pools=True):
        x = project(stem.layers[number], x)
        return stem.neurons[number](F.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2]) if pools else x)

    shared = fired(first, 1, fired(first, 0, frames, pools=False))
    expected = fired(first, 3, fired(first, 2, shared)) + first.residual_neuron(project(first.residual, shared))
    assert torch.equal(first(frames), expected) and 0.1 < expected.mean() < 1.9
    after = fired(second, 1, fired(second, 0, expected, pools=False))
    assert torch.equal(second(expected), after + second.residual_neuron(project(second.residual, expected)))


@pytest.mark.parametrize("over", ["channels", "tokens"])
def test_the_mask_of_qk_attention_by_hand(over):
    torch.manual_seed(0)
    q, k = ((torch.rand(3, 2, 8, 2, 3) < rate).float() for rate in (0.08, 0.5))
    mixer = QKMixer(8, num_heads=2, over=over)
    expected, membrane = torch.zeros_like(k), {}
    for t, b, c, i, j in torch.cartesian_prod(*map(torch.arange, k.shape)).tolist():
        head = slice(c // 4 * 4, c // 4 * 4 + 4)
        place = (b, c) if over == "tokens" else (b, c, i, j)
        count = q[t, b, c].sum() if over == "tokens" else q[t, b, head, i, j].sum()
        if (t, place) not in membrane:
            v = membrane.get((t - 1, place), 0.0)
            h = v + (count - v) / 2
            membrane[t, place], membrane["fired", t, place] = (0.0 if h >= 0.5 else h), h >= 0.5
        expected[t, b, c, i, j] = k[t, b, c, i, j] * membrane["fired", t, place]
    assert torch.equal(mixer(q, k), expected) and 0 < expected.mean() < k.mean()
    assert mixer.additions(q, k).sum() == q.sum()


def test_qk_attention_is_over_what_it_is_asked_for():
    mixer = QKAttention(8, num_heads=2, over="tokens").mixer
    assert (mixer.over, mixer.num_heads) == ("tokens", 2)


@pytest.mark.parametrize("attention", [SpikingSelfAttention, QKAttention])
def test_blocks_refuse_what_does_not_fit(attention):
    with pytest.raises(ValueError, match="must be a positive multiple of 3, got 8"):
        attention(8, num_heads=3)
    with pytest.raises(ValueError, match=r"expects \[T, B, 8, H, W\] .* got \[2, 4, 3, 3\]"):
        attention(8)(torch.zeros(2, 4, 3, 3))
    with pytest.raises(ValueError, match="over must be"):
        QKMixer(8, over="heads")
    with pytest.raises(ValueError, match="hidden must be positive, got 0"):
        SpikeLevelMLP(8, hidden=0)
    with pytest.raises(TypeError, match="mixes_images must be True or False, got 1"):
        SpikingSelfAttention(8, mixes_images=1)
    with pytest.raises(TypeError, match=r"the branch must be an nn\.Module, got function"):
        SpikeShortcut(lambda x: x)
    with pytest.raises(ValueError, match="must keep the shape"):
        SpikeShortcut(nn.MaxPool3d(2))(torch.zeros(2, 2, 4, 4, 4))


# ---- variants, sizes, files


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        ("spikformer_8_384 spikformer_8_512", {"num_heads": 8, "time_steps": 4, "pooling": "1111", "scale": 0.125}),
        ("spikformer_2_384 spikformer_4_384", {"num_heads": 12, "time_steps": 4, "pooling": "0011", "scale": 0.125}),
        ("spikformer_2_256_dvs", {"num_heads": 16, "time_steps": 16, "pooling": "1111", "scale": 0.25}),
        ("spikformer_2_256_gesture", {"num_heads": 8, "time_steps": 16}),
        ("qkformer_10_384", {"num_heads": 6, "time_steps": 4, "form": "imagenet", "mixes_images": False}),
        ("qkformer_10_512", {"num_heads": 8, "time_steps": 4, "form": "imagenet"}),
        ("qkformer_10_768", {"num_heads": 12, "time_steps": 4, "form": "imagenet"}),
        ("qkformer_4_384", {"num_heads": 8, "time_steps": 4, "form": "cifar"}),
        ("qkformer_2_256_dvs qkformer_2_256_gesture", {"num_heads": 16, "time_steps": 16, "form": "events"}),
    ],
)
def test_published_settings_that_no_weight_shows(names, settings):
    for name in names.split():
        with torch.device("meta"):
            config = create_model(name).config
        assert {key: config[key] for key in settings} == settings, name


def test_all_variants_are_counted():
    assert [*spikformer.VARIANTS, *qkformer.VARIANTS] == list(PUBLISHED)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spikformer(depth=1, dim=36), "dim must be a positive multiple of 8, got 36"),
        (lambda: Spikformer(depth=1, dim=64, pooling="11"), "pooling must be four flags"),
        (lambda: QKFormer(depths=(1, 1), dim=64), r"blocks of 3 stages \(imagenet\), got \[1, 1\]"),
        (lambda: QKFormer(depths=(1, 1, 1), dim=64, form="video"), "form must be one of imagenet, cifar, events, got"),
        (lambda: QKFormer(depths=(1, 1, 1), dim=64, num_heads=12), "must be a positive multiple of 12, got 16"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@torch.no_grad()
def test_any_size_any_number_of_steps_on_every_path(small, tmp_path):
    model, images = small
    fast = [optimize_for_inference(model, compile=False, sparse=sparse) for sparse in (False, True)]
    for shape in ((2, 17, 30), (1, 1, 16, 16), (2, 5, 33, 20)):
        x = torch.rand(*shape[:-2], model.in_channels, *shape[-2:])
        expected = model(x)
        assert expected.shape == (shape[0], 5) and expected.std() > 1e-3
        for made in fast:
            torch.testing.assert_close(made(x), expected, atol=1e-4, rtol=1e-4)
    frames = torch.rand(2, 4, *images.shape[1:])
    stream = model.stream()
    parts = torch.stack([stream(frames[:, :1]), stream(frames[:, 1:2]), stream(frames[:, 2:])])
    torch.testing.assert_close((parts * torch.tensor([0.25, 0.25, 0.5]).view(3, 1, 1)).sum(0), model(frames))
    features = model.features(torch.rand(2, model.in_channels, 48, 64))
    for feature, info in zip(features, model.feature_info, strict=True):
        assert feature.shape == (2, info["num_chs"], 48 // info["reduction"], 64 // info["reduction"])
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(images), model(images))


def test_the_analysis_says_what_multiplies(small):
    model, images = small
    rates = firing_rates(model, images)
    assert not rates.silence and all(0 < layer.mean < 1 for layer in rates.layers.values())
    found = audit(model, images)
    assert not found.spike_driven
    modules = {violation.module for violation in found.violations}
    # Sums of spikes go into every product that no neuron stands before.
    assert "head" in modules and any(name.endswith("mlp.branch.fc1.conv") for name in modules)
    assert not any(re.search(r"(fc2|proj)\.conv$", name) for name in modules)
    report = energy(model, images)
    assert report.total_mj > 0 and not report.not_counted
    for block in (0, -1):
        assert attention_maps(model, images, block=block).any()


@pytest.mark.parametrize("wrap", ["timm", "accelerate", "bare"])
def test_released_files(released, wrap, tmp_path):
    golden, options = released
    state, config = golden.group("state"), golden.config
    args = argparse.Namespace(num_heads=config["num_heads"], time_steps=config["T"])
    content = {"timm": {"state_dict": state, "args": args}, "accelerate": {"model": state, "args": args}, "bare": state}
    torch.save(content[wrap], tmp_path / "x.pth.tar")
    heads = {"num_heads": config["num_heads"], "time_steps": config["T"]} if wrap == "bare" else {}
    model = load_released_checkpoint(tmp_path / "x.pth.tar", **heads, **options)
    assert type(model).__name__.lower() == config["family"] and not model.training
    with torch.no_grad():
        logits = model(golden.tensors["input"])
    torch.testing.assert_close(logits, golden.tensors["logits_eval"], atol=1e-5, rtol=0)


def test_what_released_shapes_do_not_tell_is_that_of_the_variant():
    """Heads, scales and poolings are in no weight; the names tell which published model it is."""

    def of(shapes):
        return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}

    shapes = {
        "patch_embed.proj_conv.weight": (32, 2, 3, 3),
        "patch_embed.proj_conv3.weight": (256, 128, 3, 3),
        "patch_embed.proj_lif.w": (),
        "pos_embed": (1, 64, 256),
    }
    for i in range(2):
        shapes |= {f"block.{i}.mlp.fc1_conv.weight": (1024, 256, 1, 1), f"block.{i}.attn.q_conv.weight": (256, 256, 1)}
    model = Spikformer(**spikformer.VARIANTS["spikformer_2_256_dvs"], neuron="plif")
    assert {(mixer.scale, mixer.num_heads) for mixer in find_mixers(model).values()} == {(0.25, 16)}
    published = model.config
    found = spikformer.FAMILY.keys.options(of(shapes | {"head.weight": (10, 256)}), {"time_steps": 16})[0]
    assert found.items() <= published.items() and {"scale", "num_heads", "time_steps", "pooling"} <= found.keys()
    shapes = {
        "patch_embed.proj_conv.weight": (48, 3, 3, 3),
        "patch_embed.proj_conv3.weight": (384, 192, 3, 3),
        **{f"block.{i}.attn.q_linear.{kind}": (384,) * n for i in range(4) for kind, n in (("weight", 2), ("bias", 1))},
        "block.0.mlp.fc1_linear.weight": (1536, 384),
        "head.weight": (10, 384),
    }
    published = Spikformer(**spikformer.VARIANTS["spikformer_4_384"]).config
    found = spikformer.FAMILY.keys.options(of(shapes), {})[0]
    assert found.items() <= published.items() and {"num_heads", "pooling", "qkv_bias"} <= found.keys()
    shapes = {
        "patch_embed1.proj_conv.weight": (32, 2, 3, 3),
        "patch_embed1.proj_lif.w": (),
        "patch_embed2.proj4_conv.weight": (256, 256, 3, 3),
        "stage1.0.mlp.mlp1_conv.weight": (512, 128, 1, 1),
        "stage2.0.mlp.mlp1_conv.weight": (256, 256, 1, 1),
        "head.weight": (10, 256),
    }
    published = QKFormer(**qkformer.VARIANTS["qkformer_2_256_dvs"], neuron="plif").config
    found = qkformer.FAMILY.keys.options(of(shapes), {"time_steps": 16, "num_heads": 8})[0]
    assert {**found, "depths": tuple(found["depths"])}.items() <= published.items()
    assert {"form", "num_heads", "time_steps", "mlp_ratio"} <= found.keys()


def test_mixed_files_are_refused(static_golden, v2_golden, named_golden, tmp_path):
    states = [named_golden(name).group("state") for name in NAMES[::2]]
    for state in states:
        for other in (*states, static_golden.group("state"), v2_golden.group("state")):
            if other is not state:
                strange = {
                    key: value for key, value in other.items() if key not in state and not key.startswith("head")
                }
                with pytest.raises(ValueError, match=r"not the state_dict of .*; unexpected: |fit|missing"):
                    torch.save({**state, **dict(list(strange.items())[:3])}, tmp_path / "x.pth")
                    load_released_checkpoint(tmp_path / "x.pth")


def test_names_that_fit_two_families_are_refused(named_golden, tmp_path):
    state = named_golden(NAMES[0]).group("state")
    unused = {key for key in state if re.search(r"norm[12]\.", key)}
    torch.save({key: value for key, value in state.items() if key not in unused}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"fit SpikeDrivenTransformer and Spikformer alike; .* block.0.norm1.weight"):
        load_released_checkpoint(tmp_path / "x.pth")
