"""A network that does not fire is said to be silent first, and is never shown as a proof."""

import re

import pytest
import torch
from torch import nn

from sdt_blocks import LIF, create_model
from sdt_blocks.analysis import analyze_model, audit, energy, firing_rates

DEAD = "no neuron fired: the norms have seen 0 batches"


def test_a_fresh_network(tmp_path, capsys):
    model, x = create_model("sdt_2_256", dim=32), torch.rand(2, 3, 16, 16)
    for analysis in (firing_rates, energy, audit):
        with pytest.warns(UserWarning, match=DEAD):
            result = analysis(model, x)
        assert str(result).startswith(DEAD) and result.silence.startswith(DEAD)
    assert "spike-driven" in result.summary()[1] and "does nothing here" in result.summary()[1]
    with pytest.warns(UserWarning, match=DEAD):
        analyze_model(model, [x], tmp_path)
    assert capsys.readouterr().out.startswith(DEAD)
    text = re.sub(r"(?s)<style>.*?</style>", "", (tmp_path / "index.html").read_text(encoding="utf-8"))
    assert text.index(DEAD) < text.index("input 3 x 16 x 16") < text.index("not shown: no neuron fired")
    assert "yes</dd>" not in text and "good" not in text
    assert (tmp_path / "audit.txt").read_text(encoding="utf-8").startswith(DEAD)


def test_norms_that_have_seen_batches_are_not_blamed(small):
    model = small()
    for module in model.modules():
        if isinstance(module, LIF):
            module.threshold = 1e9
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked += 330
    with pytest.warns(UserWarning, match="no neuron fired: the norms have seen 330 batches; look at the thresholds"):
        firing_rates(model, torch.rand(2, 3, 16, 16))


def test_without_norms():
    net = nn.Sequential(nn.Linear(4, 4), LIF(threshold=1e9))
    with pytest.warns(UserWarning, match="no neuron fired: no norm brings its input to the thresholds"):
        firing_rates(net, torch.rand(2, 3, 4))


def test_some_layers_are_silent(small, recwarn):
    model, x = small(), torch.rand(2, 3, 16, 16)
    model.head_neuron.threshold = 1e9
    for result in (firing_rates(model, x), energy(model, x), audit(model, x)):
        assert str(result).startswith(
            f"1 of {len(firing_rates(model, x).layers) - 2} neuron layers never fired: head_n"
        )
    assert not [w for w in recwarn if "fired" in str(w.message)]


def test_a_lively_network_has_nothing_to_say(small, tmp_path, capsys):
    model = small()
    rates, report = analyze_model(model, [torch.rand(2, 3, 16, 16)], tmp_path)
    assert rates.silence == report.silence == "" and rates.mean > 0
    assert capsys.readouterr().out.startswith("The network is spike-driven.\n")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert '<dd class="good">yes</dd>' in page and "never fired" not in page
