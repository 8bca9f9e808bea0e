"""Two processes on a CPU, started as the README says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from launching import RECIPES, TINY, TWO, read_lines, read_summary, steps_saved, wait_for
from omegaconf import OmegaConf

# The same samples an update as one process with batches of 32.
SHARED = (*TINY, "train.batch_size=16", "train.checkpoint_steps=3", "optim.lr_batch=16")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of a run of two processes that nothing disturbed."""
    from launching import Launcher

    launcher = Launcher(tmp_path_factory.mktemp("two"))
    try:
        launcher.train("digits", *SHARED, "output_dir=run", launch=TWO)
    finally:
        launcher.clean_up()
    return launcher.folder / "run"


def test_two_processes_train_one_model_and_write_once(two_processes):
    # The run compares the digests of all processes' weights itself and fails where they differ.
    summary = read_summary(two_processes)
    assert summary["processes"] == 2 and summary["steps"] == 24
    assert [line["epoch"] for line in read_lines(two_processes)] == [1, 2, 3]
    derived = OmegaConf.load(two_processes / "config.yaml").derived
    assert derived.processes == 2 and derived.total_batch == 32 and derived.steps_per_epoch == 8
    assert derived.lr == pytest.approx(2 * 3e-3), "the learning rate stated for 16 samples, scaled to 32"


def test_the_divided_evaluation_is_that_of_one_process(two_processes):
    from accelerate import Accelerator
    from common.config import load_config
    from common.evaluation import evaluate
    from common.loading import ShardBatches, build_datasets, build_loader

    from sdt_blocks import load_model

    config = load_config([f"config={two_processes / 'config.yaml'}"], default="digits")
    _, test_set = build_datasets(config)
    assert len(test_set) % 2 == 1, "the shares must be uneven"
    loader = build_loader(test_set, ShardBatches(len(test_set), batch_size=7), workers=0, pin=False)
    alone = evaluate(load_model(two_processes / "last"), loader, Accelerator(cpu=True))
    shared = read_lines(two_processes)[-1]
    assert shared["test_samples"] == alone.samples == 101
    assert {name: shared[f"test_{name}"] for name in ("top1", "top5")} == pytest.approx(alone.accuracies, rel=1e-6)
    assert shared["test_loss"] == pytest.approx(alone.loss, rel=1e-5)
    assert shared["firing_rate"] == pytest.approx(alone.firing_rate, rel=1e-5) and alone.rated == 101


def test_a_process_that_dies_ends_the_run_which_resumes_exactly(launcher, tmp_path, two_processes):
    run = tmp_path / "run"
    process = launcher.start("digits", *SHARED, "output_dir=run", launch=TWO)
    wait_for(lambda: max(steps_saved(run), default=0) >= 3, process)
    workers = [child for child in launcher.started[-1].children(recursive=True) if "LOCAL_RANK" in child.environ()]
    second = next(worker for worker in workers if worker.environ()["LOCAL_RANK"] == "1")
    second.kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 137 and "Traceback" not in err
    assert "error: process 1 was ended by SIGKILL, as where memory runs out; the same command goes on" in err
    assert not any(worker.is_running() for worker in workers)
    resumed = launcher.train("digits", *SHARED, "output_dir=run", launch=TWO)
    assert resumed["weights_sha256"] == read_summary(two_processes)["weights_sha256"]
    assert len(read_lines(run)) == 3


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 1), ("2", 0)])
def test_who_has_lost_another_process_says_so_in_a_line(rank, lines, monkeypatch, capsys):
    from common.command_line import short_errors

    def stop(error):
        with pytest.raises((SystemExit, RuntimeError)) as end, short_errors():
            raise error
        return end.value

    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection reset by peer")
    assert stop(lost) is lost, "no processes, no words on them"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert stop(lost).code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == lines and said.count("error: another process has ended or is out of reach") == lines
    assert stop(torch.distributed.DistNetworkError("no route")).code == 1
    assert isinstance(stop(RuntimeError("shapes differ")), RuntimeError)


def test_a_stopped_launcher_stops_both_processes_which_save(launcher, tmp_path):
    run = tmp_path / "run"
    process = launcher.start("digits", *SHARED, "train.epochs=400", "output_dir=run", launch=TWO)
    wait_for(lambda: max(steps_saved(run), default=0) >= 3, process)
    children = launcher.started[-1].children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    out, _ = process.communicate()
    assert f"stopped at step {max(steps_saved(run))}" in out


def test_batches_of_both_processes_are_those_of_one(two_processes):
    from common.loading import EpochBatches, ShardBatches

    alone = EpochBatches(260, batch_size=32, seed=42)
    shares = [EpochBatches(260, batch_size=16, rank=rank, processes=2, seed=42) for rank in (0, 1)]
    for epoch in range(2):
        for batches in (alone, *shares):
            batches.seek(epoch, 0)
        together = [first + second for first, second in zip(*shares, strict=True)]
        assert together == list(alone)
    covered = [i for rank in (0, 1) for batch in ShardBatches(101, batch_size=7, rank=rank, processes=2) for i in batch]
    assert sorted(covered) == list(range(101))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--cpu", "--num_processes", "3"], 3),
        (["--config_file", "FILE"], 4),
        (["--config_file", "FILE", "--num_processes=2"], 2),
        (["--config_file", "FILE", "--num_machines=2"], 1),
        (["--cpu", "--multi_gpu", "--num_processes=2"], 1),
        (["--num_processes=1"], 1),
    ],
)
def test_the_number_of_processes_on_a_cpu(options, expected, tmp_path):
    import launch as recipe
    from accelerate.commands.launch import launch_command_parser

    file = tmp_path / "config.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 4\nuse_cpu: true\n"
    )
    words = [str(file) if word == "FILE" else word for word in options]
    assert recipe.processes_on_cpu(launch_command_parser().parse_args([*words, "digits.py", "seed=1"])) == expected


def test_accelerate_joins_what_torchrun_starts_on_a_cpu(monkeypatch):
    from common.config import ConfigError
    from common.cpu_processes import join_processes

    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    join_processes()
    assert "ACCELERATE_USE_CPU" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    join_processes()
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("MASTER_PORT", "29500")
    join_processes()  # of a batch system, say
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ConfigError, match=r"starts one process on a CPU.*torchrun --nproc-per-node N"):
        join_processes()


@pytest.mark.slow
def test_one_process_of_several_is_refused_with_the_way_to_start_them(launcher):
    command = [sys.executable, "-m", "accelerate.commands.launch", *TWO, str(RECIPES / "digits.py"), *SHARED]
    done = subprocess.run(command, cwd=launcher.folder, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "error: accelerate launch starts one process on a CPU" in done.stderr
    assert "torchrun --nproc-per-node N" in done.stderr and not (launcher.folder / "runs").exists()


@pytest.mark.slow
def test_torchrun_starts_several(tmp_path, two_processes):
    """As its documentation says, without a word of Accelerate's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(RECIPES / "digits.py"), *SHARED, "output_dir=run"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_summary(tmp_path / "run")["weights_sha256"] == read_summary(two_processes)["weights_sha256"]


def test_a_divided_model_is_saved_whole_and_restored_divided(tmp_path):
    worker = Path(__file__).with_name("fsdp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "state.pt")], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the restored model went on alike") == 2


@pytest.mark.parametrize(
    ("name", "processes", "kind"),
    [
        ("one_gpu", 1, "NO"),
        ("eight_gpus", 8, "MULTI_GPU"),
        ("two_nodes", 16, "MULTI_GPU"),
        ("fsdp", 8, "FSDP"),
    ],
)
def test_accelerate_reads_the_configurations(name, processes, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    from sdt_blocks.models import sdt

    file = RECIPES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.num_processes == processes and config.distributed_type.value == kind
    assert f"--config_file recipes/accelerate/{name}.yaml" in file.read_text().split("compute_environment")[0]
    if kind == "FSDP":
        assert hasattr(sdt, config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"])
