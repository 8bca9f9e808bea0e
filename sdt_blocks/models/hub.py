"""Models on the Hugging Face Hub, under the names that its libraries use."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from .card import DataCard
from .saved import CONFIG, WEIGHTS, load_model, save_model

Model = TypeVar("Model", bound="HubModel")

MODEL_CARD = "README.md"
_SHOWN = 20
"""How many class names the model card lists."""


class HubModel:
    """A model that can be saved for, uploaded to and loaded from the Hugging Face Hub.

    The files are those of `save_model`, `model.safetensors` and `config.json`, and a model card. The package
    huggingface_hub is needed only to access the Hub.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        metrics: Mapping[str, float] | None = None,
        dataset: str | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_options: Any,
    ) -> None:
        """Writes the model and its model card into a folder, and with `push_to_hub` to the Hub as well.

        The model card says how inputs are prepared and what the classes are called (`model.card`), and the `metrics` on
        the `dataset`, such as `{"accuracy": 0.98}`. An existing README.md is kept, with a warning if there are metrics.

        Raises what `save_model` raises, and `TypeError` for metrics that are not numbers, and for options of
        `push_to_hub` without it.
        """
        if push_options and not push_to_hub:
            raise TypeError(f"{', '.join(push_options)}: save_pretrained takes options of push_to_hub with it alone")
        numbers = _read_metrics(metrics)
        save_model(self, save_directory)  # type: ignore[arg-type]
        path = Path(save_directory) / MODEL_CARD
        if not path.exists():
            path.write_text(_model_card(self, numbers, dataset, repo_id), encoding="utf-8")
        elif numbers:
            warnings.warn(f"{path} is kept, and does not say these metrics: remove it for a new one", stacklevel=2)
        if push_to_hub:
            name = repo_id or Path(save_directory).resolve().name
            self.push_to_hub(name, metrics=metrics, dataset=dataset, **push_options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        dataset: str | None = None,
        commit_message: str = "Push model using sdt_blocks",
        private: bool | None = None,
        token: str | None = None,
        new_card: bool = False,
        **upload_options: Any,
    ) -> str:
        """Uploads what `save_pretrained` writes to the Hub, and returns the address of the commit.

        A README.md that the repository has is kept, with a warning if there are metrics; `new_card=True` replaces it.
        `upload_options` are those of `huggingface_hub.HfApi.upload_folder`, such as `revision` or `create_pr`.
        """
        api, numbers = _hub().HfApi(token=token), _read_metrics(metrics)
        with tempfile.TemporaryDirectory() as folder:
            # Before the repository is made: a model that cannot be saved leaves none behind.
            save_model(self, folder)  # type: ignore[arg-type]
            repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
            if new_card or not api.file_exists(repo_id, MODEL_CARD, revision=upload_options.get("revision")):
                (Path(folder) / MODEL_CARD).write_text(_model_card(self, numbers, dataset, repo_id), encoding="utf-8")
            elif numbers:
                warnings.warn(
                    f"the {MODEL_CARD} of {repo_id} is kept, and does not say these metrics: new_card=True replaces it",
                    stacklevel=2,
                )
            sent = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, **upload_options
            )
        return str(sent)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        new_head: bool = False,
        **overrides: Any,
    ) -> Model:
        """The model in a folder or in a repository of the Hub, in eval mode, like `load_model`.

        `new_head` and `overrides` are those of `load_model`; the other options are those of
        `huggingface_hub.snapshot_download`, and are ignored for a folder. Weights are safetensors; nothing is
        unpickled.

        Raises what `load_model` raises, `FileNotFoundError` if there is neither folder nor repository, and
        `TypeError` for a model of another class.
        """
        folder = Path(name_or_path)
        if not folder.is_dir():
            options = {"revision": revision, "token": token, "cache_dir": cache_dir}
            folder = _download(str(name_or_path), {**options, "local_files_only": local_files_only})
        model = load_model(folder, new_head=new_head, **overrides)
        if not isinstance(model, cls):
            raise TypeError(
                f"{name_or_path} holds a {type(model).__name__}, not a {cls.__name__}: call "
                f"{type(model).__name__}.from_pretrained, or load_model for a model of any class"
            )
        return model


def _download(repo_id: str, options: Mapping[str, Any]) -> Path:
    hub = _hub()
    try:
        return Path(hub.snapshot_download(repo_id, allow_patterns=[CONFIG, WEIGHTS], **options))
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{repo_id}: no such folder, and no such repository could be had from the Hugging Face Hub ({error})"
        ) from error


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            f"the Hugging Face Hub needs the package huggingface_hub (pip install 'sdt_blocks[hub]'): {error}"
        ) from None
    return huggingface_hub


def _read_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """The metrics as plain numbers. Raises `TypeError`."""
    given = dict(metrics or {})
    wrong = {key: value for key, value in given.items() if isinstance(value, bool) or not isinstance(value, Real)}
    if wrong:
        raise TypeError(f"metrics must be numbers by name, such as {{'accuracy': 0.98}}, got {wrong}")
    return {key: float(value) for key, value in given.items()}


def _model_card(model: Any, metrics: Mapping[str, float], dataset: str | None, repo_id: str | None) -> str:
    name = type(model).__name__
    card = model.card if isinstance(model.card, DataCard) else DataCard()
    head: dict[str, Any] = {"library_name": "sdt_blocks", "tags": ["sdt_blocks", "spiking-neural-network"]}
    if card.preparation:
        head["pipeline_tag"] = "image-classification"
    if metrics:
        task = {"type": head.get("pipeline_tag", "other")}
        measured = {
            "task": task,
            "dataset": {"name": dataset or "unnamed", "type": dataset or "unnamed"},
            "metrics": [{"type": key, "value": value} for key, value in metrics.items()],
        }
        head["model-index"] = [{"name": repo_id or name, "results": [measured]}]
    # JSON is also YAML.
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    options = ", ".join(f"{key}={value!r}" for key, value in model.config.items())
    sections = [
        f"---\n{front}\n---",
        f"# {name}",
        f"A spiking network of sdt_blocks: `{name}({options})`.",
        f"```python\nfrom sdt_blocks import {name}, transform_of\n\n"
        f'model = {name}.from_pretrained("{repo_id or "FOLDER"}")\n```',
        *_inputs(model, card),
        *_classes(card),
    ]
    if metrics:
        rows = "\n".join(f"| {key} | {value:g} |" for key, value in metrics.items())
        sections.append(
            f"## Metrics\n\nOn {dataset or 'data that was not named'}.\n\n| metric | value |\n|---|---|\n{rows}"
        )
    return "\n\n".join(sections) + "\n"


def _inputs(model: Any, card: DataCard) -> list[str]:
    size = " x ".join(map(str, card.input_size)) if card.input_size is not None else "any size"
    lines = [f"Images `[B, {model.in_channels}, H, W]` of {size}, or frames `[B, T, {model.in_channels}, H, W]`."]
    if card.preparation:
        said = ", ".join(f"{key} {value}" for key, value in card.preparation.items())
        lines.append(f"Preparation, of values in 0 to 1 (`transform_of(model)` does it): {said}.")
    if card.note:
        lines.append(card.note)
    return ["## Input", " ".join(lines)]


def _classes(card: DataCard) -> list[str]:
    names, lines = card.written().get("class_names"), []
    if isinstance(names, str):
        lines.append(f"Those of {names}.")
    elif names is not None:
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(", ".join(f"`{name}`" for name in names[:_SHOWN]) + more + ".")
    if card.activation is not None:
        lines.append(f"Probabilities are the {card.activation} of the logits.")
    return ["## Classes", " ".join(lines)] if lines else []
