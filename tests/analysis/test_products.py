"""Every product is in the energy table with its work, or is named as not counted; none is left out without a word."""

import math
import warnings

import numpy as np
import pytest
import snntorch
import torch
from torch import nn

from sdt_blocks import LIF
from sdt_blocks.analysis import energy
from sdt_blocks.analysis.probe import Probe

T, B, D = 4, 2, 8


class Net(nn.Module):
    """A layer, a neuron and the part under test, which gets spikes `[T, B, D]`."""

    def __init__(self, part):
        super().__init__()
        self.first, self.fire, self.part = nn.Linear(D, D), LIF(), part

    def forward(self, x):
        return self.part(self.fire(self.first(x)))


class Function(nn.Module):
    """A function of the spikes and of one weight."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.randn(shape))

    def forward(self, s):
        return self.function(s, self.w)


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention, self.options = nn.MultiheadAttention(D, 2, batch_first=True), options

    def forward(self, s):
        return self.attention(s, s, s, **self.options)[0]


class Recurrent(nn.Module):
    def __init__(self, make, **options):
        super().__init__()
        self.rnn = make(D, 16, **options)

    def forward(self, s):
        return self.rnn(s)[0]


class Cell(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.cell = make(D, 16)

    def forward(self, s):
        state = None
        for step in s:
            state = self.cell(step, state)
        return state


class Twice(nn.Module):
    """The same input for both arguments of a part."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, s):
        return self.part(s, s)


def analyze(part):
    """The table's part in the module under test, what is named as not counted, and the warnings."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        report = energy(Net(part), 3 * torch.randn(T, B, D))
    assert report["first"].kind == "MAC" and not report.silence
    layers = [layer for layer in report.layers if layer.name != "first"]
    return report, layers, [str(warning.message) for warning in told]


# What a step of one sample needs, in multiply-accumulates.
COUNTED = {
    "matrix-vector": (lambda: Function(lambda s, w: s.flatten(0, 1) @ w, D), D),
    "addmv": (lambda: Function(lambda s, w: torch.addmv(w[:1], s.flatten(0, 1), w), D), D),
    "baddbmm": (lambda: Function(lambda s, w: torch.baddbmm(s, s, w.expand(T, D, D)), D, D), D * D),
    "addbmm": (lambda: Function(lambda s, w: torch.addbmm(s[0], s, w.expand(T, D, D)), D, D), D * D),
    "einsum with a vector": (lambda: Function(lambda s, w: torch.einsum("tbi,i->tb", s, w), D), D),
    "einsum": (lambda: Function(lambda s, w: torch.einsum("tbi,io->tbo", s, w), D, 5), 5 * D),
    "tensordot": (lambda: Function(lambda s, w: torch.tensordot(s, w, dims=1), D, 5), 5 * D),
    "outer product of each row": (lambda: Function(lambda s, w: s[..., None] * s[..., None, :], 1), D * D),
    "a layer of one input": (lambda: Function(lambda s, w: s[..., None] * w, 5), 5 * D),
    "einsum of an outer product": (lambda: Function(lambda s, w: torch.einsum("tbi,tbj->tbij", s, s), 1), D * D),
    "product and sum": (lambda: Function(lambda s, w: (s * w).sum(-1), D), D),
    "product and sum of spikes": (lambda: Function(lambda s, w: (s * s.roll(1)).sum(-1), 1), D),
    "product, view and sum": (lambda: Function(lambda s, w: (s * s.roll(1)).flatten(0, 1).sum(-1), 1), D),
    "bilinear": (lambda: Twice(nn.Bilinear(D, D, 3)), 3 * D * D + 3 * D),
    "lstm": (lambda: Recurrent(nn.LSTM), 4 * 16 * D + 4 * 16 * 16),
    "lstm with projection": (lambda: Recurrent(nn.LSTM, proj_size=5), 4 * 16 * D + 4 * 16 * 5 + 16 * 5),
    "gru": (lambda: Recurrent(nn.GRU), 3 * 16 * D + 3 * 16 * 16),
    "rnn": (lambda: Recurrent(nn.RNN), 16 * D + 16 * 16),
    "gru in two directions": (lambda: Recurrent(nn.GRU, bidirectional=True), 2 * (3 * 16 * D + 3 * 16 * 16)),
    "lstm in two directions": (lambda: Recurrent(nn.LSTM, bidirectional=True), 2 * (4 * 16 * D + 4 * 16 * 16)),
    "gru cell": (lambda: Cell(nn.GRUCell), 3 * 16 * D + 3 * 16 * 16),
    "attention": (lambda: SelfAttention(), 4 * D * D + 2 * B * D),
    "attention without its weights": (lambda: SelfAttention(need_weights=False), 4 * D * D + 2 * B * D),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(D, 2, 16, batch_first=True),
        4 * D * D + 2 * B * D + 2 * 16 * D,
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Unflatten(1, (1, D)), nn.ConvTranspose1d(1, 3, 2)),
        3 * 2 * D,
    ),
    "compiled": (lambda: torch.compile(nn.Linear(D, 5), backend="eager"), 5 * D),
    "traced": (lambda: torch.jit.trace(nn.Linear(D, 5), torch.zeros(T, B, D)), 5 * D),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, 5)), 5 * D),
}


@pytest.mark.parametrize("name", COUNTED)
def test_work_is_counted(name):
    make, expected = COUNTED[name]
    report, layers, _ = analyze(make())
    assert layers and all(layer.name.startswith("part") for layer in layers)
    assert sum(layer.macs * len(layer.rate) for layer in layers) == pytest.approx(T * expected)
    assert layers[0].kind == "AC" and 0 < sum(layers[0].rate) < len(layers[0].rate)
    assert not [entry for entry in report.not_counted if entry.operation in ("mm", "addmm", "mv", "bmm")]


class Scaled(torch.autograd.Function):
    """A product inside of a function of the user's own."""

    @staticmethod
    def forward(ctx, s, w):
        return s @ w

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


def test_autograd_function_of_ones_own():
    _, layers, told = analyze(Function(Scaled.apply, D, 5))
    assert [(layer.name, layer.kind, layer.macs) for layer in layers] == [("part.w", "AC", 5 * D)] and not told


@torch.library.custom_op("sdt_tests::mul", mutates_args=())
def opaque_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Called like an operation that is known, and none of PyTorch's."""
    return torch.from_numpy(x.numpy() @ w.detach().numpy())


def through_numpy(s, w):
    result = torch.empty(*s.shape[:-1], w.shape[-1])
    np.matmul(s.numpy(), w.detach().numpy(), out=result.numpy())
    return result


NAMED = {
    "custom op": (lambda: Function(opaque_product, D, 5), "sdt_tests::mul"),
    "memory that foreign code wrote": (lambda: Function(through_numpy, D, 5), "foreign code"),
    "and that is read inside": (lambda: Function(lambda s, w: 2 * through_numpy(s, w), D, 5), "foreign code"),
    "solve": (lambda: Function(lambda s, w: torch.linalg.solve(w, s.flatten(0, 1).mT), D, D), "_linalg_solve_ex"),
    "distances": (lambda: Function(lambda s, w: torch.cdist(s, s), 1), "_cdist_forward"),
    "fourier": (lambda: Function(lambda s, w: torch.fft.rfft(s).abs(), 1), "_fft_r2c"),
    "sparse": (lambda: Function(lambda s, w: torch.sparse.mm(s[0].to_sparse(), w), D, 5), "_sparse_addmm"),
    "bag": (
        lambda: Function(lambda s, w: nn.functional.embedding_bag(s[0].long(), w, mode="sum"), 2, 5),
        "_embedding_bag",
    ),
    "gate": (lambda: Function(lambda s, w: (s @ w) * (s @ w).sigmoid(), D, D), "sigmoid"),
    "elementwise": (lambda: Function(lambda s, w: (s @ w) * (s @ w), D, D), "mul"),
    "softmax": (lambda: nn.Softmax(-1), "_softmax"),
    "softmax inside": (
        lambda: Function(lambda s, w: nn.functional.scaled_dot_product_attention(s, s, s), 1),
        "_softmax",
    ),
    "gates inside": (lambda: Recurrent(nn.LSTM), "sigmoid"),
    "gates inside of a gru": (lambda: Recurrent(nn.GRU), "sigmoid"),
    "layer norm": (lambda: nn.LayerNorm(D), "native_layer_norm"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_no_rule_counts_is_named(name):
    make, operation = NAMED[name]
    report, _, told = analyze(make())
    assert operation in [entry.operation for entry in report.not_counted]
    assert all(entry.module.startswith("part") and entry.calls > 0 for entry in report.not_counted)
    assert any("not counted" in text and operation in text for text in told)
    assert operation in str(report) and operation in report.to_json()


def test_weights_inside_of_a_neuron_are_counted():
    torch.manual_seed(0)

    class Stepping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.cell = nn.Linear(D, D), snntorch.SLSTM(D, 16, threshold=0.05)

        def forward(self, x):
            synapse, membrane = self.cell.init_slstm()
            for step in x:
                spikes, synapse, membrane = self.cell(self.first(step), synapse, membrane)
            return spikes

    report = energy(Stepping(), torch.randn(T, B, D))
    inside = {layer.name: layer.macs for layer in report.layers if layer.name.startswith("cell")}
    assert sum(inside.values()) == 4 * 16 * D + 4 * 16 * 16


def test_kit_and_plain_networks_leave_nothing_out(firing_model):
    model = firing_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = energy(model, torch.rand(2, 3, 16, 16))
    assert not report.not_counted and not report.silence
    assert "not counted" not in str(report)


def test_a_scale_for_each_channel_is_no_product():
    _, layers, _ = analyze(Function(lambda s, w: (s * w).mean(0) + (s * w).max(-1).values.sum(), D))
    assert not layers


def test_what_stands_beside_the_forward_pass_is_not_counted():
    """A loader that computes, and a product of constants, which is the same for every sample."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(D, 3)), nn.Parameter(torch.randn(3, 5))

        def forward(self, s):
            return s @ (self.a @ self.b)

    batches = (torch.randn(T, B, D) @ torch.eye(D) * 3 for _ in range(2))
    report = energy(Net(Constant()), batches)
    assert [(layer.name, layer.macs) for layer in report.layers] == [("first", D * D), ("part.matmul", 5 * D)]


def test_attention_runs_in_parts_only_within_an_analysis():
    before = torch.backends.mha.get_fastpath_enabled()
    with Probe(Net(nn.Identity())) as probe:
        assert math.prod(next(iter(probe.run(torch.randn(T, B, D)))).shape) == T * B * D
    assert torch.backends.mha.get_fastpath_enabled() == before
