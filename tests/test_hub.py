"""Models for the Hugging Face Hub: folders written and read offline, the card beside them, what goes to the Hub."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdt_blocks import MetaSpikeFormer, SpikeDrivenTransformer, example_images, example_model
from sdt_blocks.models import Backbone

huggingface_hub = pytest.importorskip("huggingface_hub")


@torch.no_grad()
def test_every_family_comes_back_as_it_was(small, tmp_path):
    kind = type(small.model)
    small.model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    for read in (kind.from_pretrained(tmp_path), Backbone.from_pretrained(str(tmp_path))):
        assert type(read) is kind and not read.training and torch.equal(read(small.images), small.model(small.images))
    assert kind.from_pretrained(tmp_path, num_classes=7, new_head=True).num_classes == 7


def test_the_card_says_what_the_model_was_given_and_how_well_it_answers(tmp_path):
    model = example_model()
    metrics = {"accuracy": 0.975, "firing rate": np.float32(0.125)}
    model.save_pretrained(tmp_path, metrics=metrics, dataset="digits", repo_id="me/sdt")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    results = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert results == {"accuracy": 0.975, "firing rate": 0.125} and card.data.eval_results[0].dataset_name == "digits"
    assert card.data.library_name == "sdt_blocks" and card.data.pipeline_tag == "image-classification"
    assert 'SpikeDrivenTransformer.from_pretrained("me/sdt")' in card.text and "16 x 16" in card.text
    assert all(f"`{name}`" in card.text for name in model.card.class_names) and "crop_pct" in card.text
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"README.md is kept, and does not say these metrics: remove it for a new one"):
        model.save_pretrained(tmp_path, metrics=metrics)
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(TypeError, match=r"metrics must be numbers by name.*got {'accuracy': 'high'}"):
        model.save_pretrained(tmp_path, metrics={"accuracy": "high"})
    with pytest.raises(TypeError, match="metric, private: save_pretrained takes options of push_to_hub with it alone"):
        model.save_pretrained(tmp_path, metric={"accuracy": 0.9}, private=True)


def test_a_repository_is_downloaded_by_its_two_files(tmp_path, monkeypatch):
    example_model().save_pretrained(tmp_path / "remote")
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        if repo_id == "me/none":
            raise huggingface_hub.errors.LocalEntryNotFoundError("not found on disk and no connection")
        return str(tmp_path / "remote")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    images, labels = example_images()
    model = SpikeDrivenTransformer.from_pretrained("me/sdt", revision="v1", local_files_only=True)
    assert torch.equal(model(images).argmax(1), labels)
    ((repo_id, options),) = asked
    assert repo_id == "me/sdt" and sorted(options["allow_patterns"]) == ["config.json", "model.safetensors"]
    assert options["revision"] == "v1" and options["local_files_only"] is True
    with pytest.raises(TypeError, match="me/sdt holds a SpikeDrivenTransformer, not a MetaSpikeFormer"):
        MetaSpikeFormer.from_pretrained("me/sdt")
    with pytest.raises(FileNotFoundError, match="me/none: no such folder, and no such repository"):
        SpikeDrivenTransformer.from_pretrained("me/none")


def test_what_is_sent_is_what_is_saved(tmp_path, monkeypatch):
    sent, there = {}, set()

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, **options):
            sent["repository"] = options
            return SimpleNamespace(repo_id=f"me/{options['repo_id']}")

        def file_exists(self, repo_id, filename, *, revision=None):
            return (repo_id, filename, revision) in there

        def upload_folder(self, *, folder_path, **options):
            sent["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            sent["upload"] = options
            return "https://hub/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = example_model()
    written, write = [], Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda path, *text, **how: written.append(path.name) or write(path, *text, **how)
    )
    assert model.push_to_hub("sdt", metrics={"accuracy": 0.9}, private=True, token="t", create_pr=True).endswith("/1")
    assert sent["token"] == "t" and sent["repository"] == {"repo_id": "sdt", "private": True, "exist_ok": True}
    assert sent["upload"] == {"repo_id": "me/sdt", "commit_message": "Push model using sdt_blocks", "create_pr": True}
    assert json.loads(sent["files"]["config.json"])["dim"] == model.config["dim"]
    assert written.count("README.md") == 1
    assert b"accuracy" in sent["files"]["README.md"] and len(sent["files"]["model.safetensors"]) > 10_000
    sent.clear()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    model.save_pretrained(".", push_to_hub=True)
    assert sent["upload"]["repo_id"] == "me/mine"
    assert b'from_pretrained("me/mine")' in sent["files"]["README.md"]
    there.add(("me/sdt", "README.md", "v1"))
    with pytest.warns(UserWarning, match=r"README.md of me/sdt is kept, and does not say these metrics: new_card=True"):
        model.push_to_hub("sdt", metrics={"accuracy": 0.9}, revision="v1")
    assert sent["files"].keys() == {"config.json", "model.safetensors"} and sent["upload"]["revision"] == "v1"
    for options in ({"revision": "v1", "new_card": True}, {}):
        model.push_to_hub("sdt", metrics={"accuracy": 0.9}, **options)
        assert "README.md" in sent["files"] and "new_card" not in sent["upload"]
    sent.clear()
    with pytest.raises(TypeError, match="metrics must be numbers by name"):
        model.push_to_hub("sdt", metrics={"accuracy": True})
    model.time_steps += 1
    with pytest.raises(ValueError, match="no longer as it was built"):
        model.push_to_hub("sdt")
    assert "repository" not in sent


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    example_model().save_pretrained(tmp_path)
    assert SpikeDrivenTransformer.from_pretrained(tmp_path).num_classes == 10
    with pytest.raises(ImportError, match=r"pip install 'sdt_blocks\[hub\]'"):
        SpikeDrivenTransformer.from_pretrained("me/sdt")
