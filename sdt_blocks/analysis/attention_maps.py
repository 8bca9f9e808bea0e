"""Attention maps: where the spikes of q * a lie (Yao et al., 2023, figure 3), and how they look over the image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .probe import Forward, Probe, find_attention


def attention_maps(
    model: nn.Module,
    images: Any,
    block: int | None = -1,
    *,
    per_step: bool = False,
    forward: Forward | None = None,
) -> Tensor:
    """The mean of the spikes of q * a over channels and time steps, or with `per_step` over channels alone.

    `block` counts the spike-driven self-attention modules of the model, from the end if negative; None stacks them all.

    Shapes: images `[B, C, H, W]` or frames `[B, T, C, H, W]` -> `[B, H', W']`, values in 0..1; `per_step` puts T before
    that, and `block=None` the number of blocks before all.

    Raises `ValueError` where there is no such attention, or the blocks have grids of different sizes.

    >>> maps = attention_maps(example_model(), example_images()[0], per_step=True)
    >>> maps.shape, bool(maps.any())
    (torch.Size([4, 20, 4, 4]), True)
    """
    with Probe(model, forward=forward) as probe:
        attention = find_attention(probe.model)
        if not attention:
            raise ValueError(
                f"{type(probe.model).__name__} has no SpikeDrivenSelfAttention, so there is nothing to map"
            )
        if block is not None and not -len(attention) <= block < len(attention):
            raise ValueError(f"block must lie between {-len(attention)} and {len(attention) - 1}, got {block}")
        chosen = list(attention) if block is None else [list(attention)[block]]
        maps: dict[str, Tensor] = {}
        for name in chosen:
            probe.watch(attention[name].mixer.masked, _keep(maps, name))
        for _ in probe.run([images]):
            pass
    found = [maps[name] if per_step else maps[name].mean(0) for name in chosen]
    if block is not None:
        return found[0]
    if len({tuple(one.shape) for one in found}) > 1:
        raise ValueError(
            f"the blocks' grids differ ({[list(one.shape) for one in found]}); ask for one block at a time"
        )
    return torch.stack(found)


def _keep(maps: dict[str, Tensor], name: str) -> Any:
    return lambda module, inputs, spikes: maps.update({name: spikes.float().mean(2)})


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps `[..., H', W']` at the size of the image, `[..., *size]`, interpolated bilinearly."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)


def overlay(image: Tensor, attention: Tensor, *, strength: float = 0.6, colormap: str = "inferno") -> Tensor:
    """An attention map over its image: RGB in 0..1, `[H, W, 3]`.

    `image` is `[C, H, W]`, or frames `[T, C, H, W]` which are averaged, of any range; with 3 channels it is taken as
    RGB, else its channels are added up to grey. `attention` is `[H', W']`; its highest value gets the colormap's last
    colour and covers the image with `strength`, and where it is zero the image stays as it is. Needs matplotlib.
    """
    from matplotlib import colormaps

    image = image.float().cpu()
    picture = image.mean(0) if image.ndim == 4 else image
    picture = picture if len(picture) == 3 else picture.sum(0, keepdim=True).expand(3, -1, -1)
    picture = _stretch(picture).permute(1, 2, 0)
    heat = upsample(attention.float().cpu(), (picture.shape[0], picture.shape[1]))
    heat = heat / heat.max().clamp(min=1e-12)
    colors = torch.from_numpy(colormaps[colormap](heat.numpy())[..., :3]).float()
    covered = strength * heat.unsqueeze(-1)
    return (1 - covered) * picture + covered * colors


def _stretch(picture: Tensor) -> Tensor:
    low, high = picture.min(), picture.max()
    return (picture - low) / (high - low).clamp(min=1e-12)
