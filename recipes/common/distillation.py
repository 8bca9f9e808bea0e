"""The teacher of a second head: any image model of timm, which sees the same images as the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import Config, ConfigError


class Teacher:
    """Logits `[B, num_classes]` of a frozen timm model for normalized images `[B, C, H, W]`, without gradients."""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.model = model.requires_grad_(False).eval().to(accelerator.device)
        self.accelerator = accelerator

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with self.accelerator.autocast():
            logits: Tensor = self.model(images)
        return logits.float()


def build_teacher(config: Config, accelerator: Accelerator, sample: Tensor, num_classes: int) -> Teacher | None:
    """The teacher that `train.teacher` names, or None.

    Raises `ConfigError` if timm does not know it, its weights cannot be loaded, or it does not fit the data: the number
    of classes, the size, or the mean and standard deviation that it was trained with.
    """
    name = config.train.teacher
    if name is None:
        return None
    if sample.ndim != 3:
        raise ConfigError(f"train.teacher={name} sees images; the data gives samples of shape {list(sample.shape)}")
    weights = config.train.teacher_weights
    try:
        # Weights of other classes are refused below, not replaced by random ones.
        model = timm.create_model(name, pretrained=weights is None, **({"num_classes": num_classes} if weights else {}))
    except Exception as error:  # whatever an unknown name, the network or the cache makes of it
        raise ConfigError(
            f"train.teacher={name}: {error or type(error).__name__}; give a name that timm.list_models() has, and "
            f"where its weights cannot be fetched, their file in train.teacher_weights"
        ) from error
    if weights is not None:
        fill(model, Path(weights))
    teacher = Teacher(model, accelerator)
    check_fit(name, model, config, num_classes)
    try:
        teacher(sample[None].to(accelerator.device))
    except Exception as error:
        raise ConfigError(f"train.teacher={name} cannot see images of {list(sample.shape)}: {error}") from error
    return teacher


def fill(model: nn.Module, path: Path) -> None:
    """Load a safetensors file, or a torch file with only tensors, into the model. Raises `ConfigError`."""
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            content = next((content[key] for key in ("state_dict", "model") if key in content), content)
        model.load_state_dict(content)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"train.teacher_weights={path}: {error}") from error
    except Exception as error:  # whatever a damaged file, a pickle that wants more, or another model's weights raise
        first = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"train.teacher_weights={path} does not hold the teacher's weights: {first}") from error


def check_fit(name: str, model: Any, config: Config, num_classes: int) -> None:
    """Raise `ConfigError` if the teacher was trained for other classes or other images."""
    if model.num_classes != num_classes:
        raise ConfigError(
            f"train.teacher={name} knows {model.num_classes} classes, the data has {num_classes}; give weights of "
            f"these classes in train.teacher_weights"
        )
    trained = getattr(model, "pretrained_cfg", None) or {}
    for key in ("mean", "std"):
        expected, given = trained.get(key), getattr(config.data, key)
        if expected and [round(value, 3) for value in expected] != [round(value, 3) for value in given]:
            raise ConfigError(
                f"train.teacher={name} was trained with data.{key}={list(expected)}, but the data has {given}; both "
                f"see the same images, so set data.{key} to the teacher's"
            )
