"""How much figures differ from sample to sample, from sums that are added over batches and processes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Moments:
    """Means and products of deviations `[F, F]` of F values that each sample has, over `samples`.

    They give the standard deviation of any weighted sum of the values, and do not grow with the number of samples.
    Parts are merged as in Chan, Golub and LeVeque (1979), without the loss of precision of sums of squares.
    """

    names: list[Hashable] = field(default_factory=list)
    samples: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    products: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    @classmethod
    def of(cls, values: Mapping[Any, np.ndarray]) -> Moments:
        """The moments of one batch, each value `[B]`."""
        if not values:
            return cls()
        table = np.stack([np.asarray(value, dtype=np.float64) for value in values.values()], axis=1)
        mean = table.mean(0)
        return cls(list(values), len(table), mean, (table - mean).T @ (table - mean))

    def add(self, other: Moments) -> None:
        """Adds the samples of another batch or process; a value that only one of them has is 0 in the other."""
        names = list(dict.fromkeys([*self.names, *other.names]))
        (a, a_products), (b, b_products) = self._spread(names), other._spread(names)
        samples = self.samples + other.samples
        if samples:
            share, apart = other.samples / samples, b - a
            self.mean = a + share * apart
            self.products = a_products + b_products + self.samples * share * np.outer(apart, apart)
        self.names, self.samples = names, samples

    def _spread(self, names: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
        if names == self.names:
            return self.mean, self.products
        place = {name: at for at, name in enumerate(names)}
        at = np.array([place[name] for name in self.names], dtype=int)
        mean, products = np.zeros(len(names)), np.zeros((len(names), len(names)))
        mean[at], products[np.ix_(at, at)] = self.mean, self.products
        return mean, products

    def std(self, weights: Mapping[Any, float]) -> float | None:
        """The standard deviation over the samples of a weighted sum; None for fewer than two."""
        if self.samples < 2:
            return None
        chosen = np.array([weights.get(name, 0.0) for name in self.names])
        return float(np.sqrt(max(chosen @ self.products @ chosen, 0.0) / (self.samples - 1)))


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together."""
    result = Moments()
    for part in parts:
        result.add(part)
    return result


def of_first_steps(values: Mapping[Any, np.ndarray]) -> list[Moments]:
    """The moments of one batch after the first 1, 2, ... steps, where each value `[T, B]` is a cumulative sum.

    A value with fewer steps than another keeps its last.
    """
    steps = max((len(value) for value in values.values()), default=0)
    return [
        Moments.of({name: each[min(step, len(each) - 1)] for name, each in values.items()}) for step in range(steps)
    ]


def merged_steps(parts: Iterable[Sequence[Moments]]) -> list[Moments]:
    """The moments of all parts together, for the first 1, 2, ... steps; a shorter part keeps its last."""
    known = [part for part in parts if part]
    steps = max(map(len, known), default=0)
    return [merged(part[min(step, len(part) - 1)] for part in known) for step in range(steps)]


def interval(mean: float, std: float | None, samples: int, confidence: float) -> tuple[float, float] | None:
    """The confidence interval of a mean over samples, by Student's distribution; None if there is no spread.

    Raises `ValueError` for a confidence that is not between 0 and 1.
    """
    check_confidence(confidence)
    if std is None or samples < 2:
        return None
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise ImportError(f"intervals need scipy (pip install 'sdt_blocks[analysis]'): {error}") from None

    half = float(stdtrit(samples - 1, (1 + confidence) / 2)) * std / samples**0.5
    return mean - half, mean + half


def share_interval(share: float, samples: int, confidence: float) -> tuple[float, float] | None:
    """The confidence interval of a share of `samples`, such as an accuracy (Wilson, 1927); None without samples.

    Raises `ValueError` for a confidence that is not between 0 and 1.
    """
    check_confidence(confidence)
    if samples < 1:
        return None
    from scipy.special import ndtri

    z = float(ndtri((1 + confidence) / 2))
    middle = share + z * z / (2 * samples)
    half = z * (share * (1 - share) / samples + (z / (2 * samples)) ** 2) ** 0.5
    low, high = ((middle + sign * half) / (1 + z * z / samples) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def level(confidence: float) -> str:
    """A confidence level as text."""
    return f"{confidence * 100:g} %"


def check_confidence(confidence: float) -> None:
    """Raises `ValueError` unless the level lies between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95, got {confidence!r}")
