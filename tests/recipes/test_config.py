"""Every key typed and bounded; whatever else a user writes ends in one paragraph."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import string

import pytest
import yaml
from common.config import (
    CONFIGS,
    Config,
    ConfigError,
    all_keys,
    changed,
    check_meant,
    flatten,
    help_text,
    load_config,
    of_training,
    to_yaml,
    trajectory,
)
from common.options import own_help, read_options
from common.schema import Derived
from common.values import convert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdt_blocks import (
    ESpikeFormer,
    ESpikeFormerLarge,
    MetaSpikeFormer,
    QKFormer,
    SpikeDrivenTransformer,
    Spikformer,
)

KEYS = all_keys()
NUMBERS = [key for key, value in flatten(Config()).items() if type(value) in (int, float) and key in KEYS]
NUMBERS += ["train.max_steps", "model.depth", "optim.clip_grad", "data.test_samples"]
CHOICES = ["data.interpolation", "data.on_error", "model.name", "model.neuron", "optim.name", "train.loss", "tracker"]


def refused(arguments: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments, default="digits")
    message = str(caught.value)
    assert message.strip() and "\n" not in message and "Traceback" not in message
    return message


def test_the_keys_every_recipe_has():
    wanted = (
        "data.name data.root model.name train.epochs train.max_steps train.batch_size optim.lr seed output_dir resume"
    )
    assert set(wanted.split()) <= set(KEYS)


def test_every_model_keyword_is_a_key():
    models = (SpikeDrivenTransformer, MetaSpikeFormer, Spikformer, QKFormer, ESpikeFormer, ESpikeFormerLarge)
    keywords = {key for model in models for key in inspect.signature(model).parameters}
    assert {key.removeprefix("model.") for key in KEYS if key.startswith("model.")} == keywords | {"name"}


def test_options_of_the_neuron_are_keys():
    from common.config import model_keywords

    def neuron(*arguments):
        return model_keywords(load_config(arguments, default="digits")).get("neuron")

    assert neuron() is None and neuron("model.neuron=plif") == "plif"
    assert neuron("neuron.tau=1.5", "neuron.surrogate=atan") == {"name": "lif", "tau": 1.5, "surrogate": "atan"}
    sharp = neuron("model.neuron=plif", "neuron.surrogate=atan", "neuron.alpha=3", "neuron.channels=true")
    assert sharp == {"name": "plif", "surrogate": {"kind": "atan", "alpha": 3.0}, "channels": True}
    assert "name it in neuron.surrogate" in refused(["neuron.alpha=3"])
    assert "'plif' has no option tau; its options are init_tau" in refused(["model.neuron=plif", "neuron.tau=2"])
    assert "neuron.tau: expected a value of at least 1" in refused(["neuron.tau=0.5"])
    integers = refused(["model.name=sdt_v3_5m", "neuron.tau=2", "neuron.reset=zero"])
    assert "neuron.tau, neuron.reset: the neurons of sdt_v3_5m have no such option" in integers


def test_options_of_another_family_are_refused_with_what_leaves_them_out():
    from common.models import build_model

    other = ["model.name=sdt_v2_15m", "model.dims=[8,16,16,16]", "model.depths=[1,1,1,1,1]"]
    with pytest.raises(ConfigError) as caught:
        build_model(load_config(other, default="digits"))
    assert "model.dim, model.pooling: sdt_v2_15m has no such option" in str(caught.value)
    asked = re.findall(r"model\.\w+=null", str(caught.value))
    assert type(build_model(load_config([*other, *asked], default="digits"))).__name__ == "MetaSpikeFormer"


def test_arguments_override_files_and_files_override_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text('optim: {lr: 3e-4, betas: [0.8, 0.9]}\nmodel: {pooling: "0011"}\ndata: {root: null}\n')
    config = load_config([f"config={file}", "optim.betas=[0.7,0.95]", "model.pooling=0001", "seed=7"], default="digits")
    assert config.optim.lr == 3e-4
    assert config.optim.betas == [0.7, 0.95]
    assert config.model.pooling == "0001"
    assert config.seed == 7 and config.data.root is None and config.train.epochs == Config().train.epochs


def test_a_resolved_configuration_reads_back_the_same(tmp_path):
    config = load_config(
        ["data.root=some where/a=b", "train.ema_decay=0.999", "optim.lr=1e-3"], default="cifar10_2_256"
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config([f"config={file}"], default="digits") == config
    file.write_text(to_yaml(config, Derived(total_batch=48)))
    assert "total_batch: 48" in file.read_text() and load_config([f"config={file}"], default="digits") == config


def test_what_the_weights_depend_on_stays_when_a_run_is_resumed():
    of_model = {key for key in KEYS if key.startswith(("model.", "neuron.", "optim."))}
    of_samples = {key for key in KEYS if key.startswith(("data.", "events.")) and of_training(key)}
    others = {"seed", "train.epochs", "train.label_smoothing", "train.ema_decay", "data.train_samples"}
    assert of_model | of_samples | others <= trajectory(load_config([], default="digits")).keys()


def test_a_configuration_does_not_change():
    config = load_config(["optim.lr=2e-3"], default="digits")
    other = changed(config, {"optim.lr": 1e-3, "seed": 7, "model.dim": 64})
    assert (other.optim.lr, other.seed, other.model.dim) == (1e-3, 7, 64) and config.optim.lr == 2e-3
    assert changed(other, {"optim.lr": 2e-3, "seed": config.seed, "model.dim": config.model.dim}) == config
    for part, key in ((config, "seed"), (config.optim, "lr"), (config.model, "dim"), (Derived(), "lr")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, key, 1)


@pytest.mark.parametrize("text", ["a $b ${c}", "x[0]", "010", "true", "1e3", "é: [#", "'quoted'", "@,&*"])
def test_names_are_text_whatever_they_look_like(tmp_path, text):
    config = load_config([f"data.root={text}", f"output_dir={text}"], default="digits")
    assert config.data.root == config.output_dir == text
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config([f"config={file}"], default="digits") == config


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("data: {root: ~/images}\ntrain: {init_checkpoint: ~/run}\n")
    config = load_config(["config=~/mine.yaml", "output_dir=~/runs/a", "events.cache=a~b"], default="digits")
    found = config.data.root, config.train.init_checkpoint, config.output_dir
    assert found == tuple(str(tmp_path / name) for name in ("images", "run", "runs/a"))
    assert config.events.cache == "a~b"


@pytest.mark.parametrize("key", ["data.root", "events.cache", "train.init_checkpoint", "data.auto_augment"])
def test_pythons_none_is_no_text(key):
    with pytest.raises(ConfigError, match=f"{key}: expected text or null, got 'None'; write null"):
        load_config([f"{key}=None"], default="digits")


def test_what_a_model_lacks_is_said_with_those_that_have_it():
    for setting, option in (("train.teacher=resnet18", "distillation"), ("train.tet=true", "per_step")):
        with pytest.raises(
            ConfigError, match=rf"needs a model with the option {option}, which sdt_v3_3m lacks.*sdt_v2_15m"
        ):
            load_config(["model.name=sdt_v3_3m", setting], default="digits")


@pytest.mark.parametrize(
    ("default", "argument", "words"),
    [
        ("gesture_t16", "data.img_size=64", "data.img_size is for images, and data.name=dvs128_gesture holds record"),
        ("digits", "events.augment=roll", "events.augment is for recordings of events, and data.name=digits holds"),
    ],
)
def test_a_setting_of_the_other_kind_of_data_is_refused_and_may_stand_in_a_file(tmp_path, default, argument, words):
    with pytest.raises(ConfigError, match=words):
        check_meant(load_config([argument], default=default), [argument])
    config = load_config([], default=default)
    (tmp_path / "whole.yaml").write_text(to_yaml(config))
    arguments = [f"config={tmp_path / 'whole.yaml'}", "data.workers=0", "seed=3"]
    check_meant(load_config(arguments, default=default), arguments)


def test_a_recipes_own_keys_are_read_as_their_types_say(monkeypatch):
    from analyze import Options

    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USERPROFILE", "/home/somebody")
    for text in ("010", "1e3", "true", "[a, b]", "${x}", "2024-01-01", "a: b"):
        assert read_options(Options, [f"checkpoint={text}"]).checkpoint == text
    options = read_options(Options, ["checkpoint=~/run", "layer=~/x", "samples=1", "samples=8", "seconds=1e-3"])
    assert options.checkpoint == os.path.join("/home/somebody", "run") and options.layer == "~/x"
    assert (options.samples, options.seconds) == (8, 1e-3)
    for argument, words in (
        ("samples=010", "samples: expected a whole number, got '010'"),
        ("measure=yes", "measure: expected true or false, got 'yes'"),
        ("samples", "cannot read the argument 'samples'; write samples=VALUE"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_options(Options, [argument])


def test_flags_of_a_file_need_no_quotes(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {pooling: 0011}\n")
    assert load_config([f"config={file}"], default="digits").model.pooling == "0011"


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [(2, float, 2.0), (True, bool, True), ([1, 2.5], list[float], [1.0, 2.5]), (None, int | None, None)],
)
def test_a_value_that_is_no_text_keeps_its_type(value, kind, expected):
    assert repr(convert(value, kind)) == repr(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, int), (1, bool), (True, float), (1.0, int), (float("nan"), float), (10**400, float), (3, str), (None, int)],
)
def test_a_value_of_another_type_is_refused(value, kind):
    with pytest.raises(ValueError, match="expected"):
        convert(value, kind)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_starts_with_the_command_that_runs_it(name):
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# accelerate launch recipes/")
    recipe = first.split()[3]
    assert (CONFIGS.parent.parent / recipe).is_file()
    load_config([], default=name)


def test_help_names_every_key_with_its_value():
    text = help_text("digits", training=True)
    assert all(f"  {key}=" in text for key in KEYS)
    digits = yaml.safe_load((CONFIGS / "digits.yaml").read_text())
    assert f"  train.epochs={digits['train']['epochs']}: " in text and "  data.download=false: " in text
    again = [line.strip().partition(": ")[0] for line in text.splitlines() if line.startswith("  ")]
    assert load_config(again, default="imagenet_8_384") == load_config([], default="digits")


def test_help_for_trained_models_leaves_out_how_to_train():
    shown = {line.split("=")[0].strip() for line in help_text("digits", training=False).splitlines()[1:]}
    assert "train.mixed_precision=no:" in help_text("imagenet_8_384", training=False), "what the recipes take it as"
    assert {"data.img_size", "model.time_steps", "train.batch_size", "threads"} < shown <= set(KEYS)
    assert not shown & {"optim.lr", "train.epochs", "data.mixup", "output_dir"}


@pytest.mark.parametrize("recipe", ["evaluate", "compare_families"])
def test_help_says_what_a_recipes_own_keys_may_be(recipe):
    module = importlib.import_module(recipe)
    text = own_help(module.Options if recipe == "evaluate" else module.Search)
    if recipe == "evaluate":
        assert "by name, or by position (name, position)" in text
    else:
        assert "img_size" not in text and "  seed=" not in text


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("optim.lrr=1", ["'optim.lrr'", "did you mean optim.lr?", "optim has name, lr,"]),
        ("learning_rate=1", ["'learning_rate'", "the top level has data, events, model"]),
        ("optim.lr=fast", ["optim.lr: expected a number, got 'fast'"]),
        ("optim.lr=0", ["optim.lr: expected a value above 0 and at most 10000, got 0.0"]),
        ("optim.lr=nan", ["optim.lr: expected a finite number"]),
        ("train.epochs=1.5", ["train.epochs: expected a whole number, got '1.5'"]),
        ("train.epochs=010", ["train.epochs: expected a whole number, got '010'"]),
        ("train.epochs=1e3", ["train.epochs: expected a whole number, got '1e3'"]),
        ("train.epochs=true", ["train.epochs: expected a whole number, got 'true'"]),
        ("train.epochs=null", ["train.epochs: expected a whole number, got null"]),
        ("train.epochs=" + "1" * 5000, ["train.epochs: expected a whole number, got '111", "(5000 characters)"]),
        (
            "train.epochs=" + "1" * 3000,
            ["train.epochs: expected a value of at least 1 and at most 1000000"],
        ),
        ("train.batch_size=1_000", ["train.batch_size: expected a whole number, got '1_000'"]),
        ("train.batch_size=٣", ["train.batch_size: expected a whole number"]),
        ("train.tet=-5", ["train.tet: expected true or false, got '-5'"]),
        ("train.tet=1", ["train.tet: expected true or false, got '1'"]),
        ("train.tet=no", ["train.tet: expected true or false, got 'no'"]),
        ("analyze=99999999999999999999", ["analyze: expected true or false"]),
        ("optim.lr=true", ["optim.lr: expected a number, got 'true'"]),
        ("optim.lr=1e999", ["optim.lr: expected a finite number, got '1e999'"]),
        ("optim.lr=.inf", ["optim.lr: expected a finite number"]),
        ("optim.betas=[0.9,true]", ["optim.betas: expected a list of numbers", "got 'true'"]),
        ("data.root=\udcff", ["data.root: expected text in UTF-8"]),
        ("config=" + "a" * 5000, ["config='aaa", "no such file"]),
        ("a" * 5000 + "=1", ["unknown key 'aaa", "(5000 characters)"]),
        ("data[root]=1", ["unknown key 'data[root]'"]),
        ("${data}.root=1", ["unknown key '${data}.root'"]),
        ("model.name=" + "a" * 5000, ["model.name: 'aaa", "is unknown"]),
        ("train.compile=maybe", ["train.compile: expected true or false, got 'maybe'"]),
        ("train.compile_mode=max-autotune", ["train.compile_mode=max-autotune is for train.compile=true"]),
        ("data.scale=[0.5]", ["data.scale: expected 2 number(s)"]),
        ("data.scale=[0.9,0.1]", ["data.scale: the first value must not exceed the second"]),
        ("data.mean=[0.1,0.2]", ["data.mean has 2 values and data.std 1"]),
        ("optim.lr=[", ["optim.lr: expected a number, got '['"]),
        ("model.name=sdt_8_385", ["'sdt_8_385' is unknown; did you mean sdt_8_384?"]),
        ("model.pooling=11", ["four flags", "'11'"]),
        ("data=3", ["data is a section", "data.name"]),
        ("seed.x=3", ["'seed.x'", "seed is a single value"]),
        ("derived.lr=3", ["derived.lr is computed"]),
        ("optim.min_lr=1", ["optim.min_lr=1.0 exceeds optim.lr"]),
        ("train.warmup_epochs=99", ["train.warmup_epochs=99 exceeds train.epochs"]),
        ("config=nowhere", ["config=nowhere: no such file", "digits"]),
        ("words", ["'words'", "key=value"]),
        ("output_dir=", ["output_dir: expected the path of a folder"]),
        ("train.linear_probe=true", ["name it in train.init_checkpoint"]),
        ("tracker=tensorbord", ["'tensorbord' is unknown; did you mean tensorboard?"]),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_the_valid_ones(argument, parts):
    message = refused([argument])
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("optim: {lr: 1e-3", "not a readable YAML file"),
        ("- a\n- b\n", "expected a mapping"),
        ("optim:\n  lrr: 1\n", "did you mean optim.lr?"),
        ("model:\n  pooling: 11\n", "quoted in YAML"),
        ("train:\n  epochs: 010\n", "train.epochs: expected a whole number, got '010'"),
        ("train:\n  tet: yes\n", "train.tet: expected true or false, got 'yes'"),
        ("train:\n  epochs: 1\n  epochs: 2\n", "the key 'epochs' stands twice"),
        ("train:\n  epochs: [1]\n", "train.epochs: expected a whole number, got ['1']"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("optim: 3\n", "optim is a section"),
        ("train: {epochs: ${nothing}}\n", "not a readable YAML file"),
        ("\x00\x01", "not a readable YAML file"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, content, part):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    message = refused([f"config={file}"])
    assert part in message


# Malformed by construction: each kind of argument is wrong whatever is drawn.
_words = st.text(string.ascii_letters + string.digits + "._-[]{}$!&*#|>%@`'\": ,\\é\n\t", min_size=1, max_size=30)
_unknown_key = st.builds("{}=1".format, _words.filter(lambda w: "=" not in w and w.strip() not in {*KEYS, "config"}))
_no_value = _words.filter(lambda w: "=" not in w)
_not_a_number = st.builds(
    "{}={}".format,
    st.sampled_from(NUMBERS),
    st.one_of(
        _words.map(lambda w: f"x{w}"),
        st.sampled_from(["nan", "-inf", "[1]", "{a: 1}", "true!", "1e", "0x"]),
    ),
)
_out_of_bounds = st.builds(
    "{}={}".format, st.sampled_from(NUMBERS), st.sampled_from([-(10**30), 10**30, 1e300, -1e300])
)
_no_choice = st.builds("{}={}".format, st.sampled_from(CHOICES), _words.map(lambda w: f"no{w}"))
_not_a_list = st.builds(
    "{}={}".format,
    st.sampled_from(["data.mean", "data.scale", "optim.betas"]),
    st.one_of(
        _words.map(lambda w: f"x{w}"), st.sampled_from(["3", "[]", "[a]", "[1,[2]]", "{}", "[nan,1]", "[-1,2]", "null"])
    ),
).filter(lambda a: a not in ("data.mean=[-1,2]",))
_section = st.builds("{}={}".format, st.sampled_from(["data", "model", "optim", "train", "events"]), _words)
_unclosed = st.builds("{}=${{{}".format, st.sampled_from(NUMBERS), _words)
_malformed = st.one_of(
    _unknown_key, _no_value, _not_a_number, _out_of_bounds, _no_choice, _not_a_list, _section, _unclosed
)


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    _malformed,
    st.lists(st.sampled_from(["seed=3", "optim.lr=1e-3", "train.epochs=20", "model.pooling=0101"]), max_size=2),
)
def test_200_malformed_command_lines_end_in_one_paragraph(malformed, valid):
    assert "\n" not in refused([*valid, malformed])


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.text(max_size=60) | st.dictionaries(_words, st.recursive(_words, st.lists, max_leaves=4), min_size=1).map(str)
)
def test_malformed_files_end_in_one_paragraph(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "malformed.yaml"
    file.write_text(content, encoding="utf-8", errors="surrogateescape")
    try:
        loaded = load_config([f"config={file}"], default="digits")
    except ConfigError as error:
        assert "\n" not in str(error) and "Traceback" not in str(error)
    else:
        assert loaded == Config(), "nothing but an empty file or comments may be read as nothing"


def test_an_error_in_a_file_names_the_file_and_one_on_the_command_line_does_not(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {epochs: nul}")
    with pytest.raises(ConfigError, match=r"mine\.yaml: train\.epochs: expected a whole number, got 'nul'"):
        load_config([f"config={tmp_path / 'mine.yaml'}"], default="digits")
    with pytest.raises(ConfigError, match=r"^train\.epochs: expected a whole number"):
        load_config(["train.epochs=nul"], default="digits")


def test_an_empty_configuration_of_a_run_is_not_taken_for_the_defaults(tmp_path):
    from common.trained import AS_ASKED, with_run_config

    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"config\.yaml is empty.*config=NAME"):
        with_run_config(tmp_path, [])
    assert with_run_config(tmp_path, ["config=digits"]) == [*AS_ASKED, "config=digits"]
