"""Triton's interpreter as the tests run it: what a kernel does that a GPU may not survive is found out."""

import os

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="Triton is not interpreted here")


@triton.jit
def read(x, result, begin, end):
    i = begin + tl.arange(0, 16)
    tl.store(result + tl.arange(0, 16), tl.load(x + i, mask=i < end, other=0.0))


@triton.jit
def write(x, result, begin, end):
    i = begin + tl.arange(0, 16)
    tl.store(x + i, 1.0, mask=i < end)


@triton.jit
def read_ends(x, result, begin, end):
    tl.store(result, tl.load(x + begin) + tl.load(x + end - 1))


@triton.jit
def write_ends(x, result, begin, end):
    tl.store(x + begin, 1.0)
    tl.store(x + end - 1, 1.0)


@pytest.mark.parametrize("kernel", [read, write, read_ends, write_ends])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_element_too_far(kernel, dtype):
    memory, result = torch.zeros(8, 8, dtype=dtype), torch.zeros(16, dtype=dtype)
    x = memory[2:4, 1:4]  # with the gap between its rows, 11 elements
    kernel[(1,)](x, result, 0, 11)
    for begin, end in ((-1, 11), (0, 12)):
        with pytest.raises(InterpreterError, match="outside of every tensor"):
            kernel[(1,)](x, result, begin, end)


@triton.jit
def add_up(x, result):
    tl.store(result, tl.load(result) + tl.load(x + tl.program_id(0)))


@triton.jit
def hand_on(x, result):
    tl.store(x + tl.program_id(0) + 1, tl.load(x + tl.program_id(0)))


@pytest.mark.parametrize("kernel", [add_up, hand_on])
def test_a_program_that_depends_on_another(kernel):
    x, result = torch.ones(16), torch.zeros(1)
    kernel[(1,)](x, result)
    with pytest.raises(AssertionError, match="two programs share"):
        kernel[(2, 2)](x, result)
