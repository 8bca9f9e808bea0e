"""Released files in, safetensors in and out, and what is refused."""

import argparse
import json
import os
import pickle
import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import pytest
import snntorch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sdt_blocks import (
    LIF,
    ParametricLIF,
    SpikeDrivenTransformer,
    convert_released_state_dict,
    create_model,
    list_models,
    load_model,
    load_released_checkpoint,
    save_model,
)
from sdt_blocks.files import write_atomically, write_text, written_together
from sdt_blocks.models import Option, keeps_options, register, registry
from sdt_blocks.models.family import count_blocks, read_mlp_ratio
from sdt_blocks.models.sdt import FAMILY
from sdt_blocks.models.weights import check_fit

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


@pytest.mark.parametrize(
    ("name", "said", "assumed"),
    [
        ("sdt_lif_static_64", {}, {"time_steps": 4, "pooling": "1111"}),
        ("sdt_lif_static_64", {"time_steps": 3, "pooling_stat": "1111"}, {}),
        ("sdt_lif_dvs_64", {"time_steps": 3, "pooling_stat": "1111"}, {"event_pooling": False}),
        ("sdt_lif_dvs_64", {"time_steps": 3, "pooling_stat": "1111", "dvs_mode": 1}, {}),
        ("sdtv2_grads_T2_64", {}, {"time_steps": 4}),
        ("sdtv2_grads_T2_64", {"time_steps": 2}, {}),
        ("sdtv3_base_64", {"time_steps": 1}, {"levels": 4}),
        ("sdtv3_large_kd_64", {}, {"levels": 4}),
        ("spikformer_imagenet_64", {}, {"num_heads": 8, "time_steps": 4}),
        ("qkformer_imagenet_64", {"time_steps": 4}, {"num_heads": 1}),
        ("qkformer_cifar_32", {}, {"time_steps": 4}),
    ],
)
def test_what_nobody_says_is_named_once(named_golden, tmp_path, recwarn, name, said, assumed):
    path = tmp_path / "x.pth"
    torch.save({"model": named_golden(name).group("state"), "args": said}, path)
    model = load_released_checkpoint(path)
    assert assumed.items() <= model.config.items()
    taken = ", ".join(f"{key}={value!r}" for key, value in assumed.items())
    found = [str(warning.message) for warning in recwarn]
    assert len(found) == bool(assumed)
    assert all(f"x.pth: assumed {taken}, which neither" in one and "recipes: model." in one for one in found)
    recwarn.clear()
    load_released_checkpoint(path, **assumed)
    assert not recwarn.list


def test_ema_on_request(static_golden, tmp_path):
    state = static_golden.group("state")
    averaged = {f"module.{key}": value / 2 if key == "head.weight" else value for key, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, tmp_path / "x.pth.tar")
    plain = load_released_checkpoint(tmp_path / "x.pth.tar")
    ema = load_released_checkpoint(tmp_path / "x.pth.tar", ema=True)
    assert torch.equal(ema.head.weight * 2, plain.head.weight)
    torch.save({"state_dict": state}, tmp_path / "y.pth.tar")
    with pytest.raises(ValueError, match=r"y.pth.tar: has no 'state_dict_ema'.*; it holds state_dict"):
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


def test_no_weights_are_no_model():
    with pytest.raises(ValueError, match="the state_dict is empty"):
        convert_released_state_dict({})


def test_wrong_variant_and_wrong_shape(released_file):
    with pytest.raises(ValueError, match=r"_format.pth.tar: the head has 10 classes, but num_classes=7.*new_head=True"):
        load_released_checkpoint(released_file, num_classes=7)
    with pytest.raises(ValueError, match=r"missing: blocks\.2.attention"):
        load_released_checkpoint(released_file, depth=3)
    with pytest.raises(ValueError, match=r"released_format.pth.tar: .*unknown model option layers"):
        load_released_checkpoint(released_file, layers=3)


def test_another_number_of_classes(released_file, tmp_path):
    released = load_released_checkpoint(released_file)
    tuned = load_released_checkpoint(released_file, num_classes=7, new_head=True)
    assert tuned.head.weight.shape == (7, 64) and tuned.config["num_classes"] == 7
    assert torch.equal(tuned.patch.position.conv.weight, released.patch.position.conv.weight)
    save_model(released, tmp_path)
    for load, source in ((load_released_checkpoint, released_file), (load_model, tmp_path)):
        anew = load(source, new_head=True)
        assert anew.num_classes == 10 and not torch.equal(anew.head.weight, released.head.weight)
        assert isinstance(load(source, num_classes=0).head, torch.nn.Identity)
        with pytest.raises(ValueError, match=r"the head has 10 classes, but num_classes=7.*new_head=True"):
            load(source, num_classes=7)
    save_model(load_model(tmp_path, num_classes=0).to(torch.bfloat16), tmp_path)
    tuned = load_model(tmp_path, num_classes=4, new_head=True)
    assert {value.dtype for value in tuned.parameters()} == {torch.bfloat16}
    assert load_model(tmp_path, num_classes=4, new_head=True).head.weight.shape == (4, 64)
    with pytest.raises(ValueError, match=r"the head has 0 classes"):
        load_model(tmp_path, num_classes=4)


WRAPPINGS = {
    "compiled": lambda weights: {"state_dict": {f"_orig_mod.{k}": v for k, v in weights.items()}},
    "compiled and distributed": lambda weights: {"model": {f"module._orig_mod.{k}": v for k, v in weights.items()}},
    "Lightning": lambda weights: {"state_dict": {f"model.{k}": v for k, v in weights.items()}, "epoch": 3},
    "compiled Lightning": lambda weights: {"state_dict": {f"model._orig_mod.{k}": v for k, v in weights.items()}},
    "model": lambda weights: {"model": weights, "epoch": 3, "args": argparse.Namespace(num_heads=8)},
    "arguments in a dict": lambda weights: {"model": weights, "args": {"time_steps": 4}},
    "model_state_dict": lambda weights: {"model_state_dict": weights, "optimizer_state_dict": {}},
    "averaged": lambda weights: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in weights.items()}},
}


@torch.no_grad()
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_of_training_loops(wrapping, static_golden, tmp_path):
    torch.save(WRAPPINGS[wrapping](static_golden.group("state")), tmp_path / "x.pth")
    logits = load_released_checkpoint(tmp_path / "x.pth")(static_golden.tensors["input"])
    torch.testing.assert_close(logits, static_golden.tensors["logits_eval"], atol=1e-4, rtol=0)


def test_safetensors_and_names_of_the_average(static_golden, tmp_path):
    state = static_golden.group("state")
    save_file(state, tmp_path / "x.safetensors")
    assert torch.equal(load_released_checkpoint(tmp_path / "x.safetensors").head.weight, state["head.weight"])
    for key in ("state_dict_ema", "model_ema", "ema"):
        torch.save({"model": state, key: {**state, "head.weight": -state["head.weight"]}}, tmp_path / "x.pth")
        ema = load_released_checkpoint(tmp_path / "x.pth", ema=True)
        assert torch.equal(ema.head.weight, -state["head.weight"])
    torch.save({"model_ema": state}, tmp_path / "y.pth")
    with pytest.raises(ValueError, match=r"y.pth: has no 'state_dict'.*ema=True takes 'model_ema'"):
        load_released_checkpoint(tmp_path / "y.pth")
    torch.save({"model": state, "state_dict": state}, tmp_path / "z.pth")
    with pytest.raises(ValueError, match=r"z.pth: holds weights under state_dict, model"):
        load_released_checkpoint(tmp_path / "z.pth")


FOREIGN = {
    "E-SpikeFormer": ("downsample1_1.encode_conv.weight", "ConvBlock1_1.0.Conv.pwconv1.0.weight"),
    "QKFormer": ("patch_embed1.proj_conv.weight", "stage1.0.tssa.q_conv.weight"),
    "Spikformer": ("patch_embed.proj_conv.weight", "block.0.norm1.weight"),
}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("family", FOREIGN)
def test_the_family_of_a_fragment_is_named(family, prefix, tmp_path):
    weights = {prefix + key: torch.zeros(1) for key in FOREIGN[family]}
    torch.save({"model": weights}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"x.pth: read as {family}.*: .* is missing"):
        load_released_checkpoint(tmp_path / "x.pth")


def test_a_fragment_is_said_to_be_of_its_family(tmp_path):
    torch.save({"model": {"ConvBlock1_1.0.Conv.bn1.weight": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth: read as Spike-Driven Transformer V2: .* is missing"):
        load_released_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("entry", [{1: torch.ones(1)}, {"head.weight": 3}, {"a": [1]}, {None: None}])
def test_what_is_no_state_dict_is_named(entry, static_golden, tmp_path):
    content = {**static_golden.group("state"), **entry}
    with pytest.raises(TypeError, match="a state_dict maps names to tensors"):
        convert_released_state_dict(content)
    torch.save({"state_dict": content}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth: a state_dict maps names to tensors"):
        load_released_checkpoint(tmp_path / "x.pth")


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
        with pytest.raises(ValueError, match=f"{name}: (truncated|refused)(?!.*weights_only)"):
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


# What the parts of a state_dict were called before units held convolution and norm.
FORMER_NAMES = [
    (r"patch\.stages\.(\d)\.(conv|norm)\.", r"patch.\2s.\1."),
    (r"patch\.position\.(conv|norm)\.", r"patch.position_\1."),
    (r"attention\.branch\.(q|k|v|proj)\.(conv|norm)\.", r"attention.branch.\1_\2."),
    (r"attention\.branch\.mixer\.neuron\.", "attention.branch.attention_neuron."),
    (r"mlp\.branch\.fc([12])\.(conv|norm)\.", r"mlp.branch.\2\1."),
]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"neuron": "plif", "event_pooling": True, "num_heads": 4}])
def test_a_folder_with_the_names_of_before_loads(options, tmp_path, firing_model):
    model = firing_model(**options)
    save_model(model, tmp_path)
    weights, former = load_file(tmp_path / "model.safetensors"), {}
    for key, value in weights.items():
        for pattern, name in FORMER_NAMES:
            key = re.sub(pattern, name, key)
        former[key] = value
    assert len(former.keys() - weights.keys()) > 60
    save_file(former, tmp_path / "model.safetensors")
    x = torch.rand(3, 3, 16, 16)
    assert torch.equal(load_model(tmp_path)(x), model(x)) and model(x).std(0).any()
    assert load_model(tmp_path, num_classes=2, new_head=True)(x).shape == (3, 2)
    plain = SpikeDrivenTransformer(**model.config).eval()
    plain.load_state_dict(former)
    assert torch.equal(plain(x), model(x))
    block = {key.removeprefix("blocks.1."): value for key, value in former.items() if key.startswith("blocks.1.")}
    plain.blocks[0].load_state_dict(block)
    save_file({**former, "patch.stages.0.conv.weight": former["patch.convs.0.weight"].clone()}, tmp_path / "twice")
    (tmp_path / "twice").replace(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: patch\.convs\.0\.weight"):
        load_model(tmp_path)


def test_a_model_of_the_kit_given_for_a_released_one_is_named(tmp_path):
    model = SpikeDrivenTransformer(**TINY)
    save_model(model, tmp_path)
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "w.pth"
    )
    for name in ("model.safetensors", "w.pth"):
        with pytest.raises(ValueError, match=f"{name}: the weights of a model of this kit: load_model takes them"):
            load_released_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="a folder; load_model takes"):
        load_released_checkpoint(tmp_path)


def test_run_folder_gives_its_best_model(tmp_path):
    last, best = (SpikeDrivenTransformer(**TINY) for _ in range(2))
    save_model(last, tmp_path / "last")
    assert torch.equal(load_model(tmp_path).head.weight, last.head.weight)
    save_model(best, tmp_path / "best")
    assert torch.equal(load_model(tmp_path).head.weight, best.head.weight)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_a_best_model_is_not_passed_over(tmp_path, missing):
    for name in ("best", "last"):
        save_model(create_model("sdt_2_256", dim=16, depth=1), tmp_path / name)
    (tmp_path / "best" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"best: {missing} is missing"):
        load_model(tmp_path)
    assert load_model(tmp_path / "last").config["dim"] == 16


def test_what_cannot_be_saved_or_loaded_says_why(tmp_path):
    for neuron in (lambda threshold: LIF(threshold=threshold), partial(LIF, surrogate=snntorch.surrogate.atan())):
        with pytest.raises(ValueError, match=r"neuron=.*cannot be written"):
            save_model(SpikeDrivenTransformer(**TINY, neuron=neuron), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors with its config.json here"):
        load_model(tmp_path)
    save_model(SpikeDrivenTransformer(**TINY), tmp_path)
    weights = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="a file; load_model takes a folder, and load_released_checkpoint"):
        load_model(weights)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_model(tmp_path / "nowhere")
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


def test_weights_of_another_kind_of_numbers_do_not_fit():
    expected = {"a": torch.zeros(2), "n": torch.zeros((), dtype=torch.int64)}
    check_fit(expected, {**expected, "a": torch.zeros(2).half()})
    for key in expected:
        other = {**expected, key: expected[key].to(torch.int32)}
        with pytest.raises(ValueError, match=f"of another kind of numbers: {key} is torch.int32, the model has torch"):
            check_fit(expected, other)


def test_blocks_are_counted_without_a_gap():
    assert count_blocks({f"block.{i}.w": torch.zeros(1) for i in range(11)}, "block.") == 11
    with pytest.raises(ValueError, match=r"not numbered 0 to 1: block\.2 is there"):
        count_blocks({f"block.{i}.w": torch.zeros(1) for i in (0, 2)}, "block.")


def test_the_ratio_of_a_released_mlp_gives_its_channels_again():
    for dim in (56, 88, 360):
        for hidden in range(1, 4 * dim + 1):
            ratio = read_mlp_ratio({"fc1": torch.empty(hidden, dim, device="meta")}, "fc1", dim)
            assert int(dim * ratio) == hidden


def test_training_arguments_say_what_no_shape_tells_and_none_says_nothing(static_golden):
    state = {key: value for key, value in static_golden.group("state").items() if "talking_heads" not in key}
    nothing = dict.fromkeys(("num_heads", "time_steps", "pooling_stat", "TET", "dvs_mode"))
    given = {"num_heads": 4, "time_steps": 6, "pooling_stat": "0101", "TET": True, "dvs_mode": 1}
    known = {"num_heads": 4, "time_steps": 6, "pooling": "0101", "per_step": True, "event_pooling": True}
    of_shapes, untold = FAMILY.keys.options(state, {})
    assert FAMILY.keys.options(state, nothing) == (of_shapes, untold) and not known.keys() & of_shapes.keys()
    assert FAMILY.keys.options(state, given) == ({**of_shapes, **known}, [])


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        Path(temporary).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_that_belong_together_are_never_mixed(tmp_path, monkeypatch):
    def write(text):
        with written_together(tmp_path / "new", last="sum") as drafts:
            (drafts / "sum").write_text(text)
            (drafts / "more").mkdir()
            for name in ("a", "more/b"):
                (drafts / name).write_text(text)
                if text == "full":
                    raise OSError(28, "No space left on device")

    write("one")
    files = {name: tmp_path / "new" / name for name in ("a", "more/b", "sum")}
    with pytest.raises(OSError, match="No space left"):
        write("full")
    assert [path.read_text() for path in files.values()] == ["one"] * 3
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a", "more", "sum"}
    moved, replace = [], os.replace

    def stop_at_the_second(source, place):
        moved.append(place)
        if len(moved) == 2:
            raise KeyboardInterrupt
        replace(source, place)

    monkeypatch.setattr(os, "replace", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write("two")
    assert sorted(path.read_text() for path in files.values() if path.exists()) == ["one", "two"]
    assert not files["sum"].exists()
    write("three")
    assert [path.read_text() for path in files.values()] == ["three"] * 3 and moved[-1] == files["sum"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_written_file_has_the_mode_of_any_other(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file", "é")
    finally:
        after = os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode and after == mask
    assert (tmp_path / "file").read_bytes() == "é".encode()


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, rename, sync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *names: done.append("named") or rename(*names))
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_size) or sync(handle))
    write_text(tmp_path / "file", "four")
    assert done == [4, "named"]


def test_published_variant_survives_the_round_trip(tmp_path):
    model = create_model("sdt_2_256_gesture")
    save_model(model, tmp_path)
    assert load_model(tmp_path).config == model.config


def _attention(model):
    return model.blocks[0].attention.branch


def _new_head(model):
    model.head = torch.nn.Linear(16, 3)


CHANGES = {
    "head": _new_head,
    "time_steps": lambda model: setattr(model, "time_steps", 6),
    "per_step": lambda model: setattr(model, "per_step", True),
    "tau": lambda model: setattr(model.head_neuron, "tau", 1.25),
    "reset_mechanism": lambda model: setattr(model.head_neuron, "reset_mechanism", "subtract"),
    "threshold": lambda model: setattr(model, "head_neuron", LIF(threshold=0.2)),
    "surrogate": lambda model: setattr(model, "head_neuron", LIF(surrogate="atan")),
    "blocks": lambda model: model.blocks.append(torch.nn.Identity()),
    "a forward hook": lambda model: model.patch.register_forward_hook(lambda module, inputs, output: 2 * output),
    "blocks has a forward hook": lambda model: model.blocks.register_forward_pre_hook(lambda module, inputs: None),
    "another forward": lambda model: setattr(model.patch, "forward", lambda x: x),
    "gain was added": lambda model: model.register_parameter("gain", torch.nn.Parameter(torch.ones(1))),
    "buffer was added": lambda model: model.blocks.register_buffer("buffer", torch.ones(1), persistent=False),
    "share their memory": lambda model: setattr(_attention(model).q.conv, "weight", _attention(model).k.conv.weight),
    "int64": lambda model: setattr(model.patch.position.norm, "running_mean", torch.zeros(16, dtype=torch.int64)),
    "complex": lambda model: model.head.to(torch.complex64),
    "meta": lambda model: model.head.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_is_not_saved_as_another(change, tmp_path):
    model = SpikeDrivenTransformer(**TINY)
    CHANGES[change](model)
    with pytest.raises(ValueError, match=f"no longer as it was built.*{change}"):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


NO_CHANGES = {
    "processes": nn.SyncBatchNorm.convert_sync_batchnorm,
    "momentum": lambda model: setattr(model.patch.position.norm, "momentum", 0.3),
    "accelerate": lambda model: vars(model).update(forward=model.forward, _original_forward=model.forward),
}


@pytest.mark.parametrize("change", NO_CHANGES)
def test_what_no_answer_depends_on_may_change(change, tmp_path):
    model = SpikeDrivenTransformer(**TINY)
    changed = NO_CHANGES[change](model) or model
    save_model(changed, tmp_path)
    assert torch.equal(load_model(tmp_path).head.weight, model.head.weight)


@torch.no_grad()
@pytest.mark.parametrize(
    "neuron",
    [
        partial(LIF, tau=1.5, surrogate="atan"),
        partial(LIF, threshold=0.7, reset="subtract", strict=True, detach_reset=False),
        {"name": "lif", "tau": 3.0, "surrogate": {"kind": "atan", "alpha": 3.0}},
        {"name": "plif", "init_tau": 3.0, "channels": True},
        partial(ParametricLIF, init_tau=1.5),
    ],
)
def test_neuron_options_survive_the_round_trip(neuron, tmp_path, firing_model):
    model = firing_model(**TINY, neuron=neuron)
    save_model(model, tmp_path)
    loaded, x = load_model(tmp_path), torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(x), model(x)) and model(x).std(0).any() and loaded.config == model.config
    ours, theirs = (str({**vars(one.head_neuron), "_modules": 0, "_parameters": 0}) for one in (model, loaded))
    assert ours.split("spike_grad")[0] == theirs.split("spike_grad")[0]
    assert loaded.head_neuron.surrogate == model.head_neuron.surrogate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_survives_the_round_trip(dtype, tmp_path, firing_model):
    model = firing_model(**TINY).to(dtype)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path).state_dict()
    assert loaded["head.weight"].dtype == loaded["patch.stages.0.norm.running_var"].dtype == dtype
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.items())


def test_what_lies_in_one_storage_without_overlapping_is_saved(tmp_path):
    model = SpikeDrivenTransformer(**TINY)
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).head.weight, model.head.weight)


def test_a_shared_block_is_named(tmp_path):
    model = SpikeDrivenTransformer(**{**TINY, "depth": 2})
    model.blocks[1] = model.blocks[0]
    with pytest.raises(ValueError, match=r"blocks\.0\..* and blocks\.1\..* share their memory"):
        save_model(model, tmp_path)


class Small(torch.nn.Module):
    """A user's own model of the kit's blocks."""

    @keeps_options
    def __init__(
        self,
        *,
        dims: Sequence[int],
        gain: Annotated[float, Option("of the patches", above=0)] = 1.0,
        label: str | None = None,
        num_classes: int = 3,
    ) -> None:
        super().__init__()
        self.gain = gain
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairwise(dims))
        self.head = torch.nn.Linear(dims[-1], num_classes) if num_classes else torch.nn.Identity()


def test_a_registered_class_is_made_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    register(Small, {"small_1": {"dims": [2, 3]}})
    assert list_models("Small") == ["small_1"] and "small_1" in list_models()
    model = create_model("small_1", gain=2)
    assert model.config == {"dims": (2, 3), "gain": 2, "label": None, "num_classes": 3}
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is Small and loaded.config == model.config
    assert torch.equal(loaded.layers[0].weight, model.layers[0].weight)
    assert isinstance(load_model(tmp_path, num_classes=0).head, torch.nn.Identity)
    with pytest.raises(TypeError, match=r"unknown model option dim; the options are dims, gain"):
        create_model("small_1", dim=3)
    with pytest.raises(TypeError, match=r"dims\[1\] must be a whole number, got 2.5"):
        Small(dims=[1, 2.5])
    with pytest.raises(TypeError, match=r"dims must be a list"):
        Small(dims=3)
    with pytest.raises(ValueError, match=r"gain must be above 0 .*got -1"):
        Small(dims=[1], gain=-1)
    with pytest.raises(ValueError, match=r"variants are registered already: sdt_8_384"):
        register(Small, {"sdt_8_384": {"dims": [1]}})
    with pytest.raises(TypeError, match=r"unknown model option depth of small_2"):
        register(Small, {"small_2": {"depth": 1}})


def test_an_option_without_a_name_is_refused():
    with pytest.raises(TypeError, match="each option by its name"):

        @keeps_options
        def __init__(self, **options):
            pass


def test_a_class_of_ones_own_that_is_not_registered(tmp_path):
    class Other(SpikeDrivenTransformer):
        pass

    with pytest.raises(TypeError, match=r"Other is a class derived from SpikeDrivenTransformer.*register\(Other\)"):
        save_model(Other(**TINY), tmp_path)
    with pytest.raises(TypeError, match="Other needs @keeps_options"):
        register(Other)


def test_a_class_without_a_number_of_classes_is_not_registered():
    class Plain(torch.nn.Module):
        @keeps_options
        def __init__(self, *, dim: int = 3):
            super().__init__()

    with pytest.raises(TypeError, match="the constructor of Plain needs the option num_classes; 0 leaves"):
        register(Plain)


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
