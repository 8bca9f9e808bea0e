"""Which version of an op runs, and how the registered ops live with the rest of PyTorch."""

import copy
import importlib.util
import os
import platform
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from sdt_blocks import LIF, ParametricLIF, SpikingMLP
from sdt_blocks.neuron import IntegerNeuron
from sdt_blocks.ops import NeuronSpec, Norm, batch_norm_lif, dense, dispatch, lif, lif_reference, packed
from sdt_blocks.ops.cpu import build
from sdt_blocks.ops.lif import lif_op
from sdt_blocks.ops.norm_lif import channel_statistics
from sdt_blocks.steps import normalize_and_fire


@pytest.fixture
def fresh_dispatch(monkeypatch):
    """As in a process that has not called an op yet."""
    monkeypatch.delenv("SDT_BLOCKS_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())
    dispatch._problem.cache_clear()
    build.library.cache_clear()
    yield
    dispatch._problem.cache_clear()
    build.library.cache_clear()


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"SDT_BLOCKS_BACKEND='cuda' is unknown; choose one of reference, compiled"):
        lif(torch.ones(2, 3), NeuronSpec())


def test_triton_on_the_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="runs on CUDA tensors"):
        lif(torch.ones(2, 3), NeuronSpec())


ELSEWHERE = {
    "membrane": lambda x: LIF()(x, torch.zeros(2, 3, 2, 2, device="meta")),
    "w": lambda x: ParametricLIF().to("meta")(x),
    "w of channels": lambda x: ParametricLIF(channels=3).to("meta")(x),
    "norm": lambda x: normalize_and_fire(nn.BatchNorm2d(3).eval().to("meta"), LIF(), x),
    "norm of levels": lambda x: normalize_and_fire(nn.BatchNorm2d(3).eval().to("meta"), IntegerNeuron(), x),
    "dense": lambda x: dense.fire(x, dense.as_it_is("meta"), x.dtype, compiled=True),
    "before": lambda x: dense.fire(
        x, dense.as_it_is("cpu")._replace(before=x[0].to("meta"), after=x[0].clone()), x.dtype, compiled=True
    ),
    "packed": lambda x: packed.spike_neuron(x, packed.Epilogue(2), 4, residual=x.to("meta"), membrane=True),
}


@pytest.mark.parametrize("call", ELSEWHERE.values(), ids=ELSEWHERE)
def test_tensors_on_another_device_are_refused(monkeypatch, call):
    """Their addresses would be read as the CPU's."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    with torch.no_grad(), pytest.raises(RuntimeError, match="on meta: input, neurons, norms and states must be on one"):
        call(torch.ones(4, 2, 3, 2, 2))


def test_no_compiler_is_one_warning_then_the_reference(fresh_dispatch, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    x = torch.randn(3, 8)
    with pytest.warns(UserWarning, match="no-such-compiler"):
        first = lif(x, NeuronSpec())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(lif(x, NeuronSpec()), first)
    assert torch.equal(first, lif_reference(x, NeuronSpec())[0])
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    with pytest.raises(RuntimeError, match="cannot run"):
        lif(x, NeuronSpec())


def test_windows_is_one_warning_then_the_reference(fresh_dispatch, monkeypatch):
    monkeypatch.setattr(build.platform, "system", lambda: "Windows")
    x = torch.randn(3, 8)
    with pytest.warns(UserWarning, match="Windows PyTorch's own operators compute the same"):
        assert torch.equal(lif(x, NeuronSpec()), lif_reference(x, NeuronSpec())[0])
    monkeypatch.setenv("CXX", "cl")
    with pytest.raises(build.BuildError, match="neither MSVC nor MinGW builds them"):
        build.library()


def test_a_compiler_without_openmp_builds_for_one_thread(monkeypatch, tmp_path):
    """As the clang of macOS, whose processor has another option too."""
    compiler, source = tmp_path / "c++", tmp_path / "tiny.cpp"
    refusing = '#!/bin/sh\nfor word; do [ "$word" = -fopenmp ] && exit 1; done\nexec c++ "$@"\n'
    compiler.write_text(refusing)
    compiler.chmod(0o755)
    source.write_text(
        "#ifdef _OPENMP\n#define PARALLEL 1\n#else\n#define PARALLEL 0\n#endif\n"
        'extern "C" int parallel() { return PARALLEL; }\n'
    )
    monkeypatch.setenv("SDT_BLOCKS_CACHE", str(tmp_path))
    assert build.library(source).parallel() == 1
    build.library.cache_clear()
    monkeypatch.setenv("CXX", str(compiler))
    assert build.library(source).parallel() == 0
    build.library.cache_clear()
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(build.platform, "machine", lambda: "arm64")
    spec = importlib.util.spec_from_file_location(f"{build.__name__}_elsewhere", build.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    flags = set(elsewhere.FLAGS)
    assert "-mcpu=native" in flags and not {"-march=native", "-mprefer-vector-width=512"} & flags


def test_a_processor_without_flags_has_its_name(monkeypatch):
    monkeypatch.setattr(build, "Path", lambda _: Path("nowhere"))
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    asked = []
    monkeypatch.setattr(build, "_run", lambda words: asked.append(words) or SimpleNamespace(stdout="Apple M4\n"))
    assert build.processor() == f"{platform.machine()} Apple M4" and asked[0][0] == "sysctl"


def test_a_failing_compiler_is_quoted(fresh_dispatch, monkeypatch, tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match="out of luck"):
        build.library()


def test_own_surrogates_fall_back_with_one_warning(fresh_dispatch):
    neuron = LIF(surrogate=lambda shift: torch.sigmoid(4 * shift))
    x = torch.randn(4, 10)
    with pytest.warns(UserWarning, match="surrogate gradient .*lambda.* is not one of"):
        spikes = neuron(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neuron(x)
    assert torch.equal(spikes, LIF()(x))


@pytest.mark.parametrize("backend", dispatch.BACKENDS[:2])
def test_forced_backend_runs(monkeypatch, backend):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", backend)
    name = type(lif(torch.randn(2, 3, requires_grad=True), NeuronSpec()).grad_fn).__name__
    assert ("sdt_blocks_lif" in name) == (backend == "compiled")


def samples():
    x = torch.randn(3, 2, 5, 4, requires_grad=True)
    one = torch.randn(1, 2, 5, 4, requires_grad=True)
    statistics = (torch.zeros(5), torch.ones(5))
    affine = (torch.rand(5, requires_grad=True), torch.rand(5, requires_grad=True))
    code = NeuronSpec(detach_reset=False).encode()
    membrane = torch.randn(2, 5, 4, requires_grad=True)
    return {
        "bare": (x, 3, code),
        "tau": (x, 3, code, torch.tensor(0.4, requires_grad=True), membrane, True),
        "channels": (x, 3, code, torch.rand(5, requires_grad=True)),
        "norm": (x, 3, code, None, None, False, False, *statistics, *affine, True),
        "repeated": (one, 4, code, None, None, False, False, *statistics, *affine, False),
        "no_gradient": (x.detach(), 3, code, None, None, True),
        "bits": (x, 3, code, None, None, False, True),
        "bits of no whole bytes": (x, 3, code, torch.rand(5), None, False, True),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(monkeypatch, name):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    results = torch.library.opcheck(lif_op.op, samples()[name])
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_statistics(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    assert set(torch.library.opcheck(channel_statistics.op, (torch.randn(2, 2, 3, 4),)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("training", [True, False])
def test_whole_graph_compiles(monkeypatch, training):
    """Without a break; for any size, with the eager op's spikes and gradients."""
    monkeypatch.delenv("SDT_BLOCKS_BACKEND", raising=False)
    torch.manual_seed(0)
    norm, neuron, bare = nn.BatchNorm2d(4).train(training), LIF(), LIF(tau=3.0)

    def step(x):
        return normalize_and_fire(norm, neuron, x) + bare(x * 2)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(3, batch, 4, 5, 5, requires_grad=True)
        y, expected = compiled(x), step(x)
        assert (y != expected).sum() <= 1
        weight = torch.randn_like(y)
        (a,) = torch.autograd.grad((y * weight).sum(), x)
        (b,) = torch.autograd.grad((expected * weight).sum(), x)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_bare_neurons_leave_no_opaque_op_in_compiled_code(monkeypatch):
    monkeypatch.delenv("SDT_BLOCKS_BACKEND", raising=False)
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    neuron = LIF()
    backend = aot_autograd(fw_compiler=look)
    torch.compile(lambda x: neuron(x + 1) * 2, fullgraph=True, backend=backend)(torch.randn(4, 3))
    assert seen and not any("sdt_blocks" in name for name in seen)


def test_autocast_keeps_the_state_in_float32(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    mlp = SpikingMLP(8, hidden=16)
    x = torch.randn(2, 2, 8, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x)
        spikes, last = lif(x.detach().bfloat16(), NeuronSpec(), return_membrane=True)
    y.float().sum().backward()
    assert spikes.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in (x, *mlp.parameters()))


def test_deepcopy_and_state_survive_a_step(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    mlp, x = SpikingMLP(8), torch.randn(2, 2, 8, 3, 3)
    mlp(x).sum().backward()
    other = copy.deepcopy(mlp)
    assert torch.equal(mlp.eval()(x), other.eval()(x))


def test_distributed_training_gives_the_same_gradients(monkeypatch, tmp_path):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    mlp, x = SpikingMLP(8), torch.randn(3, 2, 8, 3, 3)
    alone = copy.deepcopy(mlp)
    alone(x).square().sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(mlp)(x).square().sum().backward()
    finally:
        dist.destroy_process_group()
    for a, b in zip(mlp.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_checkpointing_recomputes_the_same(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    mlp, x = SpikingMLP(8).eval(), torch.randn(3, 2, 8, 3, 3, requires_grad=True)
    whole = torch.autograd.grad(mlp(x).square().sum(), x)[0]
    again = torch.utils.checkpoint.checkpoint(mlp, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], whole)


def test_meta_and_fake_tensors_have_shapes(monkeypatch):
    monkeypatch.delenv("SDT_BLOCKS_BACKEND", raising=False)
    assert lif(torch.empty(4, 3, device="meta"), NeuronSpec()).shape == (4, 3)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 2, 3, 5, 5)
        assert batch_norm_lif(x, Norm(training=True), NeuronSpec()).shape == x.shape


def test_built_kernels_are_read_from_the_cache(fresh_dispatch, monkeypatch, tmp_path):
    """A second process with the same source, compiler and processor builds nothing."""
    monkeypatch.setenv("SDT_BLOCKS_CACHE", str(tmp_path))
    name = build.library()._name
    assert os.path.dirname(name) == str(tmp_path)
    before = os.stat(name).st_mtime_ns
    build.library.cache_clear()
    assert build.library()._name == name and os.stat(name).st_mtime_ns == before


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A small source with a cache of its own, and a compiler that takes its time and counts what it has built."""
    compiler, source = tmp_path / "c++", tmp_path / "tiny.cpp"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ echo built >> {tmp_path}/count; sleep 0.3; }}\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    source.write_text('extern "C" int seven() { return 7; }\n')
    monkeypatch.setenv("SDT_BLOCKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    build.library.cache_clear()
    yield source
    build.library.cache_clear()


def count(source):
    return len((source.parent / "count").read_text().splitlines())


def test_threads_that_need_kernels_at_once_build_them_once(tiny):
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: build.library(tiny).seven(), range(4))) == [7] * 4
    assert count(tiny) == 1


def test_a_filled_cache_needs_neither_a_compiler_nor_to_be_written(tiny, monkeypatch):
    name = build.library(tiny)._name
    build.library.cache_clear()
    access = os.access
    monkeypatch.setattr(build.os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library(tiny)._name == name and count(tiny) == 1
        build.library.cache_clear()
        monkeypatch.delenv("CXX")
        monkeypatch.setattr(build.shutil, "which", lambda _: None)
        assert build.library(tiny)._name == name
    build.library.cache_clear()
    tiny.write_text("int another;")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler was found"):
        build.library(tiny)


def test_a_process_without_a_place_for_kernels_has_one_while_it_runs(tmp_path):
    (tmp_path / "file").touch()
    program = "from sdt_blocks.ops.cpu.build import cache_folder as f; print(f(), f() == f() and f().is_dir())"
    environment = {**os.environ, "SDT_BLOCKS_CACHE": str(tmp_path / "file" / "cache"), "TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    folder, good = run.stdout.split()
    assert good == "True" and Path(folder).parent == tmp_path and not Path(folder).exists()
    assert run.stderr.count("UserWarning") == 1 and "file/cache cannot be written, so each process" in run.stderr


def test_a_user_without_a_home_can_name_a_folder(monkeypatch, tmp_path):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.Path, "home", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("SDT_BLOCKS_CACHE", str(tmp_path))
    assert build.cache_folder() == tmp_path
    monkeypatch.delenv("SDT_BLOCKS_CACHE")
    with pytest.warns(UserWarning, match="there is no home folder, so each process"):
        folder = build._folder_of_process.__wrapped__(os.getpid(), build._named_folder())
    build._remove(folder, os.getpid())


def test_kernels_that_cannot_be_written_are_an_error_that_names_the_folder(tiny, monkeypatch):
    monkeypatch.setattr(build, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(build.BuildError, match=r"cache/tiny-.* cannot be written .*No space left.*SDT_BLOCKS_CACHE"):
        build.library(tiny)
