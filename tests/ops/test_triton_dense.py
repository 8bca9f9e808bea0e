"""The Triton kernels of evaluation, in the interpreter where there is no GPU, against their equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdt_blocks.ops import dense
from sdt_blocks.ops.dense import Neuron
from sdt_blocks.ops.levels import levels_reference
from sdt_blocks.ops.lif import lif_reference
from sdt_blocks.ops.spec import LevelSpec, NeuronSpec

pytestmark = pytest.mark.cuda
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "triton")
    monkeypatch.setattr(dense, "_traced", None)  # nothing is left to torch.compile
    torch.manual_seed(0)


def neuron(channels: int | None = None, threshold: float = 1.0, reset: str = "zero", strict: bool = False) -> Neuron:
    inv_tau = torch.tensor(0.5) if channels is None else torch.rand(channels) * 0.5 + 0.3
    return Neuron(inv_tau.to(DEVICE), threshold, reset, strict)


def spikes_of(x: Tensor, of: Neuron) -> Tensor:
    """By the equations, on `[T, ..., C]`."""
    inv_tau = of.inv_tau if of.inv_tau.ndim == 0 else of.inv_tau.expand(x.shape[1:])
    steps = [lif_reference(x, NeuronSpec(of.threshold, of.reset, strict=of.strict, inv_tau=inv_tau))[0]]
    return steps[0]


def frames(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, device=DEVICE) + 1.0).to(dtype)


CASES = [
    (torch.float32, torch.float32, {}),
    (torch.float32, torch.uint8, {"channels": 12, "reset": "subtract"}),
    (torch.bfloat16, torch.bfloat16, {"reset": "none", "strict": True, "threshold": 0.7}),
    (torch.float64, torch.float64, {"channels": 12}),
]
IDS = [str(case[0])[6:] for case in CASES]


@pytest.mark.parametrize(("given", "wanted", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("size", [(4, 2, 5, 7, 12), (1, 1, 3, 3, 12)])
def test_fire(given: torch.dtype, wanted: torch.dtype, options: dict, size: tuple[int, ...]) -> None:
    cells, x = neuron(**options), frames(*size, dtype=given)
    u, spikes = dense.fire(x, cells, wanted, compiled=True)
    assert u is x and spikes.dtype == wanted and spikes.shape == x.shape
    expected = spikes_of(x.to(torch.promote_types(given, torch.float32)), cells)
    assert torch.equal(spikes.double(), expected.double()) and 0.05 < expected.double().mean() < 0.95


@pytest.mark.parametrize(("given", "wanted", "options"), CASES, ids=IDS)
def test_fire_on_a_shortcut(given: torch.dtype, wanted: torch.dtype, options: dict) -> None:
    size = (3, 2, 3, 5, 12)
    cells, x = neuron(**options), frames(*size, dtype=given)
    shortcut = frames(*size, dtype=torch.promote_types(given, torch.float32))
    total, spikes = dense.fire(x, cells, wanted, shortcut=shortcut, compiled=True)
    assert total.dtype == shortcut.dtype and torch.equal(total, shortcut + x)
    assert torch.equal(spikes.double(), spikes_of(shortcut + x, cells).double()) and spikes.any()


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize(("given", "wanted", "options"), CASES, ids=IDS)
def test_fire_levels(given: torch.dtype, wanted: torch.dtype, options: dict, shown: bool) -> None:
    """With a shortcut and without; in float32 or better inside, whatever comes in and goes out."""
    x = frames(1 if shown else 3, 2, 3, 5, 11, dtype=given) * 2
    x = x.expand(3, 2, 3, 5, 11)
    of, norm = torch.promote_types(given, torch.float32), 1.0 if wanted == torch.uint8 else 4.0
    spec = LevelSpec(norm=norm, rounding="up" if options.get("strict") else "even")
    shortcut = frames(*x.shape, dtype=of)
    u, values = dense.fire_levels(x, spec, wanted, compiled=True)
    assert u is x and torch.equal(values, levels_reference(x.to(of), spec).to(wanted)) and values.dtype == wanted
    u, values = dense.fire_levels(x, spec, wanted, shortcut=shortcut, compiled=True)
    assert torch.equal(u, shortcut + x) and torch.equal(values, levels_reference(u, spec).to(wanted))
    assert values.unique().numel() == 5


def test_one_frame_shown_at_every_step_stays_one_in_memory() -> None:
    x, cells = frames(1, 2, 5, 4, 8).expand(4, 2, 5, 4, 8), neuron(8)
    for op in (lambda x: dense.fire(x, cells, torch.float32, compiled=True)[1], pooled(cells)):
        assert torch.equal(op(x), op(x.contiguous())) and op(x).any()
    shortcut = frames(*x.shape)
    total = dense.fire(x, cells, torch.float32, shortcut=shortcut, compiled=True)[0]
    assert torch.equal(total, shortcut + x)


def pooled(cells: Neuron, dtype: torch.dtype = torch.float32):
    return lambda x: dense.fire_and_pool(x, cells, dtype, compiled=True)


@pytest.mark.parametrize(("given", "wanted", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("size", [(4, 2, 9, 6, 12), (2, 2, 1, 1, 12), (2, 1, 2, 5, 12), (33, 1, 3, 4, 12)])
def test_fire_and_pool(given: torch.dtype, wanted: torch.dtype, options: dict, size: tuple[int, ...]) -> None:
    cells, x = neuron(**options), frames(*size, dtype=given)
    found = pooled(cells, wanted)(x)
    spikes = spikes_of(x.to(torch.promote_types(given, torch.float32)), cells)
    expected = dense.pool(spikes.float())
    assert found.dtype == wanted and torch.equal(found.float(), expected)
    assert expected.any()


def test_pooling_beyond_the_bits_of_a_word() -> None:
    x, cells = frames(65, 1, 3, 3, 4) - 1, neuron()
    found = pooled(cells)(x)
    assert torch.equal(found, dense.pool(spikes_of(x, cells))) and 0 < found.mean() < 1


@pytest.mark.parametrize(("given", "wanted", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("size", [(4, 2, 5, 7), (1, 1, 2, 2), (2, 1, 18, 16), (33, 1, 3, 3)])
def test_attend(given: torch.dtype, wanted: torch.dtype, options: dict, size: tuple[int, ...]) -> None:
    qkv = frames(*size, 36, dtype=given)
    cells = [neuron(**options) for _ in range(3)]
    gate = neuron(12, threshold=0.6)
    found = dense.attend(qkv, [*cells, gate], wanted, compiled=True)
    x = qkv.to(torch.promote_types(given, torch.float32))
    q, k, v = (spikes_of(part, of) for part, of in zip(x.chunk(3, -1), cells, strict=True))
    mask = spikes_of((k * v).sum((2, 3), keepdim=True), gate)
    assert torch.equal(found.double(), (q * mask).double()) and found.dtype == wanted
    assert q.any() and (size[2] < 3 or mask.mean() > 0)


@pytest.mark.parametrize("heads", [None, 2])
def test_attend_where_the_kernel_has_no_room(heads: int | None) -> None:
    """Many steps and tokens, unlike neurons, or a pooling: the equations, with the neurons' own kernel."""
    qkv = frames(65, 1, 3, 2, 12)
    for cells in ([neuron()] * 4, [neuron(), neuron(threshold=0.5), neuron(), neuron()]):
        found = dense.attend(qkv, cells, torch.float32, heads=heads, compiled=True)
        assert torch.equal(found, dense.attend(qkv, cells, torch.float32, heads=heads)) and found.any()


def test_a_stream_goes_on_where_it_stood() -> None:
    x, qkv = frames(4, 1, 3, 2, 8), frames(4, 1, 3, 2, 24)
    calls = {
        "fire": lambda x, of: dense.fire(x, of, torch.float32, compiled=True)[1],
        "pool": lambda x, of: dense.fire_and_pool(x, of, torch.float32, compiled=True),
    }
    for call in calls.values():
        state, cells = torch.zeros(1, 3, 2, 8, device=DEVICE), neuron(8)
        parts = [call(part, cells._replace(before=state.clone(), after=state)) for part in x.split(2)]
        assert torch.equal(torch.cat(parts), call(x, cells)) and state.any()
    cells = [neuron(8), neuron(8), neuron(8), neuron(8, threshold=0.6)]
    states = [torch.zeros(1, 3, 2, 8, device=DEVICE) for _ in range(3)] + [torch.zeros(1, 8, device=DEVICE)]
    parts = []
    for part in qkv.split(2):
        of = [cell._replace(before=at.clone(), after=at) for cell, at in zip(cells, states, strict=True)]
        parts.append(dense.attend(part, of, torch.float32, compiled=True))
    whole = dense.attend(qkv, cells, torch.float32, compiled=True)
    assert torch.equal(torch.cat(parts), whole) and whole.any()
