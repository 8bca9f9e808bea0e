"""Spike-driven self-attention as one op against its equations, and within the block against its parts."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo import lookup_backend

from sdt_blocks import LIF, ParametricLIF, SpikeDrivenSelfAttention
from sdt_blocks.blocks import MaskMixer
from sdt_blocks.ops import NeuronSpec, Norm, attend, attend_reference
from sdt_blocks.ops import attention as attention_op
from sdt_blocks.ops.bits import are_spikes
from sdt_blocks.ops.dispatch import kernels
from sdt_blocks.ops.spec import arrange
from sdt_blocks.surrogate import atan, triangular

SHAPES = [(4, 2, 70, 5, 7), (3, 3, 130, 4, 4), (2, 2, 5, 14, 14), (1, 2, 1, 3, 3), (4, 2, 8, 1, 1), (2, 1, 3, 1, 131)]
SHAPES += [(11, 2, 3, 3, 3), (65, 1, 4, 1, 2)]
TAKEN = {
    torch.float32: 1e-4,
    torch.float64: 1e-11,
    torch.bfloat16: 4e-2,
    torch.float16: 6e-3,
}


def channels_last(x):
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def contiguous(x):
    return x.contiguous()


def apart(x):
    return torch.stack([x, x.new_full(x.shape, torch.nan)], -1)[..., 0]


def make(shape, dtype, device, *, learned, seed=0):
    """Inputs, norms and neurons of which some fire in every channel, as leaves."""
    torch.manual_seed(seed)
    channels = shape[2]
    x = [torch.randn(shape).to(device, dtype) for _ in range(3)]
    state = torch.promote_types(dtype, torch.float32)
    weights = [torch.rand(channels, dtype=state, device=device).add(0.5).requires_grad_() for _ in range(3)]
    biases = [torch.rand(channels, dtype=state, device=device).add(0.3).requires_grad_() for _ in range(3)]
    taus = [torch.rand(channels, dtype=state, device=device).mul(0.5).add(0.3).requires_grad_() for _ in range(4)]
    norms = [Norm(weight=w, bias=b, training=True) for w, b in zip(weights, biases, strict=True)]
    inv_taus = taus if learned else [0.5, 0.5, 0.5, 0.4]
    thresholds = (1.0, 1.0, 1.0, max(0.5, shape[3] * shape[4] / 32))
    neurons = [NeuronSpec(threshold, inv_tau=k) for k, threshold in zip(inv_taus, thresholds, strict=True)]
    return x, norms, neurons, [*weights, *biases, *(taus if learned else [])]


def run(op, x, norms, neurons, leaves):
    x = [part.detach().requires_grad_() for part in x]
    out = op(x, norms, neurons)
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad(out, [*x, *leaves], given)


def worst(found, expected):
    """The largest relative error of a gradient; infinite where a spike, a shape or a dtype differs."""
    alike = all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(found[1], expected[1], strict=True))
    if not alike or not torch.equal(found[0], expected[0]):
        return float("inf")
    scales = [theirs.abs().max().double().clamp_min(1e-3) for theirs in expected[1]]
    errors = [(a.double() - b.double()).abs().max() / c for a, b, c in zip(found[1], expected[1], scales, strict=True)]
    return torch.stack(errors).max().item()


@pytest.mark.parametrize("layout", [contiguous, channels_last, apart])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts(backend, device, shape, layout):
    x, norms, neurons, leaves = make(shape, torch.float32, device, learned=True)
    expected = run(attend_reference, x, norms, neurons, leaves)
    assert worst(run(attend, [layout(part) for part in x], norms, neurons, leaves), expected) <= TAKEN[torch.float32]


def test_mixed_layouts(backend, device):
    x, norms, neurons, leaves = make((2, 2, 20, 4, 5), torch.float64, device, learned=False)
    expected = run(attend_reference, x, norms, neurons, leaves)
    assert 0.02 < expected[0].mean() < 0.9
    mixed = [layout(part) for layout, part in zip((channels_last, contiguous, apart), x, strict=True)]
    assert worst(run(attend, mixed, norms, neurons, leaves), expected) <= TAKEN[torch.float64]


@pytest.mark.parametrize("dtype", TAKEN, ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_dtypes(backend, device, dtype, learned):
    x, norms, neurons, leaves = make((3, 2, 24, 6, 6), dtype, device, learned=learned)
    x = [channels_last(part) for part in x]
    state = torch.promote_types(dtype, torch.float32)
    expected = run(attend_reference, [part.to(state) for part in x], norms, neurons, leaves)
    expected = expected[0].to(dtype), [*(g.to(dtype) for g in expected[1][:3]), *expected[1][3:]]
    assert 0.02 < expected[0].float().mean() < 0.9
    assert worst(run(attend, x, norms, neurons, leaves), expected) <= TAKEN[dtype]


@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_neurons(backend, device, reset, detach_reset, strict):
    x, norms, neurons, leaves = make((4, 2, 12, 4, 4), torch.float64, device, learned=True)
    options = {"reset": reset, "detach_reset": detach_reset, "strict": strict, "surrogate": atan()}
    neurons = [neuron._replace(**options) for neuron in neurons]
    neurons[3] = neurons[3]._replace(reset="subtract", surrogate=triangular(0.2))
    expected = run(attend_reference, x, norms, neurons, leaves)
    assert worst(run(attend, x, norms, neurons, leaves), expected) <= TAKEN[torch.float64]


def test_evaluation(backend, device):
    x, norms, neurons, leaves = make((4, 2, 12, 4, 4), torch.float64, device, learned=True)
    running = {"running_mean": torch.randn(12).double().to(device), "running_var": torch.rand(12).double().to(device)}
    norms = [norm._replace(**running, training=False) for norm in norms]
    expected = run(attend_reference, x, norms, neurons, leaves)
    assert worst(run(attend, x, norms, neurons, leaves), expected) <= TAKEN[torch.float64]


@pytest.mark.parametrize("unlike", ["nothing", "neurons", "norms", "orders", "tracked", "uncounted", "eps", "shared"])
def test_running_statistics(backend, device, unlike):
    """One launch settles three norms that are alike; each takes its own where they are not."""
    x, norms, neurons, _ = make((4, 2, 12, 4, 4), torch.float64, device, learned=False)
    x = [(i + 1) * part + i for i, part in enumerate(x)]
    if unlike == "orders":
        x[1] = channels_last(x[1])
    if unlike == "neurons":
        neurons[0] = neurons[0]._replace(threshold=0.7)

    def after(op):
        kept = [(torch.ones(12).to(x[0]), torch.ones(12).to(x[0]), torch.tensor(i, device=device)) for i in range(3)]
        own = []
        for i, norm in enumerate(norms):
            mean, variance, batches = kept[0 if unlike == "shared" else i]
            momentum = 0.1 + 0.2 * i if unlike == "norms" else 0.3
            norm = norm._replace(running_mean=mean, running_var=variance, momentum=momentum, batches=batches)
            norm = norm._replace(eps=0.1 + i if unlike == "eps" else norm.eps)
            untracked = {"running_mean": None, "running_var": None, "batches": None}
            untracked = {"tracked": untracked, "uncounted": {"batches": None}}.get(unlike, {})
            own.append(norm._replace(**untracked) if i == 1 else norm)
        spikes = op(x, own, neurons)
        assert spikes.any()
        counted = {"shared": [3, 1, 2], "tracked": [1, 1, 3], "uncounted": [1, 1, 3]}.get(unlike, [1, 2, 3])
        assert [int(batches) for *_, batches in kept] == counted
        return [spikes, *(torch.stack(values) for *values, _ in kept)]

    for found, expected in zip(after(attend), after(attend_reference), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True), "unlike"], ids=str)
def test_norms_without_weight_or_bias(backend, device, given):
    x, norms, neurons, leaves = make((3, 2, 12, 4, 4), torch.float64, device, learned=False)
    neurons = [neuron._replace(threshold=0.4) for neuron in neurons]
    for i, norm in enumerate(norms):
        weighted, biased = (i == 0, i == 1) if given == "unlike" else given
        norms[i] = norm._replace(weight=norm.weight if weighted else None, bias=norm.bias if biased else None)
    leaves = [value for norm in norms for value in (norm.weight, norm.bias) if value is not None]
    expected = run(attend_reference, x, norms, neurons, leaves)
    assert expected[0].any() and worst(run(attend, x, norms, neurons, leaves), expected) <= TAKEN[torch.float64]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("unlike", ["mode", "dtype"])
def test_a_norm_or_an_input_unlike_the_others(backend, device, unlike, place):
    x, norms, neurons, leaves = make((2, 2, 6, 4, 4), torch.float64, device, learned=False)
    neurons = [neuron._replace(threshold=0.4) for neuron in neurons]
    if unlike == "mode":
        seen = torch.linspace(-0.5, 0.5, 6, device=device).double()
        norms[place] = norms[place]._replace(running_mean=seen, running_var=seen + 1, training=False)
    else:
        x[place], leaves = x[place].float(), []
        norms = [norm._replace(weight=None, bias=None) for norm in norms]
    expected = run(attend_reference, x, norms, neurons, leaves)
    assert expected[0].any() and worst(run(attend, x, norms, neurons, leaves), expected) <= TAKEN[x[place].dtype]


def test_only_the_time_constants_need_a_gradient(backend, device):
    x, norms, neurons, leaves = make((2, 2, 6, 4, 4), torch.float64, device, learned=True)
    norms, taus = [norm._replace(weight=None, bias=None) for norm in norms], leaves[6:]
    neurons = [neuron._replace(threshold=0.4) for neuron in neurons]
    found, expected = (torch.autograd.grad(op(x, norms, neurons).sum(), taus) for op in (attend, attend_reference))
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("place", [1, 2])
def test_unlike_neurons_are_fused_each_for_itself(backend, device, place):
    x, norms, neurons, leaves = make((4, 2, 12, 4, 4), torch.float64, device, learned=False)
    neurons[place] = neurons[place]._replace(threshold=0.7, inv_tau=0.9, surrogate=atan())
    expected = run(attend_reference, x, norms, neurons, leaves)
    assert worst(run(attend, x, norms, neurons, leaves), expected) <= TAKEN[torch.float64]


@pytest.mark.parametrize("op", [attend, attend_reference])
def test_a_sum_over_tokens_is_exact_in_half_precision(op):
    """257 tokens fire: h = 128.5 reaches the threshold, and would not with the 256 that bfloat16 makes of them."""
    x = torch.full((1, 1, 2, 1, 257), 9, dtype=torch.bfloat16)
    norm = Norm(running_mean=torch.zeros(2), running_var=torch.ones(2))
    neurons = [NeuronSpec()] * 3 + [NeuronSpec(128.25)]
    assert op([x] * 3, [norm] * 3, neurons).all() and not op([x[..., :-1]] * 3, [norm] * 3, neurons).any()


def test_a_surrogate_that_no_kernel_knows_gives_no_known_spikes():
    """`soft + (hard - soft)` need not be 0 or 1 to the bit."""
    x, norms, neurons, _ = make((2, 1, 4, 2, 2), torch.float32, "cpu", learned=False)
    x = [part.requires_grad_() for part in x]
    foreign = [neuron._replace(surrogate=torch.sigmoid) for neuron in neurons]
    unlike = [neuron._replace(threshold=0.5 + i) for i, neuron in enumerate(neurons)]
    assert not are_spikes(attend(x, norms, foreign)) and not are_spikes(attend(x, norms, [*neurons[:3], foreign[3]]))
    assert are_spikes(attend(x, norms, neurons)) and are_spikes(attend(x, norms, unlike))


def test_more_tokens_than_a_program_holds(backend, device, monkeypatch):
    x, norms, neurons, leaves = make((2, 1, 4, 4, 4), torch.float64, device, learned=False)
    expected = run(attend, x, norms, neurons, leaves)
    called = []
    monkeypatch.setattr(attention_op, "attend_op", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(attention_op, "MOST_TOKENS", 15)
    assert worst(run(attend, x, norms, neurons, leaves), expected) <= TAKEN[torch.float64]
    assert not called


@pytest.mark.cuda
def test_more_sums_than_a_program_adds_up(monkeypatch):
    """Several programs then add up some each, and more programs their sums in turn."""
    training, tiles = (pytest.importorskip(f"sdt_blocks.ops.triton.{name}") for name in ("training", "tiles"))
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "triton")
    for module, name, value in ((training, "RUNS", 1), (training, "MOST_RUNS", 2), (tiles, "THREADS", 2)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(tiles, "_tile", tiles._tile.__wrapped__)  # which remembers the tiles of other numbers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, norms, neurons, leaves = make((2, 3, 2, 4, 4), torch.float64, device, learned=True)
    x = [part + i for i, part in enumerate(x)]
    assert tiles.tile(x[0], arrange(x[0], 2, per_channel=True)[1], times=4).runs > 2
    expected = run(attend_reference, x, norms, neurons, leaves)
    assert worst(run(attend, x, norms, neurons, leaves), expected) <= TAKEN[torch.float64]


def test_opcheck(backend, device):
    x, norms, neurons, _ = make((2, 2, 6, 4, 2), torch.float32, device, learned=True)
    arguments = []
    original = attention_op.attend_op
    attention_op.attend_op = lambda *given: arguments.append(given) or original(*given)
    try:
        attend([part.requires_grad_() for part in x], norms, neurons)
    finally:
        attention_op.attend_op = original
    given = tuple(
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments[0]
    )
    torch.library.opcheck(original.op, tuple(given))
    masked, codes, sums, bits = original(*given)
    assert codes.dtype == bits.dtype == torch.uint8
    assert bits.numel() * 8 == (masked.numel() if kernels(masked).writes_bits else 0)
    assert codes.numel() and not sums.requires_grad and masked.requires_grad


def top(x):
    return x.abs().max().item() if x.numel() else 0.0


def block_of(neuron, dim=24):
    torch.manual_seed(0)
    block = SpikeDrivenSelfAttention(dim, neuron=neuron)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(0.5, 1.5)
    return block


@pytest.mark.parametrize("neuron", [LIF, ParametricLIF])
@pytest.mark.parametrize("training", [True, False])
def test_block_with_and_without_hooks(backend, device, neuron, training):
    """A hook takes the parts out of the op; nothing but speed and memory may change."""
    block = block_of(neuron).to(device).train(training)
    watched = copy.deepcopy(block)
    seen = []
    watched.mixer.coincidences.register_forward_hook(lambda module, arguments, out: seen.append(out.mean().item()))
    membrane = 3 * torch.randn(4, 2, 24, 5, 5, device=device)
    results = []
    for module in (block, watched):
        x = membrane.clone().requires_grad_()
        out = module(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    assert len(seen) == 1 and 0 < seen[0] < 1
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * top(theirs))


def test_what_takes_the_block_apart(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    called = []
    original = attention_op.attend_op
    monkeypatch.setattr(attention_op, "attend_op", lambda *given: called.append(1) or original(*given))
    membrane = torch.randn(2, 1, 16, 4, 4)

    class Other(MaskMixer):
        def forward(self, q, k, v):
            return super().forward(q, k, v) * 0

    fused, pooled, other, replaced = (
        block_of(LIF, 16),
        SpikeDrivenSelfAttention(16, event_pooling=True),
        block_of(LIF, 16),
        block_of(LIF, 16),
    )
    other.mixer = Other(16)
    replaced.k_neuron = nn.ReLU()
    for block, times in ((pooled, 0), (other, 0), (replaced, 0), (fused, 1)):
        block(membrane)
        assert len(called) == times
    assert (other(membrane) == other(membrane).flatten(3)[..., :1, None]).all()


def test_kept_for_the_gradient(monkeypatch):
    """q, k, v at a float each, one byte for what fired, and a bit for the masked spikes."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    x, norms, neurons, _ = make((4, 2, 64, 14, 14), torch.float32, "cpu", learned=False)
    x = [part.requires_grad_() for part in x]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        out = attend(x, norms, neurons)
    given = {part.untyped_storage().data_ptr() for part in x}
    added = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in given)
    assert added <= 1.1 * out.numel()


def test_without_gradient_nothing_is_kept(backend, device, monkeypatch):
    x, norms, neurons, _ = make((2, 2, 6, 3, 3), torch.float32, device, learned=False)
    expected = attend_reference(x, norms, neurons)
    results = []
    original = attention_op.attend_op
    monkeypatch.setattr(attention_op, "attend_op", lambda *given: results.append(original(*given)) or results[-1])
    with torch.no_grad():
        found = attend(x, norms, neurons)
    assert torch.equal(found, expected) and results[0][1].numel() == 0


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(monkeypatch, training):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    block = block_of(ParametricLIF).train(training)
    other = copy.deepcopy(block)
    graphs = []

    def look(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(other, fullgraph=True, backend=look)
    membrane = torch.randn(4, 2, 24, 5, 5)
    for module in (block, compiled):
        module(membrane).square().sum().backward()
    torch.testing.assert_close(compiled(membrane), block(membrane), rtol=1e-4, atol=1e-4)
    assert ("attend" in str(graphs[0])) == training
    for ours, theirs in zip(other.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * theirs.grad.abs().max().item())
