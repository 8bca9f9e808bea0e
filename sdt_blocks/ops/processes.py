"""What the processes of a group exchange if a norm's batch is shared by all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from .registered import registered


@registered("sdt_blocks::gathered")
def gathered(values: Tensor, group: str) -> Tensor:
    """The values of every process of a group `[processes, ...]`, in the same order in all of them."""
    found = [torch.empty_like(values) for _ in range(_size(group))]
    distributed.all_gather(found, values.contiguous(), group=_named(group))
    return torch.stack(found)


@gathered.register_fake
def _(values, group):
    return values.new_empty(_size(group), *values.shape)


def _named(group: Any) -> distributed.ProcessGroup:
    """A group by its name: registered ops cannot take a group itself."""
    return distributed.distributed_c10d._resolve_process_group(group)


def _size(group: str) -> int:
    return distributed.get_world_size(_named(group))


def merged_statistics(mean: Tensor, variance: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance `[...]` and number of the values of all processes, from those of the `count` here."""
    own = torch.cat([mean.flatten(), variance.flatten(), mean.new_full((1,), count)])
    found = gathered(own, group)
    means, variances = found[:, :-1].unflatten(1, (2, *mean.shape)).unbind(1)
    counts = found[:, -1].view(-1, *[1] * mean.ndim)
    total = counts.sum()
    middle = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - middle).square())).sum(0) / total
    return middle, spread, total


def added_up(sums: Tensor, count: int, group: str) -> tuple[Tensor, Tensor]:
    """Sums of the same shape and a count, added up over all processes."""
    found = gathered(torch.cat([sums.flatten(), sums.new_full((1,), count)]), group).sum(0)
    return found[:-1].view_as(sums), found[-1]
