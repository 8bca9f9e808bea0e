"""The frames of a stream, one by one: neurons that continue from their last state, in each form of the network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Bench, close
from rates import seats, set_rates
from torch import Tensor, nn

from sdt_blocks import Stream, create_model, optimize_for_inference

ALLOCATORS = ["reused"]
DEVICES = ["cpu"]
FRAMES, RATE = 8, 0.09


def run(bench: Bench) -> None:
    torch.manual_seed(0)
    model = create_model("sdt_8_384").eval()
    set_rates(model, torch.rand(2, 3, 224, 224), dict.fromkeys((seat.name for seat in seats(model)), RATE))
    frames = torch.rand(1, FRAMES, 3, 224, 224)
    forms = {
        "sdt_blocks, the model as trained": model,
        "sdt_blocks, optimized": optimize_for_inference(model, paths="convolution"),
        "sdt_blocks, event-driven": optimize_for_inference(model, sparse=True),
    }
    setting = f"sdt_8_384, 224 x 224, one stream, layers at {RATE:.0%}"
    streams = {name: Stream(form) for name, form in forms.items()}
    bench.race(
        "stream, a frame",
        setting,
        {name: lambda stream=stream: stream.push(frames[:, 0]) for name, stream in streams.items()},
        baseline="sdt_blocks, the model as trained",
        parity={name: checked(form, frames) for name, form in forms.items()},
    )


def checked(form: nn.Module, frames: Tensor) -> Callable[[], str]:
    """Compare frame by frame with the whole sequence at once."""

    def check() -> str:
        stream = Stream(form)
        for frame in frames.unbind(1):
            answer = stream.push(frame)
        with torch.no_grad():
            return close(answer, form(frames), 1e-3)

    return check
