"""Models of every family under timm: built, taken apart, grouped and trained by timm's own functions."""

import copy

import numpy as np
import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import sdt_blocks.models.timm
from sdt_blocks import DataCard, create_model, list_models, load_model, save_model
from sdt_blocks.models import keeps_options, register, registry
from sdt_blocks.models.registry import families


def as_timm(small, **options):
    """The small model of a family as timm builds it, with the same weights."""
    model = timm.create_model(small.name, **{**small.options, **options})
    (model.model if options.get("features_only") else model).load_state_dict(small.model.state_dict(), strict=False)
    return model.eval()


def test_timm_knows_every_variant():
    assert set(list_models()) <= set(timm.list_models()) & set(sdt_blocks.models.timm.__all__)
    assert set(timm.list_models("sdt*")) == {name for name in list_models() if name.startswith("sdt")}
    for name in list_models():
        config = timm.get_pretrained_cfg(name)
        assert getattr(sdt_blocks.models.timm, name).__name__ == name  # as __all__ says
        assert config.input_size[0] in (2, 3) and len(config.mean) == len(config.std) == config.input_size[0]


def test_a_family_of_ones_own_without_input_channels_is_left_out(monkeypatch):
    class Own(nn.Module):
        @keeps_options
        def __init__(self, *, num_classes: int = 2):
            super().__init__()

    class Tokens(nn.Module):
        @keeps_options
        def __init__(self, *, in_channels: int = 3, num_classes: int = 2):
            super().__init__()

    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    register(Own, {"own_1": {}})
    register(Tokens, {"tokens_1": {}})
    assert sdt_blocks.models.timm.register_models() == ["tokens_1"]
    assert timm.create_model("tokens_1", in_chans=1).config == {"in_channels": 1, "num_classes": 2}


def test_the_fixture_has_every_family(request):
    from_conftest = request.getfixturevalue("small_names")
    assert {type(create_model(name)) for name in from_conftest} == {family.model for family in families().values()}


@torch.no_grad()
def test_one_model_by_both_ways(small):
    model = as_timm(small)
    assert type(model) is type(small.model) and model.config == small.model.config
    assert torch.equal(model(small.images), small.model(small.images))
    first = model.get_submodule(model.default_cfg["first_conv"])
    assert isinstance(first, nn.Conv2d) and first.in_channels == 3
    assert resolve_model_data_config(model)["input_size"] == model.default_cfg["input_size"]
    options = {**small.options, "num_classes": 7, "in_chans": 1, "drop_rate": 0.0, "drop_path_rate": 0.0}
    gray = timm.create_model(small.name, **options)
    assert gray(torch.rand(2, 1, 32, 32)).shape == (2, 7) and gray.in_channels == gray.in_chans == 1


def test_drop_path_is_the_kits():
    model = timm.create_model("sdt_8_384", num_classes=10, in_chans=1, drop_path_rate=0.1, dim=32)
    assert model.config["drop_path"] == 0.1 and model.blocks[7].mlp.drop_path == 0.1


@pytest.mark.parametrize(
    ("kits", "timms"), [({"in_channels": 1}, {"in_chans": 1}), ({"drop_path": 0.2}, {"drop_path_rate": 0.2})]
)
def test_an_option_under_the_kits_name_counts_and_has_one_value(kits, timms):
    """timm gives its own `in_chans` to every model that is built without one."""
    ((name, value),) = kits.items()
    for options in (kits, timms, {**kits, **timms}):
        assert timm.create_model("sdt_2_256", dim=32, **options).config[name] == value
    with pytest.raises(TypeError, match=rf"{next(iter(timms))}=0 and {name}={value} are one option: give one of them"):
        timm.create_model("sdt_2_256", dim=32, **kits, **dict.fromkeys(timms, 0))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pretrained": True}, RuntimeError, "no weights of sdt_v2_15m.*load_released_checkpoint"),
        ({"drop_path_rate": 0.1}, TypeError, "unknown model option drop_path_rate; the options are dims"),
        ({"global_pool": "max"}, TypeError, "unknown model option global_pool"),
        ({"img_size": 96}, TypeError, "unknown model option img_size"),
    ],
)
def test_what_a_family_does_not_have_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        timm.create_model("sdt_v2_15m", **options)


@torch.no_grad()
def test_features_and_head_apart_are_the_whole(small):
    model, images = small.model, small.images
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), model(images))
    seen = model.forward_head(features, pre_logits=True)
    assert seen.shape == (4, model.num_features) and model.num_features == model.get_classifier().in_features
    torch.testing.assert_close(model.get_classifier()(seen), model(images), atol=1e-5, rtol=1e-4)
    last, maps = model.forward_intermediates(images, indices=[-1, 0])
    assert torch.equal(last, features) and torch.equal(maps[0], features.mean(0))
    assert len(maps) == 2 and torch.equal(maps[1], model.features(images, stages=(0,))[0])
    last, (first,) = model.forward_intermediates(images, indices=[0], stop_early=True)
    assert torch.equal(last.mean(0), first) and torch.equal(first, maps[1])
    (alone,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
    assert torch.equal(alone, maps[0])
    for wrong in (0, [99], [], len(model.feature_info) + 1):
        with pytest.raises(ValueError, match="stages"):
            model.forward_intermediates(images, indices=wrong)
    for wrong in (1.5, ["0"]):
        with pytest.raises(TypeError, match="stages must be a list of whole numbers, got"):
            model.forward_intermediates(images, indices=wrong)
    with pytest.raises(ValueError, match="output_fmt='NCHW', got 'NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")


@torch.no_grad()
def test_features_only(small):
    count = len(small.model.feature_info)
    for asked in ({}, {"out_indices": (0, count - 1)}, {"out_indices": (-1,)}):
        features = as_timm(small, features_only=True, **asked)
        stages = [stage % count for stage in asked.get("out_indices", range(count))]
        maps = features(small.images)
        expected = small.model.features(small.images)
        assert len(maps) == len(stages)
        for i, stage in enumerate(stages):
            assert torch.equal(maps[i], expected[stage]) and features.feature_info.channels()[i] == maps[i].shape[1]
            assert features.feature_info.reduction()[i] == -(-32 // maps[i].shape[-1])
        assert isinstance(features.model.head, nn.Identity)


@torch.no_grad()
def test_torchvision_extracts_features(small):
    last = small.model.feature_info[-1]["module"]
    extract = create_feature_extractor(small.model, {last: "maps", "head": "logits"})
    found = extract(small.images)
    assert torch.equal(found["maps"].mean(0), small.model.features(small.images)[-1])
    assert torch.equal(found["logits"].mean(0), small.model(small.images))


def test_a_new_head_can_be_saved(small, tmp_path):
    model = small.model
    model.card = DataCard(["a", "b", "c", "d", "e"])
    model.reset_classifier(np.int64(9))
    assert model.card.class_names is None and not model.head.bias.any() and not model.head.training
    assert abs(model.head.weight.std() - 0.02) < 0.005
    assert model.num_classes == 9 and model(small.images).shape == (4, 9)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(small.images), model(small.images))
    model.double().reset_classifier(0)
    assert model(small.images.double()).shape == (4, model.num_features)
    model.reset_classifier(2)
    assert model.head.weight.dtype == torch.float64
    for wrong, message in (
        ({"num_classes": -1}, "num_classes must be at least 0 .*, got -1"),
        ({"num_classes": True}, "num_classes must be a whole number, got True"),
        ({"num_classes": 3, "global_pool": "max"}, "global_pool='avg', got 'max'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            model.reset_classifier(**wrong)


@pytest.mark.parametrize("name", ["sdt_v2_15m", "sdt_v3_83m"])
def test_two_heads(name, tmp_path):
    small = {"sdt_v2_15m": (8, 16, 32, 32), "sdt_v3_83m": (8, 16, 32)}[name]
    model = create_model(name, dims=small, num_classes=5, distillation=True, depths=(1,) * (len(small) + 1))
    head, second = model.get_classifier()
    assert head is model.head and second is model.distillation_head
    model.reset_classifier(6)
    assert [layer.out_features for layer in model.get_classifier()] == [6, 6]
    logits, distilled = model.train()(torch.rand(2, 3, 32, 32))
    assert logits.shape == distilled.shape == (2, 6)
    model.reset_classifier(0)
    model.reset_classifier(3)
    assert isinstance(model.get_classifier(), nn.Linear) and model.config["distillation"] is False
    save_model(model, tmp_path)
    assert load_model(tmp_path).num_classes == 3


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_run_from_the_stem_to_the_head(small, coarse):
    layers = group_parameters(small.model, small.model.group_matcher(coarse=coarse), reverse=True)
    assert set(layers) == dict(small.model.named_parameters()).keys()
    order = list(dict.fromkeys(layers[name] for name, _ in small.model.named_parameters() if name in layers))
    assert layers["head.weight"] == max(order) and sorted(order) == list(range(max(order) + 1))
    first = timm.get_pretrained_cfg(small.name).first_conv
    assert layers[f"{first}.weight"] == 0
    depth = 1 if hasattr(small.model, "blocks") else 2
    blocks = {tuple(name.split(".")[: depth + 1]) for name in layers if name.startswith(("blocks.", "stages."))}
    if small.name == "sdt_v3_83m" and not coarse:  # the released fine-tuning counts its attention blocks alone
        blocks = {block for block in blocks if block[1] == "3"}
    found = {
        block: {layers[name] for name in layers if tuple(name.split(".")[: depth + 1]) == block} for block in blocks
    }
    assert all(len(layer) == 1 for layer in found.values())
    assert len(set.union(*found.values())) == (len({block[:2] for block in blocks}) if coarse else len(blocks)) > 1


def test_time_constants_do_not_decay():
    model = create_model("sdt_2_256", dim=32, neuron="plif")
    names = model.no_weight_decay()
    assert names == {name for name, _ in model.named_parameters() if name.endswith(".w")} and len(names) > 10
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05, layer_decay=0.5).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed and not decayed & {id(dict(model.named_parameters())[name]) for name in names}
    assert create_model("sdt_2_256", dim=32).no_weight_decay() == set()


def test_checkpointed_blocks_have_the_same_gradients_and_count_a_batch_once(small):
    plain, again = small.model.train(), copy.deepcopy(small.model)
    again.set_grad_checkpointing()
    runs = []
    block = again.get_submodule("blocks.1" if hasattr(again, "blocks") else "stages.1.0")
    block.register_forward_hook(lambda *_: runs.append(1))
    for model in (plain, again):
        torch.manual_seed(1)
        model(small.images).square().sum().backward()
    assert len(runs) >= 1
    for (name, one), (_, other) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-4, msg=name)
    for (name, one), (_, other) in zip(plain.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    again.set_grad_checkpointing(False)
    assert not again.grad_checkpointing


class Halved(nn.Sequential):
    def forward(self, x):
        return super().forward(x) / 2


def halve_by_hook(stage):
    stage.register_forward_hook(lambda module, given, result: result / 2)


def halve_by_class(stage):
    stage.__class__ = Halved


@pytest.mark.parametrize("halve", [halve_by_hook, halve_by_class])
@pytest.mark.parametrize("name", ["sdt_2_256", "sdt_v2_15m"])
def test_checkpointing_keeps_what_a_stage_does_besides_calling_its_blocks(make_small, name, halve):
    plain = make_small(name)
    last = plain.model.feature_info[-1]["module"]
    halve(plain.model.get_submodule(last))
    again = copy.deepcopy(plain.model)
    again.set_grad_checkpointing()
    plain.model.train()(plain.images).square().sum().backward()
    with pytest.warns(UserWarning, match=rf"{last} has a hook, or a forward of its own: its blocks are recomputed all"):
        again.train()(plain.images).square().sum().backward()
    for (name, one), (_, other) in zip(plain.model.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-4, msg=name)
    for (name, one), (_, other) in zip(plain.model.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(one, other), name
