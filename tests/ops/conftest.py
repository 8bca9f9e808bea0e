"""The backends that run on this machine."""

import pytest
import torch


@pytest.fixture
def device(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["compiled", "triton"])
def backend(request, monkeypatch):
    """Each fused backend in turn, forced; Triton's kernels run in its interpreter where there is no GPU."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", request.param)
    return request.param
