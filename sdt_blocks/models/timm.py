"""The models of the kit in timm: importing this module makes their names known to `timm.create_model`.

timm is optional (`pip install 'sdt_blocks[timm]'`); `import sdt_blocks` does not import it. timm's own scripts know the
names if they are started as `python -m sdt_blocks.models.timm train.py --model sdt_8_384 ...`.

>>> import timm, sdt_blocks.models.timm
>>> model = timm.create_model("sdt_2_256", num_classes=7, in_chans=1, drop_path_rate=0.1)
>>> timm.list_models("sdt_2_*")
['sdt_2_256', 'sdt_2_256_dvs', 'sdt_2_256_gesture', 'sdt_2_512']
"""

from __future__ import annotations

import functools
import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
except ImportError as error:
    raise ImportError(f"sdt_blocks.models.timm needs timm (pip install 'sdt_blocks[timm]'): {error}") from None

from .family import Family
from .registry import create_model, families

_OURS = {"in_chans": "in_channels", "drop_path_rate": "drop_path"}
"""timm's names of options, and the kit's."""
_NEUTRAL = {"drop_rate": (0,), "drop_block_rate": (0,), "drop_path_rate": (0,), "global_pool": ("", "avg")}
"""Options that timm's scripts pass to every model, with the values that are ignored if a family has no such option."""

_IMAGENET_CLASSES, _IMAGENET_SIZE, _CIFAR_SIZE, _EVENT_SIZE, _EVENT_CHANNELS = 1000, 224, 32, 128, 2

default_cfgs: dict[str, Any] = {}
__all__ = ["register_models"]


def register_models() -> list[str]:
    """Makes the variants of all registered families known to timm, and returns the names that are new.

    Importing the module does this; call it again after `sdt_blocks.models.register`. A name that timm already uses is
    not overwritten, and a family without the option `in_channels`, which timm sets for every model, is left out.
    """
    names = []
    for family in families().values():
        for name in family.variants:
            if "in_channels" in family.options and not is_model(name):
                default_cfgs.update(generate_default_cfgs({name: _default_cfg(family, name)}))
                globals()[name] = register_model(_entrypoint(name))  # timm lists it in __all__
                names.append(name)
    return names


def _default_cfg(family: Family, name: str) -> dict[str, Any]:
    """How timm prepares images, and the names of the layers that fine-tuning replaces.

    For data other than ImageNet's images, the recipes' configurations say more.
    """
    options = {key: keyword.default for key, keyword in family.options.items()} | dict(family.variants[name])
    channels, classes = options["in_channels"], options["num_classes"]
    sizes = {_EVENT_CHANNELS: _EVENT_SIZE, 3: _IMAGENET_SIZE if classes == _IMAGENET_CLASSES else _CIFAR_SIZE}
    size = sizes.get(channels, _IMAGENET_SIZE)
    prepared: dict[str, Any] = {"mean": (0.0,) * channels, "std": (1.0,) * channels, "crop_pct": 1.0}
    if channels == 3:
        prepared = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "crop_pct": 0.875}
    if family.card is not None and classes == _IMAGENET_CLASSES:
        prepared = family.card.preparation
    return {
        "url": "",
        "num_classes": classes,
        "input_size": (channels, size, size),
        "interpolation": "bicubic",
        "first_conv": _first_convolution(family.name),
        "classifier": "head",
        "license": "apache-2.0",
        **prepared,
    }


@functools.cache
def _first_convolution(family: str) -> str:
    """The name of the convolution that sees the image, the same in every variant of a family; "" if there is none."""
    known = families()[family]
    with torch.device("meta"):
        built = known.model(**next(iter(known.variants.values())))
    return next((name for name, module in built.named_modules() if isinstance(module, nn.Conv2d)), "")


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise RuntimeError(
                f"timm has no weights of {name}, pretrained=True finds none: load what its authors released by "
                f"sdt_blocks.load_released_checkpoint(file), or a saved model by sdt_blocks.load_model(folder)"
            )
        features: dict[str, Any] = {"out_indices": None, "feature_cls": "getter"}
        build = _Built(name)
        options = build.as_timm_calls(options)
        built: nn.Module = build_model_with_cfg(build, name, False, feature_cfg=features, **options)
        return built

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"`sdt_blocks.create_model({name!r})`, with options as timm calls them."
    return entrypoint


class _Built:
    """`create_model` for one name, with timm's names of options or the kit's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known = next(family.options for family in families().values() if name in family.variants)

    def as_timm_calls(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options under timm's names, which timm gives values of its own if they are missing.

        Raises `TypeError` for an option that has two values, one under each name.
        """
        given = dict(options)
        for theirs, ours in _OURS.items():
            if ours in given and ours in self.known:
                value = given.pop(ours)
                if given.setdefault(theirs, value) != value:
                    raise TypeError(f"{theirs}={given[theirs]!r} and {ours}={value!r} are one option: give one of them")
        return given

    def __call__(self, **options: Any) -> nn.Module:
        names = {key: ours if (ours := _OURS.get(key, key)) in self.known else key for key in options}
        neutral = [key for key in options if names[key] not in self.known and options[key] in _NEUTRAL.get(key, ())]
        model: Any = create_model(self.name, **{names[key]: options[key] for key in options if key not in neutral})
        model.in_chans = model.config["in_channels"]
        return model  # type: ignore[no-any-return]


register_models()

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("name the script to run: python -m sdt_blocks.models.timm train.py [its arguments]")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
