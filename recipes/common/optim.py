"""Optimizer, learning-rate schedule, batch mixing and losses of the recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from sdt_datasets.image_transforms import seeded

Loss = Callable[[Tensor, Tensor], Tensor]

# Keeps the draws of the batch mixing apart from those of the samples, which are keyed by seed, epoch and index.
_MIXING = 1


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    eps: float | None = None,
    betas: Sequence[float] | None = None,
    trust_clip: bool = False,
    layer_decay: float | None = None,
) -> torch.optim.Optimizer:
    """timm's "lamb", "adamw" or "sgd" over the parameters that require gradients.

    Weight decay applies to weights of two or more dimensions: not to biases, norms, or `ParametricLIF`'s time
    constants. SGD is Nesterov's with the first of `betas` as its momentum. LAMB divides by the global gradient norm if
    that exceeds 1, as timm's does by default; with `trust_clip` no layer's trust ratio exceeds 1 either. With
    `layer_decay` layer l of L learns at `layer_decay ** (L - l)` times the rate, the group's `lr_scale`; layers are
    those of the model's `group_matcher`.

    Raises `ValueError` if no parameter requires gradients, or the model does not define its layers.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires gradients: there is nothing to train")
    if layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ValueError(f"optim.layer_decay: {type(model).__name__} has no group_matcher (timm's): leave it out")
    given: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "layer_decay": layer_decay}
    if name == "sgd":
        return create_optimizer_v2(model, "sgd", momentum=betas[0] if betas else 0.9, **given)
    options = {"eps": eps, "betas": tuple(betas) if betas else None}
    given |= {key: value for key, value in options.items() if value is not None}
    if trust_clip:
        given["trust_clip"] = True
    return create_optimizer_v2(model, name, **given)


def learning_rate(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: int,
    lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_prefix: bool = False,
) -> float:
    """The learning rate of update `step` (0 is the first): it depends on nothing else, so a resumed run has the same.

    With t = step / steps_per_epoch epochs done: a line from `warmup_lr` to `lr` during the warm-up; then
    `min_lr + (lr - min_lr) (1 + cos(pi t / epochs)) / 2`, where t includes the warm-up, as in timm's cosine schedule;
    and `min_lr` from `epochs` on, the cool-down. With `warmup_prefix` the cosine starts where the warm-up ends.
    """
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return warmup_lr + step * (lr - warmup_lr) / warmup
    if step >= total:
        return min_lr
    done = (step - warmup) / (total - warmup) if warmup_prefix else step / total
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times its `lr_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def batch_scale(total_batch: int, lr_batch: int | None) -> float:
    """The factor of the linear scaling rule, `total_batch / lr_batch`; 1 if no reference batch is given.

    `total_batch` is samples in one update: batch size x accumulation x processes.
    """
    return total_batch / lr_batch if lr_batch else 1.0


class BatchMixer:
    """timm's mixup and cutmix on a batch, with draws that depend only on (seed, step, process).

    `mixer(images, targets, step=, epoch=)` takes images `[B, C, H, W]` and class indices `[B]`, mixes the images in
    place and returns them with smoothed, mixed targets `[B, num_classes]`. From `off_epoch` on (0: never) it only
    smooths. `step` counts batches, not updates.

    Raises `ValueError` for an odd batch: image i is mixed with image B - 1 - i.
    """

    def __init__(
        self,
        *,
        mixup: float,
        cutmix: float,
        prob: float,
        switch_prob: float,
        off_epoch: int,
        label_smoothing: float,
        num_classes: int,
        seed: int,
        process: int = 0,
    ) -> None:
        if mixup <= 0 and cutmix <= 0:
            raise ValueError(f"mixup or cutmix must be above 0 to mix batches, got mixup={mixup} and cutmix={cutmix}")
        self.mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=prob,
            switch_prob=switch_prob,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )
        self.off_epoch, self.seed, self.process = off_epoch, seed, process

    def __call__(self, images: Tensor, targets: Tensor, *, step: int, epoch: int) -> tuple[Tensor, Tensor]:
        check_even_batch(len(images))
        self.mix.mixup_enabled = not self.off_epoch or epoch < self.off_epoch
        with seeded(self.seed, step, self.process, _MIXING):
            mixed, soft = self.mix(images, targets)
        return mixed, soft


def check_even_batch(batch_size: int) -> None:
    """Raise `ValueError` for a batch that mixup cannot pair."""
    if batch_size % 2:
        raise ValueError(
            f"mixup and cutmix pair the images of a batch: train.batch_size must be even, got {batch_size}"
        )


def build_loss(
    name: str = "ce",
    *,
    label_smoothing: float = 0.0,
    tet: bool = False,
    tet_lambda: float = 0.001,
    tet_means: float = 1.0,
) -> Loss:
    """The training loss, called as `loss(logits, targets)`; computed in float32.

    Logits are `[B, num_classes]`; targets are class indices `[B]`, which are smoothed here, or soft ones `[B,
    num_classes]`, which are not (the mixer has smoothed them). "ce" is cross entropy, "bce" binary cross entropy
    averaged over samples and classes. With `tet` (temporal efficient training, Deng et al., 2022,
    https://arxiv.org/abs/2202.11946)
    logits are `[T, B, num_classes]` and

        loss = (1 - tet_lambda) * mean_t ce(logits[t], targets) + tet_lambda * mean((logits - tet_means)^2)

    Raises `ValueError` for an unknown name, or for logits of another shape.
    """
    if name not in ("ce", "bce"):
        raise ValueError(f"loss {name!r} is unknown; choose ce or bce")

    def of_batch(logits: Tensor, targets: Tensor) -> Tensor:
        if name == "bce":
            return F.binary_cross_entropy_with_logits(logits, _soft(targets, logits.shape[-1], label_smoothing))
        return F.cross_entropy(logits, targets, label_smoothing=0.0 if targets.is_floating_point() else label_smoothing)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        if logits.ndim != (3 if tet else 2):
            expected = "[T, B, num_classes] (a model with per_step=True)" if tet else "[B, num_classes]"
            raise ValueError(f"expected logits {expected}, got {list(logits.shape)}")
        if not tet:
            return of_batch(logits, targets)
        per_step = torch.stack([of_batch(step, targets) for step in logits]).mean()
        return (1 - tet_lambda) * per_step + tet_lambda * (logits - tet_means).square().mean()

    return loss


def distilled(loss: Loss, kind: str = "hard") -> Callable[[Any, Any], Tensor]:
    """The loss of a student with two heads, called as `loss((logits, second), (targets, teacher's logits))`.

        0.5 * loss(logits, targets) + 0.5 * (cross entropy of the second head with the teacher's output)

    "hard": with the teacher's class. "soft": the divergence from the teacher's probabilities, mean over samples and
    classes (Touvron et al., 2021, https://arxiv.org/abs/2012.12877, at temperature 1).

    Raises `ValueError` for an unknown kind.
    """
    if kind not in ("hard", "soft"):
        raise ValueError(f"distillation {kind!r} is unknown; choose hard or soft")

    def of_both(outputs: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Tensor:
        (logits, second), (targets, taught) = outputs, wanted
        second = second.float()
        if kind == "hard":
            from_teacher = F.cross_entropy(second, taught.argmax(-1))
        else:
            student, teacher = second.log_softmax(-1), taught.log_softmax(-1)
            from_teacher = F.kl_div(student, teacher, reduction="sum", log_target=True) / second.numel()
        return (loss(logits, targets) + from_teacher) / 2

    return of_both


def _soft(targets: Tensor, num_classes: int, smoothing: float) -> Tensor:
    if targets.is_floating_point():
        return targets
    return F.one_hot(targets, num_classes) * (1 - smoothing) + smoothing / num_classes
