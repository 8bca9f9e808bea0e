"""The Trainer of transformers trains a model, evaluates it, and goes on from its checkpoints."""

import copy

import pytest
import torch
from torch import nn

from sdt_blocks import SpikeDrivenTransformer, example_images, example_model
from sdt_blocks.analysis import firing_rates
from sdt_blocks.models.trainer import ForTrainer

transformers = pytest.importorskip("transformers")


@pytest.fixture
def trainer(tmp_path):
    """Makes a Trainer of the example's model with a new head, on its images, and gives the model too."""
    images, labels = example_images()
    samples = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]

    def make(**options):
        torch.manual_seed(0)
        model = example_model()
        model.reset_classifier(10)
        given = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 10,
            "learning_rate": 3e-2,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
            **options,
        }
        arguments = transformers.TrainingArguments(**given)
        return model, transformers.Trainer(
            ForTrainer(model),
            arguments,
            train_dataset=samples,
            eval_dataset=samples,
            compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean().item()},
        )

    return make


def test_a_model_learns_and_is_saved(trainer, tmp_path):
    model, its = trainer(max_steps=60, learning_rate=1e-2)
    before = its.evaluate()
    its.train()
    after = its.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"] and after["eval_accuracy"] > before["eval_accuracy"]
    images, labels = example_images()
    with torch.no_grad():
        expected = model.eval()(images)
    assert not firing_rates(model, images).silence
    assert after["eval_loss"] == pytest.approx(nn.functional.cross_entropy(expected, labels).item(), abs=1e-5)
    model.save_pretrained(tmp_path / "mine")
    assert torch.equal(SpikeDrivenTransformer.from_pretrained(tmp_path / "mine")(images), expected)


def test_training_goes_on_from_a_checkpoint(trainer, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole, its = trainer(**steps)
    its.train()
    resumed, its = trainer(**steps)
    its.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert its.state.global_step == 8
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_blocks_computed_anew_learn_the_same(trainer):
    plain, its = trainer(max_steps=2)
    its.train()
    again, its = trainer(max_steps=2, gradient_checkpointing=True)
    its.train()
    assert again.grad_checkpointing and not plain.grad_checkpointing
    for (name, one), (_, other) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3, msg=name)
    with pytest.raises(ValueError, match=r"without options; got {'every_n_layers': 2}"):
        ForTrainer(again).activation_checkpointing_enable(every_n_layers=2, offload=False)


def test_a_loss_of_ones_own():
    model, (images, labels) = example_model(), example_images()
    wrapped = ForTrainer(copy.deepcopy(model), loss=lambda logits, labels: logits.sum() + labels.sum())
    found = wrapped(images, labels)
    assert torch.equal(found["logits"], model(images)) and found["loss"] == model(images).sum() + labels.sum()
    assert wrapped(images).keys() == {"logits"}
