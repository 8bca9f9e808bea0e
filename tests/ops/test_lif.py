"""The fused neuron against the reference, float64 and snnTorch's own loop."""

import pytest
import snntorch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_blocks.ops import NeuronSpec, lif, lif_reference
from sdt_blocks.ops.spec import arrange
from sdt_blocks.surrogate import KINDS, Surrogate

RESETS = ("zero", "subtract", "none")


def run(function, x, inv_tau, membrane, **options):
    """Spikes, last membrane and the gradients of all that has one, under a fixed random weighting."""
    given = {"x": x, "inv_tau": inv_tau, "membrane": membrane}
    given = {name: tensor.detach().requires_grad_() for name, tensor in given.items() if tensor is not None}
    neuron = NeuronSpec(inv_tau=given.get("inv_tau", 0.45), **options)
    returned = {"return_membrane": True} if function is lif else {}
    spikes, last = function(given["x"], neuron, given.get("membrane"), **returned)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in (spikes, last)]
    return spikes, last, *torch.autograd.grad([spikes, last], list(given.values()), weights)


def assert_same(got, expected, rtol):
    """Spikes and membranes equal to the bit, gradients within rounding of the largest of them.

    The gradient of a time constant is a sum in which much cancels.
    """
    largest = max(gradient.norm().item() for gradient in expected[2:])
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).norm() <= rtol * largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("reset", RESETS)
def test_reference(backend, device, reset, detach_reset, kind):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 7, 5, 3, device=device) * 1.5
    membrane, per_channel = torch.randn(3, 7, 5, 3, device=device), torch.rand(7, device=device) * 0.5 + 0.2
    options = {"threshold": 0.8, "reset": reset, "detach_reset": detach_reset, "surrogate": Surrogate(kind, 3.0)}
    for strict in (False, True):
        for inv_tau in (None, torch.tensor(0.6, device=device), per_channel):
            for before in (None, membrane):
                arguments = (x, inv_tau, before)
                expected = run(lif_reference, *arguments, **options, strict=strict)
                assert_same(run(lif, *arguments, **options, strict=strict), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_gradient(backend, device, value, reset, kind):
    """As in the equations, element by element: whoever looks for gradients that are not finite sees the same."""
    x = torch.linspace(-2, 3, 60, device=device).view(4, 15)
    x[1, ::2] = value
    results = []
    for function in (lif, lif_reference):
        found = run(function, x, None, None, reset=reset, surrogate=Surrogate(kind, 1.0), detach_reset=False)
        results.append([part.isfinite() for part in found])
    assert not (results[1][1].all() and results[1][2].all()) or value != value
    assert results[1][2].any()
    for name, ours, theirs in zip(("spikes", "membrane", "gradient"), *results, strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 3, 5), (2, 1025), (3, 1, 1, 1, 1), (7, 2, 33, 3, 2), (64, 2, 3), (11, 2, 3)]
)
def test_dtypes_and_sizes(backend, device, shape, dtype, rtol):
    torch.manual_seed(1)
    x = torch.randn(shape, device=device).mul(2).to(dtype)
    membrane = torch.randn(shape[1:], device=device).to(torch.promote_types(dtype, torch.float32))
    constants = [None, torch.tensor(0.3, device=device)]
    if len(shape) > 2:
        constants.append(torch.rand(shape[2], device=device))
    for inv_tau in constants:
        got = run(lif, x, inv_tau, membrane, detach_reset=False)
        assert_same(got, run(lif_reference, x, inv_tau, membrane, detach_reset=False), rtol)


def test_exact_ties_fire(backend, device):
    """h meets the threshold exactly: `>=` fires, `>` does not."""
    x = torch.full((1, 100), 1.0, device=device)
    assert lif(x, NeuronSpec(threshold=0.5)).all()
    assert not lif(x, NeuronSpec(threshold=0.5, strict=True)).any()


def test_not_a_number_stays_silent(backend, device):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf")]] * 2, device=device)
    expected = lif_reference(x, NeuronSpec())[0]
    assert torch.equal(lif(x, NeuronSpec()), expected)


@pytest.mark.parametrize("reset", RESETS)
def test_snntorch_loop(backend, device, reset):
    """snnTorch's Leaky, one step after the other, with the same surrogate."""
    torch.manual_seed(0)
    x, surrogate = torch.randn(6, 50, device=device) * 2, Surrogate("atan", 2.0)
    leaky = snntorch.Leaky(beta=0.5, threshold=0.9, spike_grad=surrogate, reset_mechanism=reset).to(device)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    membrane, expected = torch.zeros_like(x[0]), []
    for current in theirs / 2:
        fired, membrane = leaky(current, membrane)
        expected.append(fired)
    expected = torch.stack(expected)
    spikes, last = lif(ours, NeuronSpec(0.9, reset, surrogate), return_membrane=True)
    assert (spikes != expected).sum() == 0, "no input here comes within rounding of the threshold"
    torch.testing.assert_close(last, membrane)
    weight = torch.randn_like(x)
    (spikes * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_float64_differs_at_ties_alone(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(1)
    x, third = torch.randn(8, 20000), NeuronSpec(inv_tau=1 / 3)
    assert (lif(x, third) != lif(x.double(), third)).sum() <= 2


def layouts(x):
    """x `[T, B, C, H, W]` as other ways to lie in memory, and whether its gaps need a copy."""
    gaps = torch.empty(x.shape[0] + 1, *x.shape[1:], dtype=x.dtype, device=x.device)
    gaps[:-1] = x
    wide = torch.stack([x, x], 2).flatten(2, 3)
    return {
        "channels_last": (x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3), False),
        "batch_first": (x.transpose(0, 1).contiguous().transpose(0, 1), False),
        "gaps_between_steps": (gaps[:-1], False),
        "some_channels": (wide[:, :, : x.shape[2]], False),
        "gaps_in_two_axes": (torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 1))[:, :, : x.shape[2], : x.shape[3]], True),
        "backwards": (x.flip(3).flip(3), False),
        "every_other_column": (torch.stack([x, x], -1).flatten(-2)[..., ::2], True),
        "one_frame_expanded": (x[:1].expand(x.shape), False),
        "broadcast_channel": (x[:, :, :1].expand(x.shape), True),
    }


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", layouts(torch.zeros(1, 1, 1, 1, 1)))
def test_layouts(backend, device, name, per_channel):
    torch.manual_seed(2)
    x, copies = layouts(torch.randn(3, 2, 5, 4, 6, device=device))[name]
    inv_tau = torch.rand(5, device=device) if per_channel else None
    expected = run(lif_reference, x.contiguous(), inv_tau, None)
    got = run(lif, x, inv_tau, None)
    assert_same(got, expected, 1e-5)
    assert (arrange(x, 3, per_channel)[0] is not x) == copies
    if name == "channels_last":
        assert got[0].stride()[1:] == x.stride()[1:]


@pytest.mark.parametrize(("shape", "wider"), [((3, 64), (3, 65)), ((3, 4, 25), (3, 4, 51)), ((3, 4, 24), (3, 4, 25))])
def test_what_is_read_at_once_does_not_reach_over_a_gap(backend, device, shape, wider):
    """Steps, and rows of a frame, that begin at any element: of the input, and of the gradient."""
    torch.manual_seed(2)
    x, weight = (torch.randn(wider, device=device)[..., : shape[-1]] for _ in range(2))
    found = []
    for op in (lif, lambda *given: lif_reference(*given)[0]):
        leaf = x.detach().requires_grad_()
        spikes = op(leaf, NeuronSpec(threshold=0.5))
        found.append([spikes, *torch.autograd.grad(spikes, leaf, weight)])
    assert torch.equal(found[0][0], found[1][0]) and 0.05 < found[0][0].mean() < 0.95
    torch.testing.assert_close(found[0][1], found[1][1])


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=3, max_size=6),
    order=st.randoms(use_true_random=False),
    threads=st.integers(1, 3),
)
def test_any_order_of_axes(shape, order, threads):
    axes = list(range(1, len(shape)))
    order.shuffle(axes)
    permuted = [0, *axes]
    x = torch.randn([shape[axis] for axis in permuted]).permute([permuted.index(i) for i in range(len(shape))])
    assert list(x.shape) == shape
    inv_tau = torch.rand(shape[2])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = run(lif, x, inv_tau, None)
    finally:
        torch.set_num_threads(before)
    assert_same(got, run(lif_reference, x.contiguous(), inv_tau, None), 1e-5)


def test_many_threads_share_a_large_input(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    x, inv_tau = torch.randn(4, 2, 24, 31, 33), torch.rand(24)
    expected = run(lif_reference, x, inv_tau, None)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert_same(run(lif, x, inv_tau, None), expected, 1e-5)
    finally:
        torch.set_num_threads(threads)


def test_two_halves_are_the_whole(backend, device):
    x = torch.randn(6, 40, device=device)
    neuron = NeuronSpec(reset="subtract", inv_tau=0.4)
    whole, last = lif(x, neuron, return_membrane=True)
    first, membrane = lif(x[:2], neuron, return_membrane=True)
    second, end = lif(x[2:], neuron, membrane, return_membrane=True)
    assert torch.equal(torch.cat([first, second]), whole) and torch.equal(end, last)


def test_only_the_input_is_kept(backend, device):
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 6, 10, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lif(x, NeuronSpec())
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == x.numel() * 4


def test_empty_batch_and_no_gradient(backend, device):
    assert lif(torch.empty(4, 0, 3, device=device), NeuronSpec()).shape == (4, 0, 3)
    x = torch.randn(4, 6, device=device, requires_grad=True)
    with torch.no_grad():
        assert not lif(x, NeuronSpec()).requires_grad
    spikes, last = lif(x, NeuronSpec(), return_membrane=True)
    (only_membrane,) = torch.autograd.grad(last.sum(), x)
    expected = torch.autograd.grad(lif_reference(x, NeuronSpec())[1].sum(), x)[0]
    torch.testing.assert_close(only_membrane, expected)
    assert spikes.requires_grad
