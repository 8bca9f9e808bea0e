"""Attention maps: where the output of a mixer is high (Yao et al., 2023, figure 3), and overlays on the image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks.sizes import check_shape
from ..steps import find_mixers
from .probe import Forward, Probe, unwrap


def attention_maps(
    model: nn.Module,
    images: Any,
    block: int | None = -1,
    *,
    per_step: bool = False,
    forward: Forward | None = None,
) -> Tensor:
    """The mean of a mixer's output over channels and time steps, or with `per_step` over channels only.

    This is the firing rate of q * a in a `MaskMixer`, and the mean of scale * q (k^T v) in a `LinearSpikeMixer`.
    `block` is the position among the mixers of the model that were called, from the end if negative; None stacks all.

    Shapes: images `[B, C, H, W]` or frames `[B, T, C, H, W]` -> `[B, H', W']`; `per_step` adds T in front, and
    `block=None` the number of blocks in front of that.

    Raises `ValueError` if no mixer has an output `[T, B, C, H', W']`, or if the maps of the blocks have different
    sizes.

    >>> maps = attention_maps(example_model(), example_images()[0], per_step=True)
    >>> maps.shape, bool(maps.any())
    (torch.Size([4, 20, 4, 4]), True)
    """
    found = maps_of_blocks(model, images, forward)
    if not found:
        raise ValueError(f"{type(unwrap(model)).__name__} has no mixer that took part, so there is nothing to map")
    if block is not None and not -len(found) <= block < len(found):
        raise ValueError(f"block must lie between {-len(found)} and {len(found) - 1}, got {block}")
    chosen = [one if per_step else one.mean(0) for one in (found if block is None else [found[block]])]
    if block is not None:
        return chosen[0]
    if len({tuple(one.shape) for one in chosen}) > 1:
        raise ValueError(
            f"the blocks' grids differ ({[list(one.shape) for one in chosen]}); ask for one block at a time"
        )
    return torch.stack(chosen)


def maps_of_blocks(model: nn.Module, images: Any, forward: Forward | None = None) -> list[Tensor]:
    """A map `[T, B, H', W']` for each mixer that was called, in the order of the model's modules."""
    with Probe(model, forward=forward) as probe:
        mixers = find_mixers(probe.model)
        calls: dict[str, list[Tensor]] = {name: [] for name in mixers}
        for name, mixer in mixers.items():
            probe.watch(mixer, _keep(calls[name], name))
        for _ in probe.run([images]):
            pass
    return [torch.cat(maps) for maps in calls.values() if maps]


def _keep(maps: list[Tensor], name: str) -> Any:
    def keep(module: nn.Module, inputs: Any, mixed: Tensor) -> None:
        if mixed.ndim != 5:
            raise ValueError(f"{name}: expected an output [T, B, C, H, W] to map, got {list(mixed.shape)}")
        maps.append(mixed.float().mean(2))

    return keep


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps `[..., H', W']` at the size of the image, `[..., *size]`, interpolated bilinearly.

    Raises `ValueError` for empty maps and sizes below 1, `TypeError` for a size that is no whole number.
    """
    check_shape("size", size, dimensions=2)
    _check_dimensions("maps", "[..., H', W']", maps, maps.ndim >= 2)
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)


def overlay(image: Tensor, attention: Tensor, *, strength: float = 0.6, colormap: str = "inferno") -> Tensor:
    """An attention map over its image: RGB in 0..1, `[H, W, 3]`.

    `image` is `[C, H, W]`, or frames `[T, C, H, W]` which are averaged, with values in any range; 3 channels are taken
    as RGB, otherwise channels are summed to gray. `attention` is `[H', W']`; its highest value gets the colormap's last
    color and covers the image with `strength`, and where it is zero the image is unchanged. Needs matplotlib.

    Raises `ValueError` for other shapes.
    """
    from matplotlib import colormaps

    _check_dimensions("image", "[C, H, W] or [T, C, H, W]", image, image.ndim in (3, 4))
    _check_dimensions("attention", "[H', W']", attention, attention.ndim == 2)
    image = image.float().cpu()
    picture = image.mean(0) if image.ndim == 4 else image
    picture = picture if len(picture) == 3 else picture.sum(0, keepdim=True).expand(3, -1, -1)
    picture = _stretch(picture).permute(1, 2, 0)
    heat = upsample(attention.float().cpu(), (picture.shape[0], picture.shape[1]))
    heat = heat / heat.max().clamp(min=1e-12)
    colors = torch.from_numpy(colormaps[colormap](heat.numpy())[..., :3]).float()
    covered = strength * heat.unsqueeze(-1)
    return (1 - covered) * picture + covered * colors


def _check_dimensions(name: str, expected: str, value: Tensor, fits: bool) -> None:
    if not fits or 0 in value.shape:
        raise ValueError(f"{name}: expected {expected} with nothing empty, got {list(value.shape)}")


def _stretch(picture: Tensor) -> Tensor:
    low, high = picture.min(), picture.max()
    return (picture - low) / (high - low).clamp(min=1e-12)
