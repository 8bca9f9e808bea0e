"""Released files in, safetensors in and out, and what is refused."""

import argparse
import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch

from sdt_blocks import (
    LIF,
    SpikeDrivenTransformer,
    convert_released_state_dict,
    create_model,
    load_model,
    load_released_checkpoint,
    save_model,
)
from sdt_blocks.files import write_atomically

TINY = {"depth": 1, "dim": 16, "num_heads": 2, "num_classes": 5, "pooling": "0011", "time_steps": 2}


@torch.no_grad()
def test_released_file(released_file, static_golden):
    model = load_released_checkpoint(released_file)
    assert not model.training and model.config["pooling"] == "1111" and model.config["num_heads"] == 8
    logits = model(static_golden.tensors["input"])
    torch.testing.assert_close(logits, static_golden.tensors["logits_eval"], atol=1e-4, rtol=0)
    assert load_released_checkpoint(released_file, time_steps=2, per_step=True).config["time_steps"] == 2


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "module."])
def test_bare_state_dict(golden, tmp_path, prefix):
    """Without the training arguments only what no shape tells has to be given."""
    path = tmp_path / "weights.pth"
    torch.save({prefix + key: value for key, value in golden.group("state").items()}, path)
    c = golden.config
    model = load_released_checkpoint(
        path, time_steps=c["T"], pooling=c["pooling_stat"], event_pooling=c["dvs_mode"], per_step=c["TET"]
    )
    assert model.config["depth"] == c["depth"] and model.config["neuron"] == c["spike_mode"]
    assert model.config["num_heads"] == c["num_heads"] and model.config["in_channels"] == c["in_channels"]
    logits = model(golden.tensors["input"])
    torch.testing.assert_close(logits, golden.tensors["logits_eval"], atol=1e-4, rtol=0)


def test_ema_on_request(static_golden, tmp_path):
    state = static_golden.group("state")
    averaged = {f"module.{key}": value / 2 if key == "head.weight" else value for key, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, tmp_path / "x.pth.tar")
    plain = load_released_checkpoint(tmp_path / "x.pth.tar")
    ema = load_released_checkpoint(tmp_path / "x.pth.tar", ema=True)
    assert torch.equal(ema.head.weight * 2, plain.head.weight)
    torch.save({"state_dict": state}, tmp_path / "y.pth.tar")
    with pytest.raises(ValueError, match=r"y.pth.tar: has no 'state_dict_ema'; it holds state_dict"):
        load_released_checkpoint(tmp_path / "y.pth.tar", ema=True)


def test_only_the_known_unused_keys_are_dropped(static_golden):
    state = static_golden.group("state")
    model = static_golden.model()
    converted = convert_released_state_dict(state)
    assert converted.keys() == model.state_dict().keys()
    assert len(state) - len(converted) == 2, "talking_heads.weight of each block"
    with pytest.raises(ValueError, match=r"unexpected: block.0.attn.extra.weight$"):
        convert_released_state_dict({**state, "block.0.attn.extra.weight": torch.zeros(1)})


def test_missing_and_unexpected_are_listed(static_golden, tmp_path):
    state = static_golden.group("state")
    del state["block.1.attn.q_conv.weight"]
    state["block.0.attn.k_lif.w"] = torch.zeros(())
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(
        ValueError,
        match=r"x.pth: the weights do not match the model; missing: blocks.1.attention.branch.q.conv.weight; "
        r"unexpected: blocks.0.attention.branch.k_neuron.w",
    ):
        load_released_checkpoint(tmp_path / "x.pth")


def test_wrong_variant_and_wrong_shape(released_file):
    with pytest.raises(ValueError, match=r"_format.pth.tar: the weights do not match the model; of another shape"):
        load_released_checkpoint(released_file, num_classes=7)
    with pytest.raises(ValueError, match=r"missing: blocks\.2.attention"):
        load_released_checkpoint(released_file, depth=3)
    with pytest.raises(ValueError, match=r"released_format.pth.tar: .*unexpected keyword argument 'layers'"):
        load_released_checkpoint(released_file, layers=3)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_that_wants_more_is_refused_and_runs_nothing(save, tmp_path):
    trap = tmp_path / "trap"
    save({"state_dict": {}, "args": argparse.Namespace(x=Evil(trap))}, tmp_path / "evil.pth.tar")
    with pytest.raises(ValueError, match=r"evil.pth.tar: refused"):
        load_released_checkpoint(tmp_path / "evil.pth.tar")
    assert not trap.exists()


def test_damaged_files_are_named(released_file, tmp_path):
    whole = released_file.read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: (truncated|refused)"):
            load_released_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(ValueError, match="list: expected a checkpoint or a state_dict, found list"):
        load_released_checkpoint(tmp_path / "list")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: not the state_dict of a released.*unexpected: weight"):
        load_released_checkpoint(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_released_checkpoint(tmp_path / "nowhere")


@torch.no_grad()
@pytest.mark.parametrize("neuron", ["lif", "plif"])
def test_save_and_load(neuron, tmp_path, firing_model):
    model = firing_model(**TINY, neuron=neuron, mlp_ratio=2.5)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(x), model(x)) and model(x).std(0).any() and loaded.config == model.config
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert load_model(tmp_path / "model", per_step=True)(x).ndim == 3


def test_run_folder_gives_its_best_model(tmp_path):
    last, best = (SpikeDrivenTransformer(**TINY) for _ in range(2))
    save_model(last, tmp_path / "last")
    assert torch.equal(load_model(tmp_path).head.weight, last.head.weight)
    save_model(best, tmp_path / "best")
    assert torch.equal(load_model(tmp_path).head.weight, best.head.weight)


def test_what_cannot_be_saved_or_loaded_says_why(tmp_path):
    with pytest.raises(ValueError, match="neuron factory"):
        save_model(SpikeDrivenTransformer(**TINY, neuron=partial(LIF, tau=3.0)), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors with its config.json here"):
        load_model(tmp_path)
    save_model(SpikeDrivenTransformer(**TINY), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated"):
        load_model(tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dim": 32}))
    with pytest.raises(ValueError, match=r"model.safetensors: the weights do not match the model; of another shape"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: "):
        load_model(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        Path(temporary).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_published_variant_survives_the_round_trip(tmp_path):
    model = create_model("sdt_2_256_gesture")
    save_model(model, tmp_path)
    assert load_model(tmp_path).config == model.config


def _new_head(model):
    model.head = torch.nn.Linear(16, 3)


CHANGES = {
    "head": _new_head,
    "time_steps": lambda model: setattr(model, "time_steps", 6),
    "per_step": lambda model: setattr(model, "per_step", True),
    "tau": lambda model: setattr(model.head_neuron, "tau", 1.25),
    "threshold": lambda model: setattr(model, "head_neuron", LIF(threshold=0.2)),
    "surrogate": lambda model: setattr(model, "head_neuron", LIF(surrogate="atan")),
    "blocks": lambda model: model.blocks.append(torch.nn.Identity()),
    "float64": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_is_not_saved_as_another(change, tmp_path):
    model = SpikeDrivenTransformer(**TINY)
    CHANGES[change](model)
    with pytest.raises(ValueError, match=f"no longer as it was built.*{change}"):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_wrapper_is_refused_by_name(wrap, tmp_path):
    wrapped = wrap(SpikeDrivenTransformer(**TINY))
    with pytest.raises(TypeError, match=type(wrapped).__name__):
        save_model(wrapped, tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"model": "Stranger"}, {"time_stps": 2}, {"per_step": "no"}, {"depth": True}, {"depth": 10**8}, {"dim": 10**6}],
)
def test_a_config_that_says_anything_else_is_refused(change, tmp_path):
    save_model(SpikeDrivenTransformer(**TINY), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=r"(config\.json|model\.safetensors): "):
        load_model(tmp_path)
