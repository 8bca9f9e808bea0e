"""The models against the authors' code: logits, spikes, loss, gradients and BN statistics."""

import pytest
import torch
import torch.nn.functional as F

from sdt_blocks import convert_released_state_dict

LAYERS = {
    "MS_SPS_lif": "patch.neurons.0",
    "MS_SPS_lif1": "patch.neurons.1",
    "MS_SPS_lif2": "patch.neurons.2",
    "MS_SPS_lif3": "patch.neurons.3",
    "head_lif": "head_neuron",
}
for i in range(2):
    attention, mlp = f"blocks.{i}.attention.branch.", f"blocks.{i}.mlp.branch."
    LAYERS |= {
        f"MS_SSA_Conv{i}_first_lif": attention + "neuron",
        f"MS_SSA_Conv{i}_q_lif": attention + "q_neuron",
        f"MS_SSA_Conv{i}_k_lif": attention + "mixer.k_pool",
        f"MS_SSA_Conv{i}_v_lif": attention + "mixer.v_pool",
        f"MS_SSA_Conv{i}_kv_before": attention + "mixer.coincidences",
        f"MS_SSA_Conv{i}_kv": attention + "mixer.neuron",
        f"MS_SSA_Conv{i}_x_after_qkv": attention + "mixer.masked",
        f"MS_MLP_Conv{i}_fc1_lif": mlp + "neuron1",
        f"MS_MLP_Conv{i}_fc2_lif": mlp + "neuron2",
    }


def by_head(spikes: torch.Tensor, heads: int) -> torch.Tensor:
    """`[T, B, C, H, W]` as the released `[T, B, heads, tokens, C / heads]`."""
    return spikes.unflatten(2, (heads, -1)).flatten(4).transpose(-1, -2)


def loss_of(logits, target, per_step):
    if not per_step:
        return F.cross_entropy(logits, target)
    cross_entropy = torch.stack([F.cross_entropy(step, target) for step in logits]).mean()
    return (1 - 1e-3) * cross_entropy + 1e-3 * F.mse_loss(logits, torch.ones_like(logits))


@torch.no_grad()
def test_logits(golden):
    logits = golden.model()(golden.tensors["input"])
    torch.testing.assert_close(logits, golden.tensors["logits_eval"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_every_layer_spikes_alike(golden):
    model = golden.model()
    seen = {}
    for theirs, ours in LAYERS.items():
        if f"hook.{theirs}" in golden.tensors:
            model.get_submodule(ours).register_forward_hook(
                lambda module, args, output, name=theirs: seen.__setitem__(name, output)
            )
    model(golden.tensors["input"])
    assert seen.keys() == golden.group("hook").keys()
    for name, expected in golden.group("hook").items():
        spikes = seen[name]
        if expected.ndim == 5 and expected.shape != spikes.shape:
            spikes = by_head(spikes, golden.config["num_heads"])
        assert set(spikes.unique().tolist()) <= {0.0, 1.0}
        assert (spikes == expected).float().mean() >= 0.9999, name


@pytest.mark.parametrize("path", ["reference", "compiled", "triton", "observed"])
def test_training_step(golden, path, monkeypatch, large_programs):
    """Every path is held to the released figures; with hooks the layers run one by one, without them fused."""
    if path == "triton" and golden.name == "sdt_lif_dvs_64":
        pytest.skip("one of the first layer's 327680 spikes flips by the statistics' rounding, and others follow it")
    model = golden.model().train()
    if path == "observed":
        for module in model.modules():
            module.register_forward_hook(lambda *args: None)
    else:
        monkeypatch.setenv("SDT_BLOCKS_BACKEND", path)
    logits = model(golden.tensors["input"])
    torch.testing.assert_close(logits, golden.tensors["logits_train"], atol=1e-4, rtol=0)
    loss = loss_of(logits, golden.tensors["target"], golden.config["TET"])
    assert abs(loss.item() - golden.tensors["loss_train"].item()) < 1e-4
    loss.backward()

    expected = convert_released_state_dict(golden.group("grad"))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith((".fc1.conv.bias", ".fc2.conv.bias", ".proj.conv.bias")):
            # In front of a BN: zero in theory, noise of 1e-7 in fact.
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=0)
        else:
            error = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert error < 1e-3, (name, error)

    state = model.state_dict()
    for name, value in convert_released_state_dict(golden.group("after_step")).items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-5, check_dtype=False)
