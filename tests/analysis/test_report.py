"""`analyze_model` for names, inputs and networks of any kind."""

import csv
import re
from html import unescape

import pytest
import torch
from torch import nn

from sdt_blocks import LIF, SpikeDrivenSelfAttention
from sdt_blocks.analysis import analyze_model, audit, energy, firing_rates, report

ODD = [
    "a$b_{$^",
    "$x$",
    "x[/nope]",
    "[red]r",
    "<b>&amp;",
    "=1+1",
    ":smile:",
    "with space\nand line",
    "n" * 400,
    "{0}%s",
]


class Named(nn.Module):
    """A neuron, an attention and a layer under a name of one's choice."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.conv, self.attend = nn.Conv2d(3, 8, 3, padding=1), SpikeDrivenSelfAttention(8)
        self.add_module(name, LIF())
        self.add_module(f"{name} head", nn.Linear(8, 2))

    def forward(self, x):
        spikes = self._modules[self.name](6 * self.conv(x).expand(2, *x.shape[:1], 8, *x.shape[2:]))
        return self._modules[f"{self.name} head"](spikes.mean((-2, -1)) + self.attend(spikes).mean((-2, -1))).mean(0)


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_names_come_out_as_they_are(name, tmp_path, capsys):
    torch.manual_seed(0)
    folder = tmp_path / "[v2] $1"
    model = Named(name).eval()
    rates, found = analyze_model(model, [(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))], folder, layer=name)
    assert rates[name].mean > 0 and found[f"{name} head"].energy_mj > 0
    assert {path.name for path in folder.iterdir()} >= {"energy.png", "rates.png", "raster.png", "rate_histogram.png"}
    assert str(folder / "index.html") in capsys.readouterr().out
    page = re.sub("<wbr>", "", (folder / "index.html").read_text(encoding="utf-8"))
    assert name in unescape(page) and "<b>&amp;" not in page
    for table in (found, rates, audit(model, torch.rand(1, 3, 8, 8))):
        assert name.split("\n")[0] in re.sub(r"[\s│]", "", str(table)) or "\n" in name or " " in name or len(name) > 99
    with open(folder / "rates.csv", newline="", encoding="utf-8") as file:
        cells = [row[0] for row in csv.reader(file)]
    assert name in [cell.removeprefix("'") for cell in cells] and not any(cell.startswith("=") for cell in cells)


def test_two_long_names_keep_a_bar_each(tmp_path):
    from sdt_blocks.analysis import plots

    net = nn.Sequential()
    for end in "ab":
        net.add_module("x" * 30 + end + "y" * 30, nn.Linear(4, 4))
    net.add_module("fire", LIF())
    figure = plots.energy_bars(energy(net, 3 * torch.ones(2, 1, 4), neurons=()))
    assert len(figure.axes[0].patches) == 2 + 2


class TimeFirst(nn.Module):
    """Takes `[T, B, C, H, W]` and returns more than its logits."""

    def __init__(self):
        super().__init__()
        self.conv, self.attend = nn.Conv2d(1, 8, 3, padding=1), SpikeDrivenSelfAttention(8)
        self.last, self.head = LIF(threshold=0.1), nn.Linear(8, 2)

    def forward(self, x):
        membrane = 6 * self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        features = self.last((membrane + self.attend(membrane)).mean((-2, -1)))
        return self.head(features).mean(0), {"features": features}


@pytest.mark.parametrize(("steps", "batch"), [(4, 3), (3, 4), (4, 4), (1, 3), (5, 1)])
def test_time_first_and_tuples(steps, batch, tmp_path):
    torch.manual_seed(0)
    inputs = torch.rand(steps, batch, 1, 6, 6)
    rates, report = analyze_model(TimeFirst().eval(), [(inputs, torch.zeros(batch))], tmp_path)
    assert (rates.samples, report.steps) == (batch, steps) and rates["last"].mean > 0
    assert len(list((tmp_path / "overlays").iterdir())) == min(batch, 4)
    counts = f"{batch} sample{'s' * (batch > 1)}, {steps} time step{'s' * (steps > 1)}"
    assert f"{counts}, input {steps} x 1 x 6 x 6" in (tmp_path / "index.html").read_text()


def test_a_batch_as_large_as_the_time_steps_stays_a_batch(small, tmp_path):
    analyze_model(small(), torch.rand(3, 3, 16, 16), tmp_path)
    assert "3 samples, 3 time steps, input 3 x 16 x 16" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 3, 3, 1, 1)])
def test_one_pixel(small, shape, tmp_path):
    analyze_model(small(), [torch.rand(shape)], tmp_path)
    assert (tmp_path / "overlays" / "image_1.png").stat().st_size > 0


def test_an_analysis_that_is_stopped_leaves_the_one_before(small, tmp_path, monkeypatch):
    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    analyze_model(small(), torch.rand(3, 3, 16, 16), tmp_path)
    before = files()
    monkeypatch.setattr(report, "draw_neurons", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        analyze_model(small(), torch.rand(2, 3, 16, 16), tmp_path)
    assert files() == before and tmp_path / "energy.json" in before


def test_errors_at_the_door(small, tmp_path):
    model, x = small(), torch.rand(2, 3, 16, 16)
    with pytest.raises(TypeError, match="read more than once"):
        analyze_model(model, iter([x]), tmp_path)
    with pytest.raises(ValueError, match="no neuron layer is called 'x'; there are patch"):
        analyze_model(model, [x], tmp_path, layer="x")
    with pytest.raises(ValueError, match="images must not be negative, got -1"):
        analyze_model(model, [x], tmp_path, images=-1)
    with pytest.raises(ValueError, match="no batch"):
        analyze_model(model, [], tmp_path)
    with pytest.raises(KeyError, match="there is no layer 'x'; the layers are patch"):
        firing_rates(model, x)["x"]
