"""Early answers: who leaves when, and that nothing else changes."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import nn

from sdt_blocks import LIF, EarlyAnswers, example_images, example_model, optimize_for_inference
from sdt_blocks.inference.early import MEASURES, how_sure

FORMS = {
    "plain": lambda model: model,
    "dense": lambda model: optimize_for_inference(model, paths="convolution"),
    "events": lambda model: optimize_for_inference(model, sparse=True),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("form", FORMS)
def test_who_leaves_has_the_answer_of_so_many_steps(form, measure):
    """Each sample's logits are those of the model with as many time steps, and it left when it was sure, not before."""
    model, (images, _) = example_model(), example_images()
    fast = FORMS[form](model)
    early = EarlyAnswers(fast, threshold=0.6, measure=measure)
    logits, steps = early(images)
    assert steps.unique().tolist() == [1, 2, 3, 4] and logits.shape == (20, 10)
    sure = []
    for count in range(1, 5):
        model.time_steps = count
        with torch.no_grad():
            whole = FORMS[form](model)(images)
        sure.append(how_sure(whole, measure))
        of = steps == count
        torch.testing.assert_close(logits[of], whole[of], rtol=0, atol=1e-6)
    met = torch.stack(sure) >= 0.6
    met[-1] = True
    assert torch.equal(steps, met.long().argmax(0) + 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_threshold_that_is_never_met_changes_nothing(form, on_a_grid):
    model, (images, _) = FORMS[form](on_a_grid(example_model())), (example_images()[0].mul(8).round() / 8, None)
    with torch.no_grad():
        whole = model(images)
    logits, steps = EarlyAnswers(model, threshold=math.inf)(images)
    assert torch.equal(logits, whole) and steps.tolist() == [4] * 20
    once, first = EarlyAnswers(model, threshold=0.0)(images)
    assert first.tolist() == [1] * 20 and not torch.equal(once, whole)
    with torch.no_grad():
        assert torch.equal(model(images), whole)


@pytest.mark.parametrize("options", [{"sparse": True}, {"exact": True}, {"paths": "convolution"}])
@pytest.mark.parametrize("file", ["sdt_lif_static_64", "sdtv2_grads_T2_64", "qkformer_imagenet_64"])
def test_the_first_layer_is_computed_once(file, options, named_golden, on_a_grid, monkeypatch):
    """The same answers as without what is kept, for samples that leave at different steps."""
    model = optimize_for_inference(on_a_grid(named_golden(file).model()), **options)
    size = named_golden(file).tensors["input"].shape[-3:]
    images = torch.randint(0, 16, (6, *size), generator=torch.Generator().manual_seed(0)) / 8
    seen = []
    for form in (form for node, form in model.forms.items() if node in model.once and isinstance(form, nn.Module)):
        form.register_forward_hook(lambda *_: seen.append(1))
    assert any(node in model.once for node, form in model.forms.items() if form is not None)
    early = EarlyAnswers(model, threshold=math.inf, time_steps=4)
    thresholds = early.sure(torch.stack([early.stream.push(images) for _ in range(2)]))
    early.stream.reset()
    early.threshold = thresholds.median().item()
    seen.clear()
    kept, computed = early(images), len(seen)
    monkeypatch.setattr(type(model), "once", property(lambda self: set(), lambda *_: None), raising=False)
    again = early(images)
    assert torch.equal(kept.logits, again.logits) and torch.equal(kept.steps, again.steps)
    assert len(kept.steps.unique()) > 1 and kept.logits.std() > 0
    assert 0 < computed < len(seen) - computed and model.still is None


def test_measures():
    logits = torch.randn(7, 5) * 3
    p = logits.double().softmax(-1).numpy()
    assert how_sure(logits, "entropy").numpy() == pytest.approx(1 - entropy(p, axis=1) / math.log(5), abs=1e-5)
    first = np.sort(p, axis=1)
    assert how_sure(logits, "margin").numpy() == pytest.approx(first[:, -1] - first[:, -2], abs=1e-5)
    certain = torch.tensor([[1000.0, 0.0, -math.inf]])
    assert all(how_sure(certain, measure).item() == 1 for measure in MEASURES)


def test_the_threshold_keeps_to_the_tolerance():
    model, (images, labels) = example_model(), example_images()
    batches = [(images[:12], labels[:12]), (images[12:], labels[12:])]
    full = (model(images).argmax(1) == labels).float().mean().item()
    steps = []
    for tolerance in (0.0, 0.2, 0.99):
        early = EarlyAnswers.fit(model, batches, tolerance=tolerance)
        found = early(images)
        accuracy = (found.logits.argmax(1) == labels).float().mean().item()
        assert accuracy >= full - tolerance - 1e-6
        point = next(point for point in early.curve if point.threshold == early.threshold)
        assert (point.accuracy, point.steps) == pytest.approx((accuracy, found.steps.float().mean().item()))
        steps.append(point.steps)
    assert steps[0] < 4 and steps == sorted(steps, reverse=True) and steps[-1] == 1
    assert early.curve[0].threshold == math.inf and early.curve[0].steps == 4
    assert early.curve[0].accuracy == pytest.approx(full)
    # Who is as sure as the threshold leaves.
    early.threshold = early.every_step([(images, labels)])[0][0].min().item()
    assert (early(images).steps == 1).all()


def test_no_lucky_threshold_is_taken():
    """A threshold that happens to be right below one that is wrong is none that was fitted."""
    sure = torch.tensor([[0.9, 0.5, 0.1], [1.0, 1.0, 1.0]])
    right = torch.tensor([[True, False, True], [True, True, False]])
    points = EarlyAnswers.curve_of(sure, right)
    assert [point.accuracy for point in points] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 2 / 3])
    assert [point.steps for point in points] == pytest.approx([2, 5 / 3, 4 / 3, 1])
    early = EarlyAnswers(example_model(), threshold=1.0)
    early.curve = points
    assert [early.at(tolerance) for tolerance in (0.0, 0.3, 0.4)] == [points[1], points[1], points[3]]


def test_refusals():
    model, (images, labels) = example_model(), example_images()
    for options, message in (
        ({"threshold": 0.5, "measure": "norm"}, "measure must be one of entropy, margin, got 'norm'"),
        ({"threshold": -0.1}, "at least 0 .*got -0.1"),
        ({"threshold": math.nan}, "at least 0 .*got nan"),
        ({"threshold": True}, "got True"),
        ({"threshold": 0.5, "time_steps": 0}, "at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            EarlyAnswers(model, **options)
    early = EarlyAnswers(model, threshold=0.5)
    with pytest.raises(ValueError, match=r"still images \[B, C, H, W\], got \[20, 1, 1, 16, 16\]; frames come"):
        early(images[:, None])
    for batches, message in (
        ([], "no batch to fit on"),
        ([images], "a pair of images and their classes"),
        ([(images, labels[:3])], r"a class for each of 20 images, got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            EarlyAnswers.fit(model, batches)
    with pytest.raises(ValueError, match="tolerance must be a share"):
        EarlyAnswers.fit(model, [(images, labels)], tolerance=5)
    with pytest.raises(TypeError, match="no neuron whose state"):
        EarlyAnswers(nn.Linear(3, 3), threshold=0.5)
    for net, message in ((TwoHeads(), "a model with one head, this one has 2"), (OneClass(), "at least two classes")):
        early = EarlyAnswers(net.eval(), threshold=0.5)
        with pytest.raises(TypeError, match=message):
            early(torch.rand(1, 3, 8, 8))
        assert not early.stream.seen.numel()


class TwoHeads(nn.Module):
    time_steps = 2

    def __init__(self):
        super().__init__()
        self.neuron, self.one, self.other = LIF(), nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, frames):
        spikes = self.neuron(frames.transpose(0, 1).mean((-2, -1)))
        return self.one(spikes).mean(0), self.other(spikes).mean(0)


class OneClass(TwoHeads):
    def forward(self, frames):
        return super().forward(frames)[0][:, :1]
