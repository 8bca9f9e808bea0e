"""Builds the C++ kernels with the machine's compiler, once: it takes a few seconds, afterwards a cache is read."""

from __future__ import annotations

import atexit
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
import warnings
from collections.abc import Iterator
from pathlib import Path

from ...files import write_atomically

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
COMPILERS = ("c++", "g++", "clang++")


class BuildError(RuntimeError):
    """The kernels could not be built; the message says why and what to do."""


@functools.cache
def library(source: Path = SOURCE) -> ctypes.CDLL:
    """The built kernels of one C++ file.

    The compiler is `$CXX`, or the first of c++, g++ and clang++ on the path; `$CXXFLAGS` are added to the package's own
    options. The result is kept in `$SDT_BLOCKS_CACHE` (default: `sdt_blocks` in `$XDG_CACHE_HOME` or `~/.cache`) under
    a name made from the source, its options, the processor and the compiler, so that several machines can share a
    folder. Where it can only be read, or no compiler is installed, what was built there before is taken.

    Raises `BuildError` if there is no compiler or it fails, and on Windows.
    """
    stem = identity(source)
    file = _built_before(stem)
    if file is None:
        compiler = _compiler()
        name = f"{stem}-{_hash(compiler, _run([compiler, '--version']).stdout)}.so"
        file = cache_folder(written=False) / name
        if not file.is_file():
            file = cache_folder() / name
            _build(compiler, source, file)
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise BuildError(
            f"{file} cannot be loaded ({error}); delete it to have it built again, or if libraries may not be loaded "
            "from there, name another folder in SDT_BLOCKS_CACHE"
        ) from None


def identity(source: Path) -> str:
    """A name made from all that the kernels of a C++ file depend on, except the compiler."""
    texts = [file.read_text(encoding="utf-8") for file in (source, *sorted(source.parent.glob("*.h")))]
    return f"{source.stem}-{_hash(*texts, *_flags(), *THREADING, processor())}"


def _built_before(stem: str) -> Path | None:
    """Kernels that some compiler has built for this processor, if none is installed here."""
    if os.environ.get("CXX") or any(map(shutil.which, COMPILERS)):
        return None
    return max(cache_folder(written=False).glob(f"{stem}-*.so"), default=None)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


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
    for name in [asked] if asked else COMPILERS:
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


def cache_folder(*, written: bool = True) -> Path:
    """The folder where this machine keeps what it has built and measured; one that can only be read unless `written`.

    A process that may not write there, or has no home folder, has a folder of its own while it runs; one warning says
    so.
    """
    folder = _named_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK | (os.W_OK if written else 0)):
            return folder
    return _folder_of_process(os.getpid(), folder)


def _named_folder() -> Path | None:
    named = os.environ.get("SDT_BLOCKS_CACHE")
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdt_blocks"
    except RuntimeError:  # a user without a home folder, as in some containers
        return None


@functools.cache
def _folder_of_process(process: int, instead_of: Path | None) -> Path:
    # A shared temporary folder could hold somebody else's code.
    folder = Path(tempfile.mkdtemp(prefix="sdt_blocks-"))
    atexit.register(_remove, folder, process)
    where = "there is no home folder" if instead_of is None else f"{instead_of} cannot be written"
    warnings.warn(
        f"{where}, so each process builds kernels and measures for itself, which takes a minute or more: name a folder "
        "that can be written, or that another process has filled, in SDT_BLOCKS_CACHE",
        stacklevel=2,
    )
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a child that was forked from it
        shutil.rmtree(folder, ignore_errors=True)


def _build(compiler: str, source: Path, target: Path) -> None:
    try:
        with _alone_in(target.parent):
            if not target.is_file():  # another process or thread may just have built it
                _log.info("building kernels once: %s, with %s", source.name, compiler)
                write_atomically(target, lambda partial: _compile(compiler, source, partial))
    except OSError as error:
        raise BuildError(f"{target} cannot be written ({error}); name another folder in SDT_BLOCKS_CACHE") from None


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """A context in which no other process or thread builds into the folder, where the file system has locks."""
    import fcntl  # Windows, where nothing is built, does not have it

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough if a process was forked meanwhile
        os.close(handle)


def _compile(compiler: str, source: Path, target: str) -> None:
    for threading in THREADING:
        result = _run([compiler, *_flags(), threading, str(source), "-o", target])
        if result.returncode == 0:
            return
    raise BuildError(f"{compiler} failed: {result.stderr.strip()[:500] or f'exit status {result.returncode}'}")
