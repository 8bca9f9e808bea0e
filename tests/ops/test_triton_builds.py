"""The Triton kernels build for a GPU that need not be there, and what they are built to is fit for its bandwidth."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="Triton with its NVIDIA backend builds them")
import triton

ELEMENTWISE = {"forward", "backward", "combine", "max_pool", "max_pool_backward", "pack", "unpack"}
ELEMENTWISE |= {"levels_kernel", "levels_gradient_kernel", "norm_levels_kernel", "norm_levels_gradient_kernel"}
WIDEST = 16
ADD_UP = {"backward", "norm_levels_gradient_kernel"}
"""Behind a norm these add up over channels."""
KERNELS = ELEMENTWISE | {"attend", "mask_gradient", "moments", "merge", "settle", "total", "gradients"}
EVALUATION = {"fire_kernel", "fire_and_pool_kernel", "attend_kernel", "levels_kernel"}
NEURONS = {"forward", "backward", "attend", "norm_levels_kernel", "norm_levels_gradient_kernel"} | EVALUATION


@pytest.fixture
def built(tmp_path):
    """Builds the cases of built.py in a process that compiles, where this one interprets."""

    def build(*arguments):
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, Path(__file__).with_name("built.py"), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return build


def assert_fit(found):
    assert {facts["kernel"] for facts in found} == KERNELS
    assert {facts["kernel"] for facts in found if facts["bits"]} == {"forward", "attend", "max_pool"}
    for facts in found:
        assert facts["spilled"] == 0, facts
        assert facts["divisions"] == 0, facts
        assert_rounded_as_the_equations(facts)
        # Only what adds up over channels makes threads wait for each other, once, at its end; and bytes of what several
        # threads read, once for four steps or rows.
        if facts["kernel"] in ELEMENTWISE and not (facts["kernel"] in ADD_UP and facts["norm"]):
            assert facts["barriers"] <= 2 * (facts["bits"] and facts["joined"]), facts
        if "levels" in facts["kernel"]:
            assert {f"L{8 * facts['group']}", f"S{8 * facts['group']}"} <= set(facts["accesses"]), facts
        if facts["kernel"] in ("forward", "backward", "combine"):
            wide = {width for width in facts["accesses"] if width in ("S64", "S128")}
            assert wide == {f"S{8 * min(facts['group'], WIDEST)}"}, facts


def assert_rounded_as_the_equations(facts):
    """A product that is added to without being rounded first is nearer to the truth, and fires elsewhere."""
    assert facts["kernel"] not in NEURONS or facts["fused"] == 0, facts


def test_kernels_are_fit_for_the_bandwidth(built):
    assert_fit(built(90, "bfloat16", "usual"))


@pytest.mark.skipif(not triton.__version__.startswith("3.2."), reason="Triton 3.2, that of torch 2.6, is not installed")
def test_the_oldest_triton_builds_the_pooling(built):
    assert set(built(90, "bfloat16", "unspecialized")) == {"max_pool", "max_pool_backward"}


def test_no_function_of_a_kernel_calls_itself():
    """Triton 3.2, that of torch 2.6, could not build it."""
    for name in ("attention", "bits", "bytes", "dense", "levels", "lif", "norm", "pool", "tiles"):
        module = importlib.import_module(f"sdt_blocks.ops.triton.{name}")
        functions = {key: value.fn for key, value in vars(module).items() if hasattr(value, "fn")}
        assert functions
        for called, function in functions.items():
            assert called not in function.__code__.co_names, called


def test_nothing_builds_anew_for_other_sizes_and_constants(built):
    """A last batch of fewer images, a surrogate or a time constant that changes, images of another size."""
    usual, *others = built(90, "bfloat16", "keys")
    assert len(usual) > len(KERNELS)
    assert all(other == usual for other in others) and len(others) == 4


def test_kernels_of_evaluation_are_fit_for_the_bandwidth(built):
    assert_fit_to_evaluate(built(90, "bfloat16", "evaluation"))


def assert_fit_to_evaluate(found):
    assert {facts["kernel"] for facts in found} == EVALUATION
    for facts in found:
        assert facts["spilled"] == 0 and facts["divisions"] == 0, facts
        assert_rounded_as_the_equations(facts)
        if facts["kernel"] != "attend_kernel":
            assert facts["barriers"] == 0, facts
            assert f"L{8 * facts['group']}" in facts["accesses"] or facts["group"] < 8, facts


@pytest.mark.parametrize("capability", [90, *(pytest.param(one, marks=pytest.mark.slow) for one in (80, 120))])
def test_bytes_are_multiplied_by_integer_tensor_cores(built, capability):
    found = built(capability, "float32", "bytes")
    assert len(found) > 4
    for facts in found:
        assert facts["kernel"] == "spike_layer_kernel" and facts["divisions"] == 0, facts
        assert facts["spilled"] == 0, facts
        # Nothing but 8 bits is multiplied; a thread copies 16 bytes at a time, or 8 where there are no more for it.
        name = "IGMMA" if capability == 90 else "IMMA"
        assert facts["products"] and all(op.startswith(name) for op in facts["products"]), facts
        assert all("S8.S8" in op or op == "IGMMA.64" for op in facts["products"]), facts
        assert facts["copies"] and all(op.endswith((".128", ".64")) for op in facts["copies"]), facts
        assert {width for width in facts["accesses"] if width.startswith("S")} == {"S128"}, facts


def test_launches_of_a_training_block(built):
    """Small launches cost more than what they compute: per-channel arithmetic stays within a layer's kernels."""
    for dtype, casts in (("float32", 0), ("bfloat16", 9)):
        for most, found in zip((20, 18), built(90, dtype, "launches"), strict=True):
            forward, backward = found["forward"], found["backward"]
            assert forward.get("_to_copy", 0) == backward.get("_to_copy", 0) == casts, found
            assert sum(forward.values()) - casts <= most and sum(backward.values()) - casts <= 22, found
            assert forward.get("pack", 0) <= 2, found
            assert not {"rsqrt", "lerp_", "div", "sub"} & (set(forward) | set(backward)), found


def test_launches_of_a_model_s_evaluation(built):
    """What `benchmarks/run.py gpu-offline` predicts: with 8 bits all products but the image's are launches of ours."""
    (folded, products), (of_bytes, of_images) = built(90, "bfloat16", "of a model")
    assert folded["attend_kernel"] == of_bytes["attend_kernel"] == 2 and "spike_layer_kernel" not in folded
    assert products == of_bytes["spike_layer_kernel"] + of_images and of_images == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_fit_on_every_gpu(built, capability, dtype):
    if capability == 75 and dtype == "bfloat16":
        pytest.skip("no bfloat16 there")
    assert_fit(built(capability, dtype, "usual"))
    assert_fit_to_evaluate(built(capability, dtype, "evaluation"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_long_sequences_fit_the_registers(built, capability, dtype):
    found = built(capability, dtype, "long")
    assert {facts["kernel"] for facts in found} == {"forward", "backward", "attend", "mask_gradient"}
    assert {facts["masked"] for facts in found if facts["kernel"] == "backward"} == {False, True}
    for facts in found:
        assert facts["spilled"] == 0 and facts["divisions"] == 0, facts
        assert_rounded_as_the_equations(facts)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_builds_for_amd(built, dtype):
    pytest.importorskip("triton.backends.amd", reason="Triton with its AMD backend builds them")
    found = built("gfx942", dtype, "usual")
    assert {facts["kernel"] for facts in found} == KERNELS
    assert all(facts["spilled"] == 0 for facts in found), found


@pytest.mark.slow
def test_bytes_on_amd(built):
    pytest.importorskip("triton.backends.amd", reason="Triton with its AMD backend builds them")
    for facts in built("gfx942", "float32", "bytes"):
        assert facts["spilled"] == 0 and facts["products"], facts
        assert all(re.match(r"v_mfma_i32_\w+_?i8", op) for op in facts["products"]), facts


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_all_options_build(built, dtype):
    found = built(80, dtype, "options")
    assert len(found) > 40
    assert all(facts["divisions"] == 0 for facts in found)
