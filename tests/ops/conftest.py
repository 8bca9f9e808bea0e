"""The backends that run on this machine, and CPU kernels as they are built for others."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdt_blocks.ops.cpu import bindings, build

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The kernels divide their work, also in a worker of `pytest -n` that has one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["compiled", pytest.param("triton", marks=pytest.mark.cuda)])
def backend(request, monkeypatch):
    """Each fused backend in turn, forced; Triton's kernels run in its interpreter where there is no GPU."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", request.param)
    return request.param


@pytest.fixture(params=["native", "x86-64", "haswell"])
def instructions(request, monkeypatch) -> Iterator[str]:
    """The kernels as they are built for this machine, for any of its make, and with AVX2 at most."""
    if request.param != "native":
        if "-mprefer-vector-width=512" not in build.FLAGS:
            pytest.skip("built for x86 alone")
        flags = [f"-march={request.param}" if flag == "-march=native" else flag for flag in build.FLAGS]
        monkeypatch.setattr(build, "FLAGS", tuple(flags))
    for cached in (bindings.library, bindings._function):
        cached.cache_clear()
    if request.param == "haswell" and " avx2 " not in build.processor():
        pytest.skip("the processor has no AVX2")
    yield request.param
    monkeypatch.undo()
    for cached in (bindings.library, bindings._function):
        cached.cache_clear()
