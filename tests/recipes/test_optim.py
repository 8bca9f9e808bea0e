"""Optimizers, schedule, mixing and losses held to timm, torch and float64 closed forms."""

import numpy as np
import pytest
import torch
from common.optim import (
    BatchMixer,
    batch_scale,
    build_loss,
    build_optimizer,
    check_even_batch,
    learning_rate,
    set_learning_rate,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from torch import nn

from sdt_blocks import ParametricLIF, create_model
from sdt_datasets.image_transforms import seeded

RATES = {"lr": 1.5e-3, "min_lr": 1.5e-5, "warmup_lr": 1e-5}

# Schedule


@given(
    steps_per_epoch=st.integers(1, 7),
    epochs=st.integers(2, 12),
    warmup_epochs=st.integers(0, 12),
    cooldown_epochs=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_schedule_is_timms_cosine(steps_per_epoch, epochs, warmup_epochs, cooldown_epochs):
    warmup_epochs = min(warmup_epochs, epochs)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=RATES["lr"])
    timms = CosineLRScheduler(
        optimizer,
        t_initial=epochs * steps_per_epoch,
        lr_min=RATES["min_lr"],
        warmup_t=warmup_epochs * steps_per_epoch,
        warmup_lr_init=RATES["warmup_lr"],
        t_in_epochs=False,
    )
    for step in range((epochs + cooldown_epochs) * steps_per_epoch):
        timms.step_update(step)
        ours = learning_rate(step, steps_per_epoch=steps_per_epoch, epochs=epochs, warmup_epochs=warmup_epochs, **RATES)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_schedule_passes_through_its_named_points():
    def at(epoch):
        return learning_rate(round(epoch * 10), steps_per_epoch=10, epochs=300, warmup_epochs=20, **RATES)

    assert at(0) == 1e-5
    assert at(10) == pytest.approx((1e-5 + 1.5e-3) / 2)
    assert at(150) == pytest.approx((1.5e-3 + 1.5e-5) / 2)
    assert at(299.9) > 1.5e-5
    assert [at(epoch) for epoch in (300, 305, 309.9)] == [1.5e-5] * 3


def test_learning_rate_reaches_every_group():
    optimizer = build_optimizer(create_model("sdt_2_256", dim=16), name="adamw", lr=1.0, weight_decay=0.1)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("total", "reference", "scale"), [(384, 384, 1.0), (48, 384, 0.125), (768, 384, 2.0), (64, None, 1.0)]
)
def test_rates_scale_with_the_total_batch(total, reference, scale):
    assert batch_scale(total, reference) == scale


# Optimizers


@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd"])
def test_only_weights_of_two_dimensions_decay(name):
    def neuron(*, threshold, channels):
        return ParametricLIF(threshold=threshold, channels=channels)

    model = nn.ModuleList(
        [create_model("sdt_2_256", dim=16, neuron="plif"), create_model("sdt_2_256", dim=16, neuron=neuron)]
    )
    model[0].head.weight.requires_grad_(False)
    optimizer = build_optimizer(model, name=name, lr=0.1, weight_decay=0.07)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decays)
    expected = {}
    for module in model.modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                decayed = isinstance(module, nn.Conv2d | nn.Linear) and kind == "weight"
                expected[id(parameter)] = 0.07 if decayed else 0.0
    assert decays == expected
    assert any(isinstance(module, ParametricLIF) and module.w.ndim == 1 for module in model.modules())


def weights_after(optimizer_of, steps=3):
    """Weights `[5, 4]` and bias `[5]` after some updates with fixed gradients, in float64."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 5).double()
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    gradients = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64) for _ in range(steps) for p in layer.parameters()
    ]
    start = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer = optimizer_of(layer)
    for step in range(steps):
        for number, parameter in enumerate(layer.parameters()):
            parameter.grad = gradients[2 * step + number].clone()
        optimizer.step()
    return [p.detach() for p in layer.parameters()], start, gradients


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_adamw_and_sgd_are_torchs(name):
    ours, *_ = weights_after(
        lambda model: build_optimizer(model, name=name, lr=0.05, weight_decay=0.2, eps=1e-6, betas=(0.8, 0.95))
    )

    def torchs(model):
        groups = [{"params": [model.weight], "weight_decay": 0.2}, {"params": [model.bias], "weight_decay": 0.0}]
        if name == "sgd":
            return torch.optim.SGD(groups, lr=0.05, momentum=0.8, nesterov=True)
        return torch.optim.AdamW(groups, lr=0.05, eps=1e-6, betas=(0.8, 0.95))

    expected, *_ = weights_after(torchs)
    for ours_, expected_ in zip(ours, expected, strict=True):
        torch.testing.assert_close(ours_, expected_, rtol=1e-12, atol=0)


@pytest.mark.parametrize("trust_clip", [False, True])
def test_lamb_is_the_papers(trust_clip):
    """Adam's direction plus decay, scaled to the weight's norm (You et al., 2020); gradients clipped to a norm of 1."""
    lr, decay, eps, (b1, b2) = 0.05, 0.2, 1e-6, (0.8, 0.95)
    ours, start, gradients = weights_after(
        lambda model: build_optimizer(
            model, name="lamb", lr=lr, weight_decay=decay, eps=eps, betas=(b1, b2), trust_clip=trust_clip
        )
    )
    weights = [value.clone() for value in start]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    ratios = []
    for step in range(3):
        pair = gradients[2 * step : 2 * step + 2]
        norm = torch.sqrt(sum((g**2).sum() for g in pair))
        for i, gradient in enumerate(pair):
            gradient = gradient / max(float(norm), 1.0)
            first[i] = b1 * first[i] + (1 - b1) * gradient
            second[i] = b2 * second[i] + (1 - b2) * gradient**2
            direction = (first[i] / (1 - b1 ** (step + 1))) / (torch.sqrt(second[i] / (1 - b2 ** (step + 1))) + eps)
            trust = 1.0
            if i == 0:  # the bias neither decays nor adapts
                direction = direction + decay * weights[i]
                trust = weights[i].norm() / direction.norm()
                ratios.append(float(trust))
                trust = trust.clamp(max=1) if trust_clip else trust
            weights[i] = weights[i] - lr * trust * direction
    assert max(ratios) > 1
    for ours_, expected in zip(ours, weights, strict=True):
        torch.testing.assert_close(ours_, expected, rtol=1e-9, atol=0)


def test_nothing_to_train_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(model, name="adamw", lr=0.1, weight_decay=0.0)


# Mixing


def mixer(**options):
    defaults = {
        "mixup": 0.5, "cutmix": 0.0, "prob": 1.0, "switch_prob": 0.5, "off_epoch": 0, "label_smoothing": 0.1,
        "num_classes": 6, "seed": 5,
    }  # fmt: skip
    return BatchMixer(**{**defaults, **options})


def batch():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(6)


def share(soft, smoothing=0.1, num_classes=6):
    """The share of each sample's own class, out of its mixed and smoothed target."""
    return (soft.diagonal() - smoothing / num_classes) / (1 - smoothing)


def test_mixup_blends_image_and_target_by_the_same_share():
    images, targets = batch()
    for step in range(10):
        mixed, soft = mixer()(images.clone(), targets, step=step, epoch=0)
        own = share(soft)
        assert torch.allclose(own, own[0].expand(6), atol=1e-6)
        torch.testing.assert_close(mixed, own[0] * images + (1 - own[0]) * images.flip(0), rtol=0, atol=1e-6)
        one_hot = torch.eye(6) * 0.9 + 0.1 / 6
        torch.testing.assert_close(soft, own[0] * one_hot + (1 - own[0]) * one_hot.flip(0))


def test_cutmix_pastes_a_rectangle_and_its_area_is_the_share():
    images, targets = batch()
    for step in range(10):
        mixed, soft = mixer(mixup=0.0, cutmix=1.0)(images.clone(), targets, step=step, epoch=0)
        pasted = (mixed != images).any(1)
        assert torch.equal(pasted[0], pasted[3])
        assert torch.equal(mixed, torch.where(pasted[:, None], images.flip(0), images))
        rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        assert pasted[0].sum() == rows * columns
        torch.testing.assert_close(share(soft)[0], 1 - pasted[0].float().mean(), rtol=0, atol=1e-6)


def test_draws_follow_from_seed_step_and_process_alone():
    images, targets = batch()
    both = {"mixup": 0.2, "cutmix": 1.0}
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    results = {}
    for seed in (5, 6):
        for process in (0, 1):
            for step in (0, 1):
                one = mixer(seed=seed, process=process, **both)
                results[seed, process, step] = one(images.clone(), targets, step=step, epoch=0)[0]
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    again = mixer(**both)
    for step in (7, 1, 0):
        mixed = again(images.clone(), targets, step=step, epoch=3)[0]
    assert torch.equal(mixed, results[5, 0, 0])
    values = list(results.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_a_batch_is_mixed_by_other_numbers_than_a_sample_of_the_same_key():
    one, drawn = mixer(seed=5, process=0), []

    def note(images, targets):
        drawn.append(np.random.rand())  # noqa: NPY002
        return images, targets

    one.mix = note
    one(*batch(), step=3, epoch=0)
    with seeded(5, 3, 0):
        assert np.random.rand() not in drawn  # noqa: NPY002
    assert len(drawn) == 1


def test_shares_are_drawn_from_beta_and_the_choice_by_its_probability():
    images, targets = batch()
    both = mixer(mixup=0.5, cutmix=1.0, prob=0.8, switch_prob=0.25)
    blended, kinds = [], {"none": 0, "mixup": 0, "cutmix": 0}
    for step in range(1000):
        mixed, soft = both(images.clone(), targets, step=step, epoch=0)
        changed = (mixed != images).float().mean()
        if not changed:
            kinds["none"] += 1
        elif torch.equal(mixed, torch.where(mixed != images, images.flip(0), images)):
            kinds["cutmix"] += 1
        else:
            kinds["mixup"] += 1
            blended.append(float(share(soft)[0]))
    # Four standard deviations of a binomial; an empty cutmix rectangle counts as none.
    assert abs(kinds["mixup"] - 600) < 4 * np.sqrt(1000 * 0.6 * 0.4)
    assert abs(kinds["cutmix"] - 200) < 4 * np.sqrt(1000 * 0.2 * 0.8) + 20
    assert kstest(blended, "beta", args=(0.5, 0.5)).pvalue > 1e-3


def test_mixing_ends_at_its_off_epoch_and_smoothing_does_not():
    images, targets = batch()
    until = mixer(off_epoch=200)
    assert not torch.equal(until(images.clone(), targets, step=0, epoch=199)[0], images)
    mixed, soft = until(images.clone(), targets, step=0, epoch=200)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(soft, torch.eye(6) * 0.9 + 0.1 / 6)
    assert not torch.equal(mixer(off_epoch=0)(images.clone(), targets, step=0, epoch=10**6)[0], images)


def test_unfit_mixing_is_refused():
    with pytest.raises(ValueError, match=r"train\.batch_size must be even, got 5"):
        mixer()(torch.rand(5, 3, 4, 4), torch.arange(5), step=0, epoch=0)
    with pytest.raises(ValueError, match="must be even, got 3"):
        check_even_batch(3)
    with pytest.raises(ValueError, match="must be above 0 to mix"):
        mixer(mixup=0.0, cutmix=0.0)


# Losses


def logits_and_targets(steps=None):
    generator = torch.Generator().manual_seed(2)
    shape = (4, 7) if steps is None else (steps, 4, 7)
    logits = 3 * torch.randn(shape, generator=generator)
    soft = torch.rand(4, 7, generator=generator)
    return logits, torch.tensor([0, 6, 3, 3]), soft / soft.sum(1, keepdim=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_timms(smoothing):
    logits, hard, soft = logits_and_targets()
    cross_entropy, binary = build_loss("ce", label_smoothing=smoothing), build_loss("bce", label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, hard), LabelSmoothingCrossEntropy(smoothing)(logits, hard))
    torch.testing.assert_close(cross_entropy(logits, soft), SoftTargetCrossEntropy()(logits, soft))
    torch.testing.assert_close(binary(logits, hard), BinaryCrossEntropy(smoothing)(logits, hard))
    torch.testing.assert_close(binary(logits, soft), BinaryCrossEntropy(0.0)(logits, soft))


def test_layer_decay_is_that_of_the_released_large_family():
    """Twelve attention blocks: 0.75 ** 13 before the first, 0.75 ** (12 - i) in block i, 1 at the heads."""
    with torch.device("meta"):
        model = create_model("sdt_v3_83m", distillation=True)
    optimizer = build_optimizer(model, name="lamb", lr=1.0, weight_decay=0.05, trust_clip=True, layer_decay=0.75)
    set_learning_rate(optimizer, 2.0)
    found = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    names = dict(model.named_parameters())
    assert len(found) == len(names)
    for start, factor in (
        ("downsamplings.3.", 0.75**13), ("stages.0.0.", 0.75**13), ("stages.2.1.", 0.75**13),
        ("stages.3.0.", 0.75**12), ("stages.3.11.", 0.75), ("head.", 1.0), ("distillation_head.", 1.0),
    ):  # fmt: skip
        rates = [found[id(weight)]["lr"] for name, weight in names.items() if name.startswith(start)]
        assert rates and rates == pytest.approx([2 * factor] * len(rates)), start
    assert all((found[id(weight)]["weight_decay"] == 0) == (weight.ndim == 1) for weight in names.values())


@pytest.mark.parametrize("name", ["sdt_8_384", "sdt_v2_15m", "spikformer_4_384", "qkformer_4_384"])
def test_layers_run_from_the_stem_to_the_heads(name):
    with torch.device("meta"):
        model = create_model(name, neuron="plif")
    optimizer = build_optimizer(model, name="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scales = {id(weight): group["lr_scale"] for group in optimizer.param_groups for weight in group["params"]}
    of_names = {name: scales[id(weight)] for name, weight in model.named_parameters()}
    heads = {scale for name, scale in of_names.items() if name.startswith(("head", "head_neuron"))}
    assert heads == {1.0} and next(iter(of_names.values())) == min(of_names.values())
    assert sorted(set(of_names.values())) == [0.5**layer for layer in reversed(range(len(set(of_names.values()))))]
    blocks = [name for name in of_names if name.startswith(("blocks.", "stages."))]
    assert [of_names[name] for name in blocks] == sorted(of_names[name] for name in blocks) and of_names[
        blocks[-1]
    ] == 0.5


def test_layers_that_a_model_does_not_tell_apart_are_refused():
    with pytest.raises(ValueError, match=r"optim\.layer_decay: Linear has no group_matcher"):
        build_optimizer(nn.Linear(2, 2), name="adamw", lr=1.0, weight_decay=0.0, layer_decay=0.75)


def test_with_layer_decay_a_step_is_smaller_the_deeper_it_is():
    torch.manual_seed(0)
    model = create_model("sdt_2_256", dim=32)
    optimizer = build_optimizer(model, name="adamw", lr=1.0, weight_decay=0.0, layer_decay=0.1)
    set_learning_rate(optimizer, 1e-2)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    # Adam's first step is the learning rate, whatever the gradient, unless that is rounding alone.
    layers = {"patch.stages.0.conv.weight": 0, "blocks.0.mlp.branch.fc1.conv.weight": 1, "head.weight": 3}
    for name, layer in layers.items():
        change = (model.get_parameter(name) - before[name]).abs().max().item()
        assert change == pytest.approx(1e-2 * 0.1 ** (3 - layer), rel=0.05), name


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_tet_is_its_formula(kind):
    logits, hard, soft = logits_and_targets(steps=5)
    target = (np.eye(7)[hard] * 0.9 + 0.1 / 7) if kind == "hard" else soft.double().numpy()
    values = logits.double().numpy()
    log_p = values - np.log(np.exp(values).sum(-1, keepdims=True))
    per_step = -(target * log_p).sum(-1).mean(-1)
    expected = 0.75 * per_step.mean() + 0.25 * ((values - 1.5) ** 2).mean()
    loss = build_loss("ce", label_smoothing=0.1, tet=True, tet_lambda=0.25, tet_means=1.5)
    assert float(loss(logits, hard if kind == "hard" else soft)) == pytest.approx(expected, rel=1e-6)


def test_losses_are_computed_in_float32():
    logits, hard, _ = logits_and_targets()
    low = logits.bfloat16()
    loss = build_loss(label_smoothing=0.1)(low, hard)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, build_loss(label_smoothing=0.1)(low.float(), hard))


def test_unfit_losses_are_refused():
    logits, hard, _ = logits_and_targets()
    with pytest.raises(ValueError, match="loss 'mse' is unknown; choose ce or bce"):
        build_loss("mse")
    with pytest.raises(ValueError, match=r"expected logits \[T, B, num_classes\].*got \[4, 7\]"):
        build_loss(tet=True)(logits, hard)
    with pytest.raises(ValueError, match=r"expected logits \[B, num_classes\], got \[1, 4, 7\]"):
        build_loss()(logits[None], hard)
