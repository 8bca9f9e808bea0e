"""Norms that wait for other processes stay within the fused ops: two halves of a batch are trained as the whole is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdt_blocks.ops.dispatch import forced

sys.path.insert(0, str(Path(__file__).parent))
from synchronized import BACKENDS, PARTS, cases_of, results


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """What each of two processes found, on each backend."""
    folder = tmp_path_factory.mktemp("synchronized")
    script = Path(__file__).with_name("synchronized.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    workers = [
        subprocess.Popen([sys.executable, script, str(rank), folder / "meet", folder / f"{rank}"], env=environment)
        for rank in range(2)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    return [load_file(folder / f"{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def whole():
    """What PyTorch's batch normalization and the neurons' equations make of the whole batch in one process."""
    with forced("reference"):
        return results()


@pytest.mark.parametrize(("backend", "case"), [(backend, case) for backend in BACKENDS for case in cases_of(backend)])
def test_two_processes_train_as_one(halves, whole, backend, case):
    found = [{key: half[f"{backend}.{key}"] for key in whole if key.startswith(f"{case}.")} for half in halves]
    assert whole[f"{case}.values"].count_nonzero() > 20
    assert case == "no_neuron" or whole[f"{case}.of_x.0"].abs().max() > 1e-3
    for key in found[0]:
        expected, (first, second) = whole[key], (half[key] for half in found)
        if ".kept." in key:
            assert torch.equal(first, second), key
            together = first
        elif ".of_parameter." in key:
            together = first + second
        else:
            together = torch.cat([first, second], expected.shape.index(8))
        torch.testing.assert_close(together, expected, rtol=1e-9, atol=1e-12, msg=key)


def test_the_halves_have_other_statistics(whole):
    """So that a process which saw its own images alone would be found out."""
    with forced("compiled"):
        alone = results(PARTS[0])
    assert (alone["neurons.values"] != whole["neurons.values"][:, PARTS[0]]).sum() > 20
