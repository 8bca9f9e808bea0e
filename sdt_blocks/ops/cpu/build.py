"""Builds the C++ kernels with the machine's compiler, once: it takes a few seconds, afterwards a cache is read."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("training.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-mcpu=native" if platform.system() == "Darwin" and platform.machine() == "arm64" else "-march=native",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Compilers avoid 512-bit vectors to keep the clock high; these kernels wait for memory.
    *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []),
)
# Without OpenMP (for example a macOS clang) the kernels run on one thread, still vectorized.
THREADING = ("-fopenmp", "-fopenmp-simd")


class BuildError(RuntimeError):
    """The kernels could not be built; the message says why and what to do."""


@functools.cache
def library(source: Path = SOURCE) -> ctypes.CDLL:
    """The built kernels of one C++ file.

    The compiler is `$CXX`, or the first of c++, g++ and clang++ on the path; `$CXXFLAGS` are added to the package's own
    options. The result is kept in `$SDT_BLOCKS_CACHE` (default: `sdt_blocks` in `$XDG_CACHE_HOME` or `~/.cache`) under
    a name made from the source, the compiler, its options and the processor, so that several machines can share a
    folder.

    Raises `BuildError` if there is no compiler or it fails, and on Windows.
    """
    compiler = _compiler()
    version = _run([compiler, "--version"]).stdout
    texts = [file.read_text(encoding="utf-8") for file in (source, *sorted(source.parent.glob("*.h")))]
    identity = "\n".join([*texts, *_flags(), *THREADING, compiler, version, processor()])
    name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    folder = cache_folder()
    if not (folder / name).is_file():
        _build(compiler, source, folder / name)
    try:
        return ctypes.CDLL(str(folder / name))
    except OSError as error:
        raise BuildError(f"{folder / name} cannot be loaded ({error}); delete it to have it built again") from None


def _flags() -> list[str]:
    return [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def _compiler() -> str:
    if platform.system() == "Windows":
        raise BuildError(
            "the C++ kernels are written for g++ and clang++ on Linux and macOS, neither MSVC nor MinGW builds them: "
            "on Windows PyTorch's own operators compute the same (WSL has the kernels)"
        )
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        path = shutil.which(name)
        if path:
            return path
    missing = f"the C++ compiler {asked!r} (from CXX) was not found" if asked else "no C++ compiler was found"
    raise BuildError(f"{missing}; install g++ or clang++, or name one in CXX")


def processor() -> str:
    """A string that differs between processors that need different kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {_model_name()}"


def _model_name() -> str:
    """The processor's name, for systems that show no flags; Python calls all of macOS's "arm"."""
    if platform.system() == "Darwin":
        with contextlib.suppress(OSError):
            return _run(["sysctl", "-n", "machdep.cpu.brand_string"]).stdout.strip()
    return platform.processor()


def cache_folder() -> Path:
    """The folder where this machine keeps what it has built and measured."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdt_blocks"
    folder = Path(os.environ.get("SDT_BLOCKS_CACHE") or default)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _folder_of_this_process()


@functools.cache
def _folder_of_this_process() -> Path:
    # A shared temporary folder could hold somebody else's code.
    return Path(tempfile.mkdtemp(prefix="sdt_blocks-"))


def _build(compiler: str, source: Path, target: Path) -> None:
    _log.info("building kernels once: %s, with %s", source.name, compiler)
    partial = target.with_name(f"{target.stem}-{os.getpid()}.part")
    for threading in THREADING:
        command = [compiler, *_flags(), threading, str(source), "-o", str(partial)]
        result = _run(command)
        if result.returncode == 0:
            # Processes that build at the same time each put a complete file in place.
            os.replace(partial, target)
            return
    partial.unlink(missing_ok=True)
    raise BuildError(f"{compiler} failed: {result.stderr.strip()[:500] or f'exit status {result.returncode}'}")
