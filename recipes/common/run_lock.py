"""One run per folder: `run.lock` names the process that writes there, and is removed when it ends.

    {"host": "node3", "pid": 4242, "since": "2026-11-24 10:00:00", "machine": "...", "started": 1763.5, "token": "..."}

A lock whose process has ended on this machine is taken over at once. Of a process elsewhere (another host, another
container) only the file is known: its owner touches it every few seconds, and a file that nobody touches is taken over
after a while. So no clocks are compared, and a file system without locks of its own, such as NFS, is enough.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from .config import ConfigError, RunError, cannot_write
from .progress import warn

LOCK = "run.lock"
HEARTBEAT, PATIENCE = 10.0, 60.0
"""Seconds between two touches, and seconds without one after which an owner elsewhere counts as gone."""


class RunLock:
    """The right of this process to write into a run folder, from the creation of the object to `release`.

    Raises a `ConfigError` with the owner and the remedy if another run has it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK
        self.content = json.dumps(_this_process()).encode()
        self._ended = threading.Event()
        while not (self._create(self.path) or self._take_over()):
            pass
        threading.Thread(target=self._touch, daemon=True).start()
        atexit.register(self.release)

    def check(self) -> None:
        """Raise `RunError` if another run has taken the folder since."""
        found = _read(self.path)
        if found is None:
            self._create(self.path)
        elif found != self.content:
            raise RunError(
                f"{self.path} is no longer this run's: it names {_owner(found)}, which has taken the folder over; this "
                f"run stops and leaves the folder to it"
            )

    def release(self) -> None:
        """Give the folder up."""
        self._ended.set()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError, ConfigError):
            if _read(self.path) == self.content:
                self.path.unlink()

    def _create(self, path: Path) -> bool:
        """Write a lock of this process, unless there is one: it appears whole, or not at all."""
        with self._written() as own:
            try:
                os.link(own, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                return self._create_in_place(path)
        return True

    def _create_in_place(self, path: Path) -> bool:
        try:
            file = path.open("xb")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self.content)
        except OSError:  # an empty lock would look like somebody's
            path.unlink(missing_ok=True)
            raise
        return True

    @contextlib.contextmanager
    def _written(self) -> Iterator[Path]:
        """This process's lock under a name that nobody else uses, until the end of the context."""
        own = self.path.with_name(f".{LOCK}.{uuid.uuid4().hex[:8]}")
        try:
            own.write_bytes(self.content)
            yield own
        finally:
            own.unlink(missing_ok=True)

    def _take_over(self) -> bool:
        """Put this process's lock in the place of a dead owner's. Raises `ConfigError` for a living one.

        One new process at a time does so, the one whose lock of the takeover stands: others would take away the new
        owner's lock for the dead one's. The place is never empty.
        """
        found = _read(self.path)
        if found is None:
            return False
        if self._is_alive(self.path, found):
            raise ConfigError(
                f"output_dir={self.folder} is in use by {_owner(found)}; wait for that run or stop it, choose another "
                f"output_dir, or delete {self.path} if there is no such run"
            )
        takeover = self.path.with_name(f".{LOCK}.takeover")
        if not self._create(takeover):
            self._wait_for(takeover)
            return False
        try:
            if _read(self.path) != found:
                return False
            with self._written() as own:
                os.replace(own, self.path)
        finally:
            takeover.unlink(missing_ok=True)
        warn(f"{self.path} was left by {_owner(found)}, which has ended; this run takes the folder over")
        return True

    def _wait_for(self, takeover: Path) -> None:
        """Wait for another new process, or remove what it left if it has ended amid its takeover."""
        time.sleep(0.05)
        found = _read(takeover)
        if found is not None and not self._is_alive(takeover, found):
            takeover.unlink(missing_ok=True)

    def _is_alive(self, path: Path, found: bytes) -> bool:
        """Whether the owner that a lock names is alive, as far as can be known."""
        owner = _parse(found)
        if owner.get("machine") == _machine():
            return _alive(owner)
        warn(f"{path} names {_owner(found)}; watching it {PATIENCE:.0f} s for a sign of life")
        return self._is_touched(path)

    @staticmethod
    def _is_touched(path: Path) -> bool:
        def seen() -> tuple[bytes, int] | None:
            with contextlib.suppress(OSError), path.open("rb") as file:  # opening asks a file server again
                return file.read(), os.fstat(file.fileno()).st_mtime_ns
            return None

        first, deadline = seen(), time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(min(1.0, PATIENCE / 10))
            if (now := seen()) != first:
                return now is not None
        return False

    def _touch(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError, ConfigError):
                if _read(self.path) == self.content:
                    os.utime(self.path)


def lock_folder(folder: Path) -> RunLock:
    """Create the folder if it is missing and lock it. Raises `ConfigError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        key = folder.resolve()
        if key in _held and not _held[key]._ended.is_set():
            _held[key].release()  # this process starts over
        _held[key] = RunLock(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise cannot_write(folder, error) from error
    return _held[key]


_held: dict[Path, RunLock] = {}


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": _machine(),
        "started": psutil.Process().create_time(),
        "token": uuid.uuid4().hex,
    }


def _machine() -> str:
    """Identifies the processes that see one another by number: one boot of the system, one name space of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()  # on other systems the boot time is only known to the second


def _alive(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(owner["pid"])
        # Another process may have got the same number since.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 5
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}); delete it if no run writes into its folder") from error


def _parse(content: bytes) -> dict[str, Any]:
    """The owner that a lock names; empty if the lock is damaged."""
    try:
        owner = json.loads(content)
        return owner if isinstance(owner["pid"], int) and isinstance(owner["started"], float) else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _owner(content: bytes) -> str:
    owner = _parse(content)
    if not owner:
        return "an owner that cannot be read"
    return f"process {owner['pid']} on {owner.get('host')} since {owner.get('since')}"
