"""Whether the neurons of a model fired at all: a silent network computes zeros, and no finding about it means much."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from rich.table import Table

DEAD = "no neuron fired"
"""How a sentence starts about a network in which no neuron fired."""


def silence(model: nn.Module, fired: Mapping[str, bool]) -> str:
    """A sentence on the neuron layers that never fired, "" if all did; `fired` says by name which ones did."""
    silent = [name for name, any_spike in fired.items() if not any_spike]
    if not silent:
        return ""
    if len(silent) == len(fired):
        return f"{DEAD}: {_cause(model)}"
    listed = ", ".join(silent[:8]) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
    return f"{len(silent)} of {len(fired)} neuron layers never fired: {listed}"


def _cause(model: nn.Module) -> str:
    counts = [getattr(module, "num_batches_tracked", None) for module in model.modules()]
    seen = [int(count) for count in counts if isinstance(count, Tensor) and not count.is_meta]
    if not seen:
        return "no norm brings its input to the thresholds; look at the range of the input and at the weights"
    batches = f"the norms have seen {max(seen)} batch{'es' if max(seen) != 1 else ''}"
    if max(seen):
        return f"{batches}; look at the thresholds and at the range and scaling of the input"
    return f"{batches}; train the model, load trained weights, or settle the norms with calibrate_norms(model, batches)"


def merge_fired(parts: Iterable[Mapping[str, bool]]) -> dict[str, bool]:
    """Which layers fired in any process."""
    merged: dict[str, bool] = {}
    for part in parts:
        for name, fired in part.items():
            merged[name] = merged.get(name, False) or fired
    return merged


def warn_if_dead(sentence: str) -> None:
    """Warns if no neuron fired at all."""
    if sentence.startswith(DEAD):
        warnings.warn(sentence, stacklevel=3)


def as_text(lines: Iterable[str], table: Table) -> str:
    """The lines, then the printed table."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=160).print(table)
    return "\n".join([*lines, text.getvalue()])
