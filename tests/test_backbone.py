"""Feature maps of every stage: shapes, what they are, and what timm would read of them."""

import copy

import pytest
import torch
from timm.models import FeatureInfo
from torch import nn

from sdt_blocks import MetaSpikeFormer, SpikeDrivenTransformer, calibrate_norms, optimize_for_inference

MODELS = {
    "v1": lambda: SpikeDrivenTransformer(depth=2, dim=32, num_classes=0, pooling="1011", time_steps=3),
    "v2": lambda: MetaSpikeFormer(dims=(16, 16, 24, 32), depths=(1, 1, 2, 1, 1), num_classes=0, time_steps=3),
}
INFO = {
    "v1": [(4, 2, "patch.pools.0"), (8, 2, "patch.pools.1"), (16, 4, "patch.pools.2"), (32, 8, "blocks")],
    "v2": [(8, 2), (16, 4), (16, 8), (24, 16), (32, 16)],
}
INFO["v2"] = [(*info, f"stages.{stage}") for stage, info in enumerate(INFO["v2"])]


@pytest.fixture(params=MODELS)
def backbone(request):
    """A model in eval mode whose neurons fire, images of odd sizes, and what its stages are."""
    torch.manual_seed(0)
    model, images = MODELS[request.param](), torch.rand(2, 3, 45, 38)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias, 1.0, 0.5)
    calibrate_norms(model, images)
    return model.eval(), images, INFO[request.param]


@torch.no_grad()
def test_maps_are_the_means_of_what_the_named_modules_give(backbone):
    model, images, info = backbone
    assert [tuple(one.values()) for one in model.feature_info] == info
    seen = {}
    for _, _, name in info:
        model.get_submodule(name).register_forward_hook(lambda m, a, output, name=name: seen.__setitem__(name, output))
    features = model.features(images)
    for feature, (channels, reduction, name) in zip(features, info, strict=True):
        assert feature.shape == (2, channels, -(-45 // reduction), -(-38 // reduction)) and feature.std() > 0.05
        given = seen[name] if seen[name].ndim == 5 else seen[name].unflatten(0, (3, 2))
        torch.testing.assert_close(feature, given.mean(0))
    torch.testing.assert_close(features[-1], model.forward_features(images).mean(0))
    for feature, of_frames in zip(features, model.features(images.unsqueeze(1).repeat(1, 3, 1, 1, 1)), strict=True):
        torch.testing.assert_close(of_frames, feature, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_some_stages_in_any_order_and_none_behind_them(backbone):
    model, images, _ = backbone
    features = model.features(images)
    model.get_submodule(model.feature_info[-1]["module"]).register_forward_hook(lambda *_: pytest.fail("too far"))
    second, first = model.features(images, stages=(1, 0))
    assert torch.equal(first, features[0]) and torch.equal(second, features[1])
    for wrong in ((), (1, 1), (0, 7), (-1,)):
        with pytest.raises(ValueError, match=r"different numbers from 0 to \d, got \["):
            model.features(images, stages=wrong)
    for wrong in (2, "0", (1.0,)):
        with pytest.raises(TypeError, match="stages must be a list of whole numbers, got"):
            model.features(images, stages=wrong)


def test_timm_reads_the_info(backbone):
    model, _, info = backbone
    read = FeatureInfo(model.feature_info, out_indices=(0, 2))
    assert read.channels() == [info[0][0], info[2][0]] and read.reduction() == [info[0][1], info[2][1]]
    assert read.module_name() == [info[0][2], info[2][2]]


class Segmenter(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.heads = nn.ModuleList(nn.Conv2d(info["num_chs"], 2, 1) for info in model.feature_info)

    def forward(self, images):
        maps = [head(x) for head, x in zip(self.heads, self.model.features(images), strict=True)]
        return sum(nn.functional.interpolate(x, size=(45, 38)) for x in maps)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_network_around_it_learns_and_is_optimized(backbone, sparse):
    model, images, _ = backbone
    network = Segmenter(model).eval()
    with torch.no_grad():
        if sparse:
            # A membrane within rounding of its threshold may fire in one form alone.
            off = (optimize_for_inference(network, sparse=True)(images) - network(images)).abs()
            assert off.mean() < 0.02 * network(images).std()
        else:
            double, x = copy.deepcopy(network).double(), images.double()
            fast = optimize_for_inference(double, torch.float64)
            torch.testing.assert_close(fast(x), double(x), atol=1e-9, rtol=0)
    network.train()(images).square().sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None and not n.startswith("model.head")]
    assert silent == []
