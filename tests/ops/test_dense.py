"""The fused steps of evaluation against the equations, bit for bit, and against independent arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdt_blocks.ops import dense
from sdt_blocks.ops.cpu.build import BuildError

NEURONS = {
    "LIF": (torch.tensor(0.5), 1.0, "zero", False),
    "subtract": (torch.tensor(1 / 3), 0.7, "subtract", False),
    "none": (torch.tensor(0.4), 1.0, "none", False),
    "strict": (torch.tensor(0.5), 1.0, "zero", True),
    "per channel": (torch.linspace(0.2, 0.9, 19), 1.0, "zero", False),
}
SHAPES = [(4, 2, 7, 5, 19), (1, 1, 1, 1, 19), (11, 1, 2, 9, 19), (2, 3, 40, 33, 19)]
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.uint8), (torch.bfloat16, torch.bfloat16)]


def membranes(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values on a coarse grid, so that many membranes lie exactly at a threshold."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randint(-8, 17, shape, generator=generator) / 4).to(dtype)


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "out"), DTYPES)
def test_fire(neuron: str, shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype) -> None:
    cells, x = dense.Neuron(*NEURONS[neuron]), membranes(*shape, dtype=dtype)
    shortcut = membranes(*shape).flip(0)
    for options in ({}, {"shortcut": shortcut}):
        expected_u, expected = dense.fire(x, cells, out, **options)
        u, spikes = dense.fire(x, cells, out, compiled=True, **options)
        assert torch.equal(spikes, expected) and torch.equal(u, expected_u) and spikes.dtype == out
    assert u.dtype == torch.float32
    if shape[0] > 1:
        assert 0.02 < expected.float().mean() < 0.98


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "out"), DTYPES)
def test_fire_and_pool(neuron: str, shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype) -> None:
    cells, x = dense.Neuron(*NEURONS[neuron]), membranes(*shape, dtype=dtype) - 0.5
    expected = dense.fire_and_pool(x, cells, out)
    found = dense.fire_and_pool(x, cells, out, compiled=True)
    assert torch.equal(found, expected) and found.dtype == out
    frame = x[:1].expand(shape)
    assert torch.equal(dense.fire_and_pool(frame, cells, out, compiled=True), dense.fire_and_pool(frame, cells, out))


@pytest.mark.parametrize("expanded", [True, False])
@pytest.mark.parametrize("op", [dense.fire, dense.fire_and_pool])
def test_frames_that_lie_otherwise(op, expanded: bool) -> None:
    """A convolution of one input channel may give its frames channels-first, and they may be one frame shown again."""
    x = membranes(4, 2, 19, 6, 5).permute(0, 1, 3, 4, 2)
    x = x[:1].expand(x.shape) if expanded else x
    cells = dense.Neuron(*NEURONS["LIF"])
    expected, found = (op(frames, cells, torch.float32, compiled=True) for frames in (x.contiguous(), x))
    if op is dense.fire:
        (_, expected), (_, found) = expected, found
    assert torch.equal(found, expected) and 0.02 < found.mean() < 0.98
    shortcut = membranes(4, 2, 19, 6, 5).flip(0).permute(0, 1, 3, 4, 2)
    given = [
        dense.fire(x, cells, torch.float32, shortcut=u, compiled=True)[1] for u in (shortcut, shortcut.contiguous())
    ]
    assert torch.equal(*given)


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("shape", [*SHAPES, (4, 3, 14, 14, 76)])
@pytest.mark.parametrize(("dtype", "out"), DTYPES)
def test_attend(neuron: str, shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype) -> None:
    if neuron == "per channel" and shape[-1] != 19:
        pytest.skip("written for 19 channels")
    qkv = membranes(*shape[:-1], 3 * shape[-1], dtype=dtype) - 1
    neurons = [dense.Neuron(*NEURONS[neuron])] * 3 + [dense.Neuron(torch.tensor(0.5), 0.5, "zero", False)]
    expected = dense.attend(qkv, neurons, out)
    found = dense.attend(qkv, neurons, out, compiled=True)
    assert torch.equal(found, expected) and found.dtype == out


def test_attend_counts_in_integers() -> None:
    """One coincidence of k and v reaches the threshold exactly, and opens its channel for q."""
    steps, tokens, channels = 3, 6, 5
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(steps, 1, tokens, 1, channels, generator=generator) < share for share in (0.5, 0.3, 0.3))
    found = dense.attend(
        2.0 * torch.cat([q, k, v], -1),
        [dense.Neuron(torch.tensor(1.0), 1.0, "zero", False)] * 3
        + [dense.Neuron(torch.tensor(0.5), 0.5, "zero", False)],
        torch.uint8,
        compiled=True,
    )
    open_ = np.zeros(channels)
    for t in range(steps):
        counts = (k[t] & v[t]).sum((0, 1, 2)).numpy()
        h = open_ + (counts - open_) / 2
        fired = h >= 0.5
        open_ = np.where(fired, 0, h)
        assert np.array_equal(found[t].numpy(), q[t].numpy() * fired)
    assert found.any()


@pytest.mark.parametrize("heads", [None, 4])
def test_attend_pools_within_heads(heads: int | None) -> None:
    """With every neuron firing wherever its input is positive, against pooling written out in numpy."""
    batch, height, width, channels = 2, 3, 4, 8
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.rand(1, batch, height, width, channels, generator=generator) < 0.15 for _ in range(3))
    sure = dense.Neuron(torch.tensor(1.0), 0.5, "zero", False)
    found = dense.attend(torch.cat([q, k, v], -1).float(), [sure] * 4, torch.float32, heads=heads)

    def pooled(spikes: np.ndarray) -> np.ndarray:
        padded = np.pad(spikes, [(0, 0)] * (spikes.ndim - 2) + [(1, 1), (1, 1)])
        rows, columns = spikes.shape[-2:]
        return np.max([padded[..., i : i + rows, j : j + columns] for i in range(3) for j in range(3)], axis=0)

    def by_head(spikes: np.ndarray) -> np.ndarray:
        return spikes.reshape(batch, height * width, heads, -1).transpose(0, 2, 1, 3)

    a, b, c = (spikes[0].numpy() for spikes in (q, k, v))
    if heads is None:
        expected = a & (b & c).any((1, 2), keepdims=True)
    else:
        b, c = (pooled(spikes.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1) for spikes in (b, c))
        open_ = pooled(by_head(b & c)).any(2, keepdims=True)
        expected = pooled(by_head(a) & open_).transpose(0, 2, 1, 3).reshape(batch, height, width, channels)
    assert np.array_equal(found[0].numpy().astype(bool), expected) and expected.any() and not expected.all()


def test_pool_is_a_maximum_over_neighbors() -> None:
    x = membranes(2, 3, 7, 6, 5)
    expected = F.max_pool2d(x.movedim(-1, 2).flatten(0, 1), 3, 2, 1).unflatten(0, (2, 3)).movedim(2, -1)
    assert torch.equal(dense.pool(x), expected)


def test_frames_that_are_not_contiguous() -> None:
    cells = dense.Neuron(*NEURONS["LIF"])
    x = membranes(3, 2, 4, 19, 6).transpose(-1, -2)
    for fused in (dense.fire_and_pool, lambda *a, **o: dense.fire(*a, **o)[1]):
        assert torch.equal(fused(x, cells, torch.float32, compiled=True), fused(x, cells, torch.float32))


def test_without_a_compiler_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: str) -> None:
        raise BuildError("no C++ compiler was found; install g++ or clang++")

    monkeypatch.setattr(dense.bindings, "built", broken)
    monkeypatch.setattr(dense, "_uncompiled", [])
    cells, x = dense.Neuron(*NEURONS["LIF"]), membranes(2, 1, 3, 3, 4)
    with pytest.warns(UserWarning, match="no C.. compiler was found") as caught:
        found = [dense.fire(x, cells, torch.float32, compiled=True)[1] for _ in range(3)]
    assert len(caught) == 1
    assert torch.equal(found[2], dense.fire(x, cells, torch.float32)[1])


@pytest.mark.slow
def test_what_torch_compile_makes_of_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of other devices, run on this one."""
    monkeypatch.setattr(dense, "_native", lambda x: False)
    for name in ("LIF", "per channel"):
        cells, x = dense.Neuron(*NEURONS[name]), membranes(4, 2, 6, 5, 19)
        assert torch.equal(
            dense.fire_and_pool(x, cells, torch.bfloat16, compiled=True),
            dense.fire_and_pool(x, cells, torch.bfloat16),
        )
        found = dense.fire(x, cells, torch.float32, shortcut=x, compiled=True)
        expected = dense.fire(x, cells, torch.float32, shortcut=x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        qkv, neurons = membranes(4, 2, 3, 3, 57), [cells] * 4
        for heads in (None, 1):
            assert torch.equal(
                dense.attend(qkv, neurons, torch.float32, heads=heads, compiled=True),
                dense.attend(qkv, neurons, torch.float32, heads=heads),
            )
    assert not dense._uncompiled


@pytest.mark.parametrize("name", ["fire", "fire_and_pool", "attend"])
def test_the_equations_are_one_graph(name: str) -> None:
    cells, x = dense.Neuron(*NEURONS["LIF"]), membranes(4, 2, 3, 5, 6)
    given = ([cells] * 4, torch.float32, None) if name == "attend" else (cells, torch.float32)
    given = (*given, None) if name == "fire" else given
    equations = getattr(dense, f"_{name}")
    torch.compiler.reset()
    graph = torch.compile(equations, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(x, *given), equations(x, *given), atol=0, rtol=0)
    assert equations(membranes(4, 2, 3, 5, 6), *given)[-1].any()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("name", ["fire", "fire with a shortcut", "fire_and_pool", "attend"])
def test_a_cut_sequence_goes_on_from_where_the_neurons_stood(neuron: str, name: str, threads: int) -> None:
    layer, (steps, batch, height, width, channels) = dense.Neuron(*NEURONS[neuron]), (5, 3, 9, 6, 19)
    x = membranes(steps, batch, height, width, channels * (3 if name == "attend" else 1))
    place = (batch, height, width, channels)
    shapes = [place, place, place, (batch, channels)] if name == "attend" else [place]

    def run(x: Tensor, layers: list[dense.Neuron], compiled: bool = True) -> Tensor:
        if name == "attend":
            return dense.attend(x, layers, torch.float32, compiled=compiled)
        if name == "fire_and_pool":
            return dense.fire_and_pool(x, layers[0], torch.uint8, compiled=compiled)
        shortcut = x.flip(-1) if "shortcut" in name else None
        return dense.fire(x, layers[0], torch.float32, shortcut=shortcut, compiled=compiled)[1]

    layers, stands = [layer] * len(shapes), [None] * len(shapes)
    whole, parts = run(x, layers), []
    count = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for part, compiled in zip(x.split([1, 3, 1]), (True, False, True), strict=True):
            after = [torch.full(shape, torch.nan) for shape in shapes]
            cells = [one._replace(before=b, after=a) for one, b, a in zip(layers, stands, after, strict=True)]
            parts.append(run(part, cells, compiled))
            stands = after
    finally:
        torch.set_num_threads(count)
    assert torch.equal(torch.cat(parts), whole) and 0.02 < whole.float().mean() < 0.98
    assert not torch.equal(run(x[4:], layers), whole[4:]), "the last step must not be that of neurons at rest"
    unsaved = [one._replace(before=stand) for one, stand in zip(layers, stands, strict=True)]
    assert torch.equal(run(x[:1], unsaved), run(x[:1], unsaved, compiled=False))
    assert not torch.equal(run(x[:1], unsaved), whole[:1])
