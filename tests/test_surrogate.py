import math
import pickle

import pytest
import snntorch.surrogate
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdt_blocks import surrogate
from sdt_blocks.surrogate import KINDS, Surrogate, fire, resolve

CLOSED_FORMS = {
    "sigmoid": lambda x, a: a * math.exp(-a * x) / (1 + math.exp(-a * x)) ** 2,
    "atan": lambda x, a: a / 2 / (1 + (math.pi * a * x / 2) ** 2),
    "fast_sigmoid": lambda x, a: 1 / (1 + a * abs(x)) ** 2,
    "triangular": lambda x, a: a * max(0.0, 1 - a * abs(x)),
    "straight_through": lambda x, a: 1.0,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_closed_form(kind, alpha):
    x = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    Surrogate(kind, alpha)(x).sum().backward()
    expected = torch.tensor([CLOSED_FORMS[kind](value, alpha) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(x.grad, expected, atol=1e-12, rtol=1e-12)


@given(shift=st.floats(allow_nan=False, allow_infinity=False, width=32), kind=st.sampled_from(KINDS))
def test_finite_for_any_finite_input(shift, kind):
    x = torch.tensor([shift], requires_grad=True)
    spikes = resolve(kind)(x)
    spikes.backward()
    assert spikes.item() == float(shift >= 0)
    assert torch.isfinite(x.grad).all()


def test_snntorch_agrees_where_it_defines_the_same():
    snntorch_surrogate = pytest.importorskip("snntorch.surrogate")
    x = torch.randn(1000, requires_grad=True)
    for ours, theirs in [
        (surrogate.atan(), snntorch_surrogate.atan()),
        (surrogate.atan(3.0), snntorch_surrogate.atan(3.0)),
        (surrogate.fast_sigmoid(), snntorch_surrogate.fast_sigmoid()),
        (surrogate.sigmoid(4), snntorch_surrogate.sigmoid(4)),
        (surrogate.straight_through(), snntorch_surrogate.straight_through_estimator()),
    ]:
        (expected,) = torch.autograd.grad(theirs(x).sum(), x)
        (got,) = torch.autograd.grad(ours(x).sum(), x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_the_triangle_is_bellecs_unless_told_otherwise():
    assert surrogate.triangular().derivative(torch.tensor([-0.5, 0.0, 1.0])).tolist() == [0.5, 1.0, 0.0]


def test_plain_data_keeps_an_alpha_of_its_own():
    for chosen in (surrogate.atan(), surrogate.atan(3.0), surrogate.fast_sigmoid(3.0)):
        assert resolve(surrogate.surrogate_spec(chosen)) == chosen


def test_strict_and_foreign_callables():
    zero = torch.zeros(1, requires_grad=True)
    assert fire(zero, surrogate.sigmoid()) == 1 and fire(zero, surrogate.sigmoid(), strict=True) == 0
    import snntorch.surrogate

    foreign = snntorch.surrogate.fast_sigmoid(slope=10)
    fired = fire(zero, foreign)
    assert fired == 1 and foreign(zero) == 0
    fired.backward()
    assert zero.grad == 1


def test_bad_values_and_pickle():
    with pytest.raises(ValueError, match="'sigmoidd' is unknown; choose one of sigmoid"):
        resolve("sigmoidd")
    with pytest.raises(ValueError, match="unknown"):
        Surrogate("nope")
    with pytest.raises(ValueError, match="surrogate alpha must be positive and finite, got 0"):
        surrogate.atan(0)
    with pytest.raises(TypeError, match="got 3"):
        resolve(3)
    for maker in (surrogate.atan, Surrogate, snntorch.surrogate.fast_sigmoid):
        with pytest.raises(TypeError, match=rf"not {maker.__name__} itself: call it, as in {maker.__name__}\(\)"):
            resolve(maker)
    assert resolve(snntorch.surrogate.fast_sigmoid()) and resolve(surrogate.atan()) == surrogate.atan()
    assert pickle.loads(pickle.dumps(surrogate.atan(3.0))) == surrogate.atan(3.0)
