"""Feature maps of every stage, for dense prediction: segmentation, detection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn


class Backbone(nn.Module):
    """A model that computes its membranes stage by stage, each at a lower resolution or with more channels.

    A subclass has `forward_stages` and `feature_info`, from which `features` follows.
    """

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """What the stages give, one after the other, `[T, B, C, H, W]` each; whoever stops early computes no more."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_stages")

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each stage, as in timm: `num_chs`, `reduction` (image size over map size), `module` (what gives it)."""
        raise NotImplementedError(f"{type(self).__name__} has no feature_info")

    def features(self, x: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
        """The mean over time of every stage, or of those numbered in `stages`, `[B, C, H, W]` each.

        Images or frames are those of the model. Height and width are the image's divided by `reduction`, rounded up.

        Raises `ValueError` for a stage that is not there, one that comes twice, or none at all.

        >>> model = create_model("sdt_v2_15m", dims=(16, 32, 48, 64), depths=(1, 1, 1, 1, 1))
        >>> [list(feature.shape) for feature in model.features(torch.rand(2, 3, 64, 48), stages=(1, 4))]
        [[2, 16, 16, 12], [2, 64, 4, 3]]
        """
        count = len(self.feature_info)
        wanted = list(range(count)) if stages is None else list(stages)
        if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(count)):
            raise ValueError(f"stages must be different numbers from 0 to {count - 1}, got {wanted}")
        found: dict[int, Tensor] = {}
        for stage, membrane in enumerate(self.forward_stages(x)):
            if stage in wanted:
                found[stage] = membrane.mean(0)
            if stage == max(wanted):
                break
        return [found[stage] for stage in wanted]


def stage_info(channels: Sequence[int], halved: Sequence[bool], modules: Sequence[str]) -> list[dict[str, Any]]:
    """`feature_info` of stages with so many channels, which halve height and width or not."""
    reduction, found = 1, []
    for width, halves, module in zip(channels, halved, modules, strict=True):
        reduction *= 2 if halves else 1
        found.append({"num_chs": width, "reduction": reduction, "module": module})
    return found
