"""The Triton kernels build for a GPU that need not be there: what the interpreter accepts a compiler may not."""

import os
import subprocess
import sys

import pytest

BUILD = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sdt_blocks.ops.triton import attention, bits, lif, pool

element, state = {dtypes!r}
integers = "size chunk chunk_stride x_step grad_step image channels inner blocks STEPS".split()
integers += "tokens token_stride channel_stride images height width rows columns".split()
elements = "x spikes grad grad_x q k v out".split()
constants = dict(K=0.5, THRESHOLD=1.0, STRICT=False, ALPHA=4.0, GRAD=True, MASK=False, BIT=0, BLOCK=1024)
constants |= dict(MASK_K=0.5, MASK_THRESHOLD=0.5, MASK_STRICT=False, KEEP=True, CHANNELS=8, TOKENS=256)
constants["STATE"] = tl.float64 if state == "fp64" else tl.float32


def build(kernel, **options):
    values = dict(constants, **options)
    signature = {{
        name: "constexpr"
        if name in values
        else "i32"
        if name in integers
        else "*u8"
        if name in ("bits", "codes", "places")
        else f"*{{element if name in elements else state}}"
        for name in kernel.arg_names
    }}
    given = {{name: values[name] for name in kernel.arg_names if name in values}}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given)
    assert ".entry" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
    print("built")


for reset, affine, tau, before in ((0, True, 2, False), (1, False, 1, True), (2, False, 0, True)):
    options = dict(RESET=reset, AFFINE=affine, TAU=tau, BEFORE=before, LAST=before, DENSE=not before)
    build(lif.forward, **options)
    for kind in (reset, reset + 2):
        build(lif.backward, **options, KIND=kind, DETACH=affine, REPEAT=kind == 1)
    build(attention.attend, RESET=reset, MASK_RESET=reset, TAU=tau > 0)
for given in (True, False):
    options = dict(RESET=0, AFFINE=True, TAU=0, BEFORE=False, LAST=False, DENSE=True, KIND=0, DETACH=True, REPEAT=False)
    build(lif.backward, **options | dict(GRAD=given, MASK=True, BIT=2))
build(attention.mask_gradient)
build(pool.max_pool)
build(pool.max_pool_backward)
build(lif.combine)
build(bits.pack)
build(bits.unpack)
"""


@pytest.mark.parametrize("dtypes", [("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")])
def test_kernels_build_for_a_gpu(dtypes, tmp_path):
    pytest.importorskip("triton.backends.nvidia", reason="Triton with its NVIDIA backend builds them")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "build.py"
    script.write_text(BUILD.format(dtypes=dtypes))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("built") == 20
