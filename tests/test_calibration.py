"""`calibrate_norms` wakes a fresh model and touches nothing else; the packaged model reads its digits."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import snntorch
import torch
from torch import nn

from sdt_blocks import LIF, calibrate_norms, create_model, example_images, example_model
from sdt_blocks.analysis import firing_rates

ROOT = Path(__file__).resolve().parents[1]


def fresh(**options):
    torch.manual_seed(0)
    return create_model("sdt_2_256", dim=32, in_channels=1, drop_path=0.5, **options)


def test_a_fresh_model_fires():
    model, (images, _) = fresh(), example_images()
    with pytest.warns(UserWarning, match="no neuron fired"):
        assert firing_rates(model, images).mean == 0
    calibrate_norms(model, images)
    assert all(firing_rates(model, images)[f"patch.neurons.{stage}"].mean > 0.01 for stage in range(3))


@pytest.mark.parametrize("training", [True, False])
def test_only_statistics_change(training):
    model, (images, labels) = fresh().train(training), example_images()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.named_parameters()}
    momenta = [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels), batch_size=8, shuffle=True, drop_last=True
    )
    torch.manual_seed(5)
    calibrate_norms(model, loader)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert modes == [module.training for module in model.modules()]
    assert momenta == [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert all(int(m.num_batches_tracked) == 2 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_statistics_are_means_over_batches():
    norm = nn.BatchNorm1d(3, momentum=0.5)
    norm(torch.randn(5, 3) + 9)  # statistics that were there count for nothing
    batches = [torch.randn(7, 3).double() * 4 + 2 for _ in range(3)]
    calibrate_norms(norm.double(), [(batch, None) for batch in batches])
    torch.testing.assert_close(norm.running_mean, torch.stack([batch.mean(0) for batch in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([batch.var(0) for batch in batches]).mean(0))


def test_a_norm_that_takes_no_part_keeps_its_statistics():
    class WithBranch(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.branch = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x) + (self.branch(x) if self.training else 0)

    model, x = WithBranch(), torch.randn(8, 3) + 2
    model(x)
    before = {name: value.clone() for name, value in model.branch.state_dict().items()}
    calibrate_norms(model, 3 * x)
    assert all(torch.equal(value, before[name]) for name, value in model.branch.state_dict().items())
    torch.testing.assert_close(model.norm.running_mean, (3 * x).mean(0))


class Node(nn.Module):
    """A node in the manner of SpikingJelly: it integrates until `reset`."""

    step_mode = "s"

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        self.v = 0.0

    def forward(self, x):
        self.v = self.v + x
        return (self.v >= 1).to(x)


@pytest.mark.parametrize("make", [lambda: snntorch.Leaky(beta=0.9, init_hidden=True), Node])
def test_neurons_that_keep_their_state_start_anew(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), make(), nn.BatchNorm1d(4))
    found = []
    # Of one size: snnTorch itself starts anew where that changes.
    x = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) * 4
    for batches in ([x], [x, x]):
        calibrate_norms(net, batches)
        found.append(net[2].running_mean.clone())
    assert found[0].any() and torch.equal(*found)


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        ([], ValueError, "no batch to run"),
        ([torch.zeros(0, 1, 16, 16)], ValueError, "must not be empty"),
        (["images"], TypeError, "must be a tensor or a tuple that starts with one, got str"),
        ([torch.rand(4, 1, 16, 16), torch.full((4, 1, 16, 16), torch.inf)], ValueError, "not finite"),
    ],
)
def test_refused_and_left_as_it_was(batches, error, text):
    model = fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=text):
        calibrate_norms(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_errors():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module to calibrate, got Tensor"):
        calibrate_norms(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="Sequential has no norm that keeps running statistics"):
        calibrate_norms(nn.Sequential(nn.Linear(3, 3), LIF()), torch.rand(2, 3))
    with pytest.raises(ValueError, match="0: InstanceNorm2d cannot take the mean over batches; make it with"):
        calibrate_norms(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)), torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"a batch of \[1, 3\] is too small for a variance"):
        calibrate_norms(nn.BatchNorm1d(3), torch.rand(1, 3))


def test_the_packaged_model():
    model, (images, labels) = example_model(), example_images()
    assert not model.training and images.shape == (20, 1, 16, 16)
    assert labels.tolist() == [digit for digit in range(10) for _ in range(2)]
    rates = firing_rates(model, images)
    assert not rates.silence and rates.mean > 0.05
    assert torch.equal(model(images).argmax(1), labels)


@pytest.mark.slow
def test_it_is_in_the_wheel(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"sdt_blocks/example/{n}" for n in ("model.safetensors", "config.json", "images.safetensors")} <= {*names}
