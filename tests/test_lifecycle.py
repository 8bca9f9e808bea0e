"""Optimized models in a server: its defaults, threads and copies, weights that are no numbers, other machines."""

import copy
import io
import json
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor, nn

from sdt_blocks import EarlyAnswers, SpikingMLP, Stream, optimize_for_inference
from sdt_blocks.inference import timings
from sdt_blocks.ops import integers, packed

FORMS: dict[str, dict[str, Any] | None] = {
    "as trained": None,
    "dense": {},
    "by onednn": {"paths": "integers"},
    "by events": {"sparse": True},
    "8 bits": {"dtype": torch.int8},
    "exact": {"exact": True},
}
for_each_form = pytest.mark.parametrize("form", FORMS)


def made(model: nn.Module, form: str) -> nn.Module:
    options = FORMS[form]
    return model if options is None else optimize_for_inference(model, **options)


def streamed(model: nn.Module, images: Tensor) -> Tensor:
    stream = Stream(model)
    return [stream.push(images) for _ in range(2)][-1]


def early(model: nn.Module, images: Tensor) -> Tensor:
    return EarlyAnswers(model, threshold=0.2)(images).logits


def elsewhere(function: Callable[[], Any]) -> Any:
    """The result of a function in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.mark.parametrize("name", ["sdt_2_256", "sdt_v2_15m", "qkformer_4_384"])
@for_each_form
@torch.no_grad()
def test_default_dtype_and_device_change_nothing(make_small, name, form):
    small = make_small(name)
    ways = [lambda model, images: model(images), streamed, early]
    expected = [way(made(small.model, form), small.images) for way in ways]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = [way(made(small.model, form), small.images) for way in ways]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected)) and expected[0].std() > 0.01


@for_each_form
@torch.no_grad()
def test_threads_share_a_model_while_it_streams(make_small, form):
    """Inside of every call of a stream, another thread calls the model, streams, and answers early."""
    small = make_small("sdt_v2_15m")
    model, other = made(small.model, form), small.images.flip(-1)
    calls = [partial(model, other), partial(streamed, model, other), partial(early, model, other)]
    expected = [call() for call in calls]
    found: list[Tensor] = []
    waiting: list[Callable[[], Tensor]] = []

    def call_elsewhere(*_: Any) -> None:
        now, waiting[:] = list(waiting), []
        found.extend(map(elsewhere, now))

    hook = model.register_forward_hook(call_elsewhere)
    for way in (streamed, early):
        alone = way(model, small.images)
        waiting[:], found[:] = calls, []
        together = way(model, small.images)
        assert torch.equal(together, alone) and all(map(torch.equal, found, expected)) and len(found) == len(calls)
    hook.remove()
    assert not torch.equal(expected[0], model(small.images))


@torch.no_grad()
def test_threads_share_neurons_with_a_memory_while_one_streams():
    """What one thread's call has left in snnTorch's neuron so far is not where a stream of another begins."""
    block = SpikingMLP(8, neuron=lambda threshold: snntorch.Leaky(beta=0.9, threshold=threshold)).eval()
    x, started, done = torch.rand(4, 2, 8, 3, 3), threading.Event(), threading.Event()
    expected = Stream(block)(x)
    neuron = next(module for module in block.modules() if isinstance(module, snntorch.Leaky))

    def wait_once(*_: Any) -> None:
        if not started.is_set():
            started.set()
            assert not done.wait(0.5), "the stream has begun in the middle of a call"

    hook = neuron.register_forward_hook(wait_once)
    call = threading.Thread(target=block, args=(x,))
    call.start()
    started.wait()
    found = Stream(block)(x)
    done.set()
    call.join()
    hook.remove()
    assert torch.equal(found, expected) and expected.any()


def test_a_stream_is_of_one_thread_at_a_time(make_small):
    small = make_small("sdt_2_256")
    stream = Stream(small.model)
    with stream, pytest.raises(RuntimeError, match="another thread is in this stream; give each thread"):
        elsewhere(lambda: stream.push(small.images))
    assert stream.push(small.images).shape == elsewhere(lambda: stream.push(small.images)).shape


@torch.no_grad()
def test_a_copy_made_in_a_stream_is_in_none(make_small):
    small = make_small("sdt_2_256")
    expected = small.model(small.images)
    stream = Stream(small.model)
    stream.push(small.images)
    with stream:
        again = copy.deepcopy(small.model)
        assert torch.equal(again(small.images), expected) and not torch.equal(small.model(small.images), expected)
    assert torch.equal(again(small.images), expected)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "as trained"])
@torch.no_grad()
def test_a_saved_form_is_arranged_for_the_machine_that_loads_it(make_small, monkeypatch, form):
    """As if it had been made on a processor whose vectors are half as wide."""
    small = make_small("sdt_v2_15m")
    expected = made(small.model, form)(small.images)
    with monkeypatch.context() as other_machine:
        for module in (packed, integers):
            other_machine.setattr(module, "tiled", lambda rows: rows.unflatten(1, (-1, 1)).transpose(0, 1).contiguous())
        model, saved = made(small.model, form), io.BytesIO()
        torch.save(model, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(small.images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(small.images), expected)


class Pointwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean((-2, -1))).mean(0)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "as trained"])
def test_weights_that_are_no_numbers_are_refused(make_small, form):
    model = make_small("sdt_v2_15m").model
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_var[1] = torch.nan
    with pytest.raises(ValueError, match=r"norm\.running_var of .* holds values that are not finite numbers"):
        made(model, form)


def test_what_was_measured_with_such_weights_is_not_kept(monkeypatch, tmp_path):
    """The next model with layers of that shape runs."""
    monkeypatch.setenv("SDT_BLOCKS_CACHE", str(tmp_path))
    timings._of_threads.cache_clear()
    model, frames = Pointwise().eval(), torch.rand(2, 3, 3, 8, 8)
    expected = model(frames)
    loaded = optimize_for_inference(model)
    state = loaded.state_dict()
    loaded.load_state_dict({name: value * torch.nan for name, value in state.items()})
    try:
        with pytest.raises(ValueError, match="weights that are not finite numbers"):
            loaded(frames)
        torch.testing.assert_close(optimize_for_inference(model)(frames), expected)
        loaded.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
        assert not loaded(frames).any()
    finally:
        timings._of_threads.cache_clear()
    (file,) = tmp_path.glob("timings-*.json")
    assert all(json.loads(file.read_text()).values())


@pytest.mark.parametrize("form", [form for form in FORMS if form != "as trained"])
def test_an_empty_batch_is_refused(form):
    """With one message, whatever the network would do with it."""
    model = made(Pointwise().eval(), form)
    assert model(torch.rand(2, 1, 3, 4, 4)).shape == (1, 2)
    with pytest.raises(TypeError, match=r"conv expects floating-point \[T, B, C, H, W\] with nothing empty, got"):
        model(torch.rand(2, 0, 3, 4, 4))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "as trained"])
def test_a_form_stays_on_its_device(make_small, form):
    """Its kernels would take an address of another device for one of their own."""
    small = make_small("sdt_2_256")
    model = made(small.model, form)
    expected = model(small.images)
    with pytest.raises(TypeError, match="runs kernels of cpu, it cannot be moved to meta: move the model there"):
        nn.Sequential(model).to("meta")
    with pytest.raises(ValueError, match="takes input on cpu, where it was made, got it on meta; move the input"):
        model(small.images.to("meta"))
    assert torch.equal(model.to("cpu").share_memory()(small.images), expected)


@pytest.mark.filterwarnings("ignore:the unfused reference runs")
@for_each_form
def test_transforms_of_functions_are_for_the_plain_model(make_small, form):
    small = make_small("sdt_2_256")
    model, images = made(small.model, form), small.images[:2]
    if form == "as trained":
        found = torch.func.vmap(lambda image: model(image[None])[0])(images)
        torch.testing.assert_close(found, model(images), atol=1e-4, rtol=1e-4)
        return
    with pytest.raises(RuntimeError, match=r"no rules for torch.func and forward-mode gradients: call the plain model"):
        torch.func.vmap(lambda image: model(image[None])[0])(images)
    with pytest.raises(RuntimeError, match=r"no rules for torch.func and forward-mode gradients: call the plain model"):
        torch.func.jvp(model, (images,), (images,))
