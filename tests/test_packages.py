"""What is installed: the requirements cover what is imported, the wheel holds the whole product and runs."""

import ast
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[1]
CALLED = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""What packages are imported as, and what they are installed as."""
OWN = {"sdt_blocks", "sdt_datasets", "common"}
ASKED_FOR = {"pynvml", "neurobench"}
"""What the errors of single options ask for by name."""


@pytest.fixture
def distribution(monkeypatch) -> Distribution:
    """What setup.py says."""
    import setuptools

    made = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **options: made.append(options))
    exec(
        compile((ROOT / "setup.py").read_text(encoding="utf-8"), str(ROOT / "setup.py"), "exec"),
        {"__file__": "setup.py"},
    )
    return Distribution({**made[0], "script_name": "setup.py"})


def names(requirements) -> set[str]:
    return {requirement.split(";")[0].split(">")[0].split("=")[0].strip() for requirement in requirements}


def imported(folder: str, *, at_once: bool) -> set[str]:
    """The packages that the files of a folder import, within functions too unless `at_once`."""
    found = set()
    for path in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body if at_once else ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.partition(".")[0])
    return {CALLED.get(name, name) for name in found - set(sys.stdlib_module_names) - OWN}


def test_what_is_imported_is_required(distribution):
    core = names(distribution.install_requires)
    extras = {name: names(required) for name, required in distribution.extras_require.items()}
    assert core == {"torch", "snntorch", "triton", "einops", "numpy", "safetensors", "rich"}
    assert imported("sdt_blocks", at_once=True) <= core
    everything = core | extras["all"]
    assert imported("sdt_blocks", at_once=False) - ASKED_FOR <= everything
    scripts = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert imported("recipes", at_once=False) - ASKED_FOR - scripts <= core | extras["recipes"] | {
        "nir",
        "onnxruntime",
        "onnxscript",
    }
    assert imported("datasets", at_once=False) - {"mlxtend"} <= core | extras["recipes"] | extras["events"]
    assert extras["recipes"] >= extras["analysis"] and extras["test"] > extras["all"]


def test_the_wheel_holds_the_whole_product(distribution):
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    files = {
        Path(path).relative_to(command.build_lib).as_posix() for path in command.get_outputs(include_bytecode=False)
    }
    for folder, package in (("recipes", "sdt_recipes"), ("datasets", "sdt_datasets"), ("sdt_blocks", "sdt_blocks")):
        kinds = ("*.py", "*.yaml", "*.cpp", "*.h", "*.safetensors", "*.csv", "*.npz", "py.typed")
        expected = {path for kind in kinds for path in (ROOT / folder).rglob(kind) if "runs" not in path.parts}
        missing = {f"{package}/{path.relative_to(ROOT / folder).as_posix()}" for path in expected} - files
        assert len(expected) > 10 and missing == set()
    assert distribution.entry_points == {"console_scripts": ["sdt = sdt_recipes.sdt:main"]}


def test_the_version_stands_once():
    import sdt_blocks

    listed = subprocess.run(
        ["git", "grep", "-lF", f'"{sdt_blocks.__version__}"'], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        assert listed.stdout.split() == ["sdt_blocks/__init__.py"]
    assert f"## v{sdt_blocks.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_importing_the_package_leaves_the_compiler_out():
    """`torch._dynamo` takes several times as long to import as the rest; what the kit marks for it is marked alike."""
    code = "import torch, snntorch, sys; before = set(sys.modules); import sdt_blocks; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'sdt_blocks.steps'" in done.stdout and "'torch._dynamo'" not in done.stdout
    from sdt_blocks.surrogate import constant_in_graphs

    ours, theirs = (mark(lambda: None) for mark in (constant_in_graphs, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(theirs) != {}


@pytest.mark.slow
def test_a_wheel_trains_and_answers_in_an_environment_of_its_own(tmp_path):
    """Beside this environment's packages, far from the sources."""
    copy = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    # Each call leaves arguments of its own in sys.argv.
    build = (
        "import setuptools.build_meta as b, sys; to = sys.argv[1]; print(b.build_wheel(to)); print(b.build_sdist(to))"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, text=True, check=True
    )
    *_, sdist = done.stdout.split()
    (wheel,) = tmp_path.glob("*.whl")
    with tarfile.open(tmp_path / sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/test_packages.py", "tests/golden/sdt_lif_static_64.safetensors", "benchmarks/run.py"} <= held
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--prefix",
        str(tmp_path / "venv"),
    ]
    subprocess.run([*install, "--ignore-installed", str(wheel)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def sdt(*arguments: str) -> str:
        command = [str(tmp_path / "venv/bin/python"), str(tmp_path / "venv/bin/sdt"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import sdt_blocks, sdt_recipes.common.config as c; print(sdt_blocks.__file__, c.CONFIGS)"
    python = [str(tmp_path / "venv/bin/python"), "-c", where]
    found = subprocess.run(python, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.count(str(tmp_path / "venv")) == 2
    small = [
        "train.epochs=4",
        "train.batch_size=16",
        "train.warmup_epochs=0",
        "model.dim=16",
        "data.train_samples=512",
        "data.test_samples=32",
        "threads=1",
    ]
    assert "test top-1" in sdt("train", "digits", *small, "output_dir=run")
    sdt("evaluate", "checkpoint=run", "data.test_samples=32")
    assert (tmp_path / "run" / "evaluation" / "evaluation.json").is_file()
    assert "digits" in sdt("configs")
    sdt("export", "checkpoint=run", "format=pt2")
    assert (tmp_path / "run" / "model.pt2").stat().st_size > 10_000
