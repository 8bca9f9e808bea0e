"""The model of a configuration, its initial weights, and its state under each way of distributing it over processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from sdt_blocks import create_model, load_model
from sdt_blocks.analysis.tables import counted
from sdt_blocks.models.registry import model_options
from sdt_blocks.models.released import read_released

from .config import Config, ConfigError, changed, model_keywords
from .trained import class_names

HEAD, SECOND_HEAD = "head.", "distillation_head."
_OF_HEADS_AND_TRAINING = ("num_classes", "drop_path", "per_step", "distillation")
"""Options that change nothing between the image and the heads of a trained model."""


def fit_to_data(config: Config, *, in_channels: int, num_classes: int) -> Config:
    """The configuration of a model for data with these channels and classes, and for the loss it is trained with.

    Raises `ConfigError` if it contradicts the data.
    """
    values: dict[str, Any] = {"model.in_channels": in_channels, "model.num_classes": num_classes}
    for key, of_data in values.items():
        asked = getattr(config.model, key.removeprefix("model."))
        if asked not in (None, of_data):
            raise ConfigError(f"{key}={asked}, but the data has {of_data}; leave {key} out")
    if config.train.tet:
        values["model.per_step"] = True
    if config.train.teacher is not None:
        values["model.distillation"] = True
    return changed(config, values)


def build_model(config: Config) -> Any:
    """The named variant with the configured overrides. Raises `ConfigError`."""
    options, known = model_keywords(config), model_options(config.model.name)
    if foreign := [key for key in options if key not in known]:
        raise ConfigError(
            f"model.{', model.'.join(foreign)}: {config.model.name} has no such option; leave it out, and where a file "
            f"sets it add {' '.join(f'model.{key}=null' for key in foreign)}. Its options are {', '.join(known)}"
        )
    torch.manual_seed(config.seed)
    try:
        return create_model(config.model.name, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.name={config.model.name}: {error}") from error


def load_initial_weights(model: Any, source: str, names: Sequence[str]) -> str:
    """Fill the model from a run folder, a saved model or a released checkpoint; returns a sentence on what was loaded.

    The head stays as initialized if its shape or its classes' names differ, as in fine-tuning for other classes. A
    second head is loaded if both models have one, and is new if the weights have none. Options without weights of their
    own (time steps, neuron, pooling, ...) and the preparation of images may differ; the sentence names what does.
    Raises `ConfigError` if anything else does not fit.
    """
    path = Path(source)
    try:
        pretrained, assumed = (load_model(path), []) if path.is_dir() else read_released(path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"train.init_checkpoint: {error}") from error
    expected, given = model.state_dict(), pretrained.state_dict()
    new_head = class_names(path, pretrained) not in (None, list(names)) or any(
        k.startswith(HEAD) and given.get(k, v).shape != v.shape for k, v in expected.items()
    )
    second = [any(key.startswith(SECOND_HEAD) for key in keys) for keys in (expected, given)]
    fresh = ((HEAD,) if new_head else ()) + ((SECOND_HEAD,) if new_head or not all(second) else ())
    given = {key: value for key, value in given.items() if not key.startswith(fresh)}
    wrong = [
        key
        for key in {**expected, **given}
        if not key.startswith(fresh)
        and (key not in given or key not in expected or given[key].shape != expected[key].shape)
    ]
    if wrong:
        raise ConfigError(
            f"train.init_checkpoint={source} is of another architecture: {counted(len(wrong), 'weight')} missing, "
            f"unexpected or of another shape ({', '.join(wrong[:4])} ...); set model.name, model.dim and the like to "
            f"its values"
        )
    model.load_state_dict(given, strict=False)
    note = ", new head for the data's classes" if new_head else ""
    if any(second) and SECOND_HEAD in fresh:
        note += ", new second head" if second[0] else ", second head left out"
    there, here = ({key: _as_read(value) for key, value in _settings(one).items()} for one in (pretrained, model))
    if other := [key for key in here if key in there and key not in assumed and there[key] != here[key]]:
        note += "; trained with " + ", ".join(f"{key}={there[key]} (here {here[key]})" for key in other)
    if assumed:
        note += "; the file does not tell " + ", ".join(assumed)
    return f"weights from {source}{note}"


def _settings(model: Any) -> dict[str, Any]:
    """What changes the answers of a trained model besides its weights: its options, and how its images are prepared."""
    options = {key: value for key, value in model.config.items() if key not in _OF_HEADS_AND_TRAINING}
    return options | ({} if model.card is None else model.card.preparation)


def _as_read(value: Any) -> Any:
    """An option as a saved model has it, in whose file a tuple is a list."""
    return list(value) if isinstance(value, tuple) else value


def freeze_all_but_head(model: nn.Module) -> None:
    """Linear probing: only the head's parameters keep their gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEAD))


def whole_model(accelerator: Accelerator, config: Config, model: Any) -> Any:
    """The whole model on this process: without its wrapper, and gathered if FSDP has sharded it.

    It is used for evaluation, where processes may then have different numbers of batches, and for checkpoints.
    """
    plain = accelerator.unwrap_model(model)
    if accelerator.distributed_type != DistributedType.FSDP:
        return plain
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole = build_model(config)
    whole.load_state_dict(weights)
    whole.card = plain.card
    return whole.to(accelerator.device)


def optimizer_state(accelerator: Accelerator, model: Any, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state, gathered if FSDP has sharded it; all processes call this, and one saves the result."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return optimizer.state_dict()  # type: ignore[no-any-return]
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer.optimizer, options=options)


def restore_optimizer(accelerator: Accelerator, model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Restore the result of `optimizer_state`, sharded if the model is."""
    if accelerator.distributed_type != DistributedType.FSDP:
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer.optimizer, state, options=StateDictOptions(full_state_dict=True))
