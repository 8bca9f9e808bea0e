"""Norms and neurons that somebody looks at, shards or synchronizes: fused where that is exact, else said once."""

import copy
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from sdt_blocks import LinearSpikeAttention, SpikeDrivenBlock, SpikeDrivenSelfAttention, SpikingMLP, steps
from sdt_blocks.blocks import SpikingSelfAttention
from sdt_blocks.ops import dispatch, norm_lif


@pytest.fixture
def alone(monkeypatch):
    """A process group of this process."""
    for method in ("record_event", "wait_event"):
        # Without effect on a CPU: in torch 2.6 its streams lack them, though `fully_shard` calls them.
        monkeypatch.setattr(torch.cpu.Stream, method, lambda *_: None, raising=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())


@pytest.fixture
def fused(monkeypatch, backend):
    """How often a norm and its neuron ran as one."""
    calls = []
    original = norm_lif.statistics
    monkeypatch.setattr(norm_lif, "statistics", lambda *given, **named: calls.append(1) or original(*given, **named))
    return calls


@pytest.fixture(params=["compiled", "triton"])
def backend(request, monkeypatch):
    if request.param == "triton" and os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("the tensors here are on the CPU, where Triton's interpreter alone runs")
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", request.param)
    return request.param


def trained(block, x):
    """Values, gradients and buffers of a training step."""
    y = block(x)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum().backward()
    gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in block.parameters()]
    return [y, *gradients, *(buffer for buffer in block.buffers() if buffer.is_floating_point())]


def mlp(channels=6):
    torch.manual_seed(0)
    block = SpikingMLP(channels, hidden=10)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 1.0)
    return block


of_all = nn.modules.module


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
        lambda _, hook: of_all.register_module_forward_hook(hook),
        lambda _, hook: of_all.register_module_forward_pre_hook(hook),
        lambda _, hook: of_all.register_module_full_backward_hook(hook),
        lambda _, hook: of_all.register_module_full_backward_pre_hook(hook),
    ],
)
def test_every_kind_of_hook_is_seen(register):
    layer = nn.Conv2d(2, 2, 1)
    assert not steps.has_hooks(layer)
    handle = register(layer, lambda *_: None)
    assert steps.has_hooks(layer)
    handle.remove()
    assert not steps.has_hooks(layer)


def assert_same(found, expected):
    assert len(found) == len(expected) and expected[1].abs().sum() > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_synchronized_norms_with_nobody_to_wait_for_are_fused(alone, fused, training):
    """Every norm with a neuron behind it: one of an MLP's two."""
    x = torch.randn(2, 3, 6, 4, 4, generator=torch.Generator().manual_seed(0)) * 2
    block = mlp().train(training)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert isinstance(synchronized.fc1.norm, nn.SyncBatchNorm)
    # On a CPU torch's own would refuse to train.
    synchronized.fc2.norm = copy.deepcopy(block.fc2.norm)
    expected = trained(block, x)
    before = len(fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(trained(synchronized, x), expected)
    assert len(fused) == 2 * before > 0


def test_a_norm_shares_batches_with_its_own_group(monkeypatch):
    groups = {size: SimpleNamespace(group_name=f"of {size}") for size in (1, 2)}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: int(group.group_name[3:]))
    norm = nn.SyncBatchNorm(4, process_group=groups[2])
    assert steps.group_of(norm) == steps.norm_settings(norm).group == "of 2"
    assert steps.group_of(nn.SyncBatchNorm(4, process_group=groups[1])) == steps.group_of(nn.BatchNorm2d(4)) == ""
    assert steps.group_of(norm.eval()) == ""


def test_a_sharded_block_is_fused(alone, fused):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    x, block = torch.randn(2, 2, 16, 4, 4) * 2, SpikeDrivenBlock(16, num_heads=2)
    expected = trained(copy.deepcopy(block), x)
    before = len(fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(trained(fully_shard(block, mesh=alone), x), expected)
    assert len(fused) == 2 * before > 0


def test_what_is_sharded_by_itself_is_said_once_and_exact(alone, fused):
    from torch.distributed.fsdp import fully_shard

    x, block = torch.randn(2, 2, 6, 4, 4, generator=torch.Generator().manual_seed(0)) * 2, mlp()
    expected = trained(copy.deepcopy(block), x)
    before = len(fused)
    fully_shard(block.fc1.norm, mesh=alone)
    with pytest.warns(UserWarning, match="FSDPBatchNorm2d is sharded by itself.*the block around it") as caught:
        assert_same(trained(block, x), expected)
        block(x)
    assert len([w for w in caught if "fused kernel" in str(w.message)]) == 1
    assert len(fused) == before


HOOKED = {
    "norm": lambda block: block.fc1.norm.register_forward_hook(lambda *given: None),
    "neuron": lambda block: block.neuron2.register_full_backward_hook(lambda *given: None),
    "unit": lambda block: block.fc1.register_forward_pre_hook(lambda *given: None),
}


@pytest.mark.parametrize("hook", HOOKED.values(), ids=HOOKED)
def test_a_hook_is_said_once_and_exact(fused, hook):
    x, block = torch.randn(2, 2, 6, 4, 4, generator=torch.Generator().manual_seed(0)) * 2, mlp()
    expected = trained(copy.deepcopy(block), x)
    before = len(fused)
    hook(block)
    with pytest.warns(UserWarning, match=r"a hook.* on a \w+ has to see it called.*until that is removed") as caught:
        assert_same(trained(block, x), expected)
        block(x)
    assert len([w for w in caught if "fused kernel" in str(w.message)]) == 1
    assert len(fused) == before
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        block.eval()(x)


@pytest.mark.parametrize(
    ("make", "warned"), [(SpikeDrivenSelfAttention, True), (LinearSpikeAttention, False), (SpikingSelfAttention, False)]
)
def test_a_hook_on_a_mixer_is_said_where_it_costs_something(make, warned):
    block = make(8)
    block.mixer.register_forward_hook(lambda *given: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        block(torch.rand(2, 2, 8, 3, 3) * 4)
    said = [str(one.message) for one in caught]
    assert any("on a MaskMixer has to see it called" in one for one in said) == warned == bool(said)


def test_a_hook_on_the_block_costs_nothing(fused):
    x, block = torch.randn(2, 2, 6, 4, 4, generator=torch.Generator().manual_seed(0)) * 2, mlp()
    expected = trained(copy.deepcopy(block), x)
    before, seen = len(fused), []
    block.register_forward_hook(lambda *given: seen.append(1))
    block.register_full_backward_hook(lambda *given: seen.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(trained(block, x.requires_grad_()), expected)
    assert len(seen) == 2 and len(fused) == 2 * before > 0


def test_a_norm_that_averages_all_batches_reads_nothing_back(backend):
    """`momentum=None`: the share of a batch is 1 / batches, a tensor on the device."""
    torch.manual_seed(0)
    ours, theirs = nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for _ in range(3):
        x = torch.randn(2, 2, 3, 4, 4)
        steps.normalize_and_fire(ours, steps.LIF(), x)
        theirs(x.flatten(0, 1))
    assert isinstance(steps.norm_settings(ours).momentum, torch.Tensor)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
