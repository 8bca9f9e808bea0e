"""Exports a model for other runtimes, and compares the exported model's answers with the model's own.

    python recipes/export.py checkpoint=runs/digits format=onnx
    python recipes/export.py checkpoint=8_384.pth.tar format=pt2 output=sdt_8_384.pt2 model.time_steps=2

`onnx` is for ONNX Runtime and similar runtimes, `pt2` is torch.export's program, which torch.export.load reads and
AOTInductor compiles, `nir` a graph for neuromorphic simulators and chips, which have no attention. Any number of images
may be given at a time (with batch=N exactly N); the number of time steps is fixed. A NIR graph takes one sample, frame
by frame, any number of frames; the mean of its outputs over time is the model's answer. This recipe's own keys: see the
end.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.command_line import command
from common.config import Config, ConfigError, RunError, load_config
from common.schema import option
from common.trained import load, read_trained

from sdt_blocks.analysis.tables import counted
from sdt_blocks.files import write_atomically

FORMATS = ("onnx", "pt2", "nir")
CLOSE = 1e-4
"""Tolerance for the logits of another runtime, which adds in another order."""
CHECKED = 8
"""Number of images on which the model and its export are compared."""
EXTRA = "pip install 'sdt_blocks[export]'"


@dataclass
class Options:
    """The keys of this recipe."""

    checkpoint: str | None = option(None, "a run folder, a saved model, or a released .pth.tar", path=True)
    format: str = option("onnx", "for ONNX Runtime, for torch.export, or for neuromorphic tools", choices=FORMATS)
    output: str | None = option(None, "the file to write; null: model.FORMAT next to the checkpoint", path=True)
    batch: int | None = option(None, "images at a time; null: any number", least=1)
    ema: bool = option(False, "use the averaged weights of a run")


def frame_shape(model: Any, config: Config, arguments: Sequence[str]) -> tuple[int, int, int]:
    """Number, height and width of the frames for a model of events: as the arguments say, else as in its training."""
    from sdt_datasets.event_data import RELEASED_SIZE

    events = config.events
    steps = events.time_steps if "events.time_steps" in {one.partition("=")[0] for one in arguments} else None
    side = events.size
    if side is None and model.card is not None and model.card.input_size is not None:
        height, width = model.card.input_size
        return steps or model.time_steps, height, width
    side = side or RELEASED_SIZE.get(config.data.name)
    if side is None and events.sensor_size is None:
        raise ConfigError("nothing says the size of the frames; give events.size=N, or events.sensor_size=[W,H]")
    width, height = (side, side) if side else events.sensor_size  # type: ignore[misc]
    return steps or model.time_steps, height, width


def example_inputs(model: Any, config: Config, count: int, arguments: Sequence[str]) -> Any:
    """Random images or, for a model of events, random frames of the configured size: `[count, ...]`."""
    import torch

    data, generator = config.data, torch.Generator().manual_seed(0)
    if model.in_channels == 2:
        steps, height, width = frame_shape(model, config, arguments)
        return (3 * torch.rand(count, steps, 2, height, width, generator=generator)).floor()
    images = torch.rand(count, model.in_channels, data.img_size, data.img_size, generator=generator)
    # Blurred, as photographs are: with noise the deeper layers would be silent.
    images = torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2)
    low, high = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    return ((images - low) / (high - low) - sum(data.mean) / len(data.mean)) / (sum(data.std) / len(data.std))


def write_pt2(model: Any, x: Any, path: Path, *, any_batch: bool) -> Callable[[Any], Any]:
    """Write torch.export's program of the model. Returns a function that answers by the file."""
    import torch

    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    with torch.no_grad():  # with gradients, parts that the model computes without them become graphs that are not saved
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    content = io.BytesIO()  # PyTorch's own writing of the file aborts the process where the disk is full
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    return torch.export.load(str(path)).module()  # type: ignore[no-any-return]


def write_onnx(model: Any, x: Any, path: Path, *, any_batch: bool) -> Callable[[Any], Any]:
    """Write an ONNX graph with input `x` and output `logits`. Returns a function that answers by the file."""
    import torch

    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"format=onnx needs onnx, onnxscript and onnxruntime ({error}): {EXTRA}") from None
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["logits"], "dynamic_shapes": shapes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of its own parts
        torch.onnx.export(model, (x,), str(path), dynamo=True, external_data=False, verbose=False, **names)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"x": images.numpy()})[0])


def write_nir(model: Any, x: Any, path: Path, *, any_batch: bool) -> Callable[[Any], Any]:
    """Write a NIR graph, which takes one sample at a time, whatever `any_batch`. Returns a function that answers by it.

    Raises `ConfigError` for a model that NIR cannot represent.
    """
    from sdt_blocks.inference import export_to_nir, simulate_nir
    from sdt_blocks.steps import present

    try:
        import nir

        graph = export_to_nir(model, x)
    except ImportError as error:
        raise ConfigError(f"format=nir needs nir ({error}): {EXTRA}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"format=nir: {error}") from error
    nir.write(str(path), graph)
    written = nir.read(str(path))

    def answers(images: Any) -> Any:
        return simulate_nir(written, present(images, model.time_steps, model.in_channels))["output"].mean(0)

    return answers


def check(model: Any, answers: Callable[[Any], Any], x: Any) -> str:
    """A sentence on how close the exported model is to the model itself. Raises `RunError` if it differs too much."""
    import torch

    with torch.no_grad():
        expected, found = model(x), answers(x)
    if not torch.isfinite(expected).all() or found.shape != expected.shape:
        raise RunError(f"the model answers {list(expected.shape)}, what was written {list(found.shape)}")
    off = (found - expected).abs()
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    if off.max() > CLOSE and (off.mean() > 0.05 * expected.std() or same < 1):
        raise RunError(
            f"what was written answers otherwise than the model: logits differ by up to {off.max():.2g}, {same:.0%} of "
            f"the classes are the same"
        )
    more = "" if off.max() <= CLOSE else "; membranes within rounding of their threshold fire in one alone"
    return f"the same class for {counted(len(x), 'image')}, logits differ by {off.max():.1e} at most{more}"


def run(arguments: Sequence[str]) -> str:
    """Write the file and return a description of it. Raises `ConfigError` or `RunError`."""
    options, checkpoint, rest = read_trained(Options, arguments)
    config = load_config(rest, default="imagenet_8_384")
    from common.progress import warn

    from sdt_blocks.analysis import firing_rates

    model, config = load(checkpoint, config, rest, averaged=options.ema)
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    path = Path(options.output) if options.output else beside / f"model.{options.format}"
    if not path.parent.is_dir():
        raise ConfigError(f"output={path}: there is no folder {path.parent}")
    x = example_inputs(model, config, options.batch or CHECKED, rest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said below
        silent = firing_rates(model, x).silence
    if silent:
        warn(f"the comparison says little of layers that did not fire at random images: {silent}")
    write = {"onnx": write_onnx, "pt2": write_pt2, "nir": write_nir}[options.format]
    said: list[str] = []

    def written(draft: str) -> None:
        """Give the file its name only if it answers as the model does."""
        said.append(check(model, write(model, x, Path(draft), any_batch=options.batch is None), x))

    try:
        write_atomically(path, written)
    except OSError as error:
        raise RunError(f"output={path} cannot be written ({error})") from error
    if options.format == "nir":
        frame, steps = list(x.shape[-3:]), counted(model.time_steps, "step")
        return f"{path} takes frames {frame} and answers, over {steps}, as the model does: {said[0]}"
    shape = ["any" if options.batch is None else options.batch, *x.shape[1:]]
    return f"{path} takes {shape} and answers as the model does: {said[0]}"


def main(arguments: list[str]) -> None:
    print(run(arguments))


if __name__ == "__main__":
    command(main, default="imagenet_8_384", options=Options)
