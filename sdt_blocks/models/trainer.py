"""Wraps models for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class ForTrainer(nn.Module):
    """A model that is called with `pixel_values` and `labels` and returns `{"loss": ..., "logits": ...}`.

    This is how `transformers.Trainer` calls a model. `loss` gets the model's output and the labels; in training a model
    with two heads returns two tensors of logits. The model itself is trained in place; save it with its own
    `save_pretrained`. Trainer's checkpoints contain its weights as `model.*`. transformers is not needed here.

    Shapes: images `[B, C, H, W]` or frames `[B, T, C, H, W]`, labels `[B]`; logits as the model returns them.

    >>> ForTrainer(create_model("sdt_2_256", dim=32))(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))["logits"].shape
    torch.Size([2, 10])
    """

    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, model: nn.Module, loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.model(pixel_values)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """For Trainer's `gradient_checkpointing=True`. Raises `ValueError` for options that a model does not have."""
        usual = {"every_n_layers": 1, "offload": False}
        other = {key: value for key, value in options.items() if value is not None and value != usual.get(key)}
        if other:
            raise ValueError(f"set_grad_checkpointing recomputes every block, without options; got {other}")
        model: Any = self.model
        model.set_grad_checkpointing(True)

    gradient_checkpointing_enable = activation_checkpointing_enable
    """Its name in transformers before version 5."""
