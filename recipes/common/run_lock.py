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
        while not self._create():
            self._judge()
        threading.Thread(target=self._touch, daemon=True).start()
        atexit.register(self.release)

    def check(self) -> None:
        """Raise `RunError` if another run has taken the folder since."""
        found = _read(self.path)
        if found is None:
            self._create()
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

    def _create(self) -> bool:
        try:
            file = self.path.open("xb")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self.content)
        except OSError:  # a full disk: an empty lock would look like somebody's
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _judge(self) -> None:
        """Remove the lock of a dead owner, or raise `ConfigError` for a living one."""
        found = _read(self.path)
        if found is None:
            return
        owner = _parse(found)
        if owner.get("machine") == _machine():
            alive = _alive(owner)
        else:
            warn(f"{self.path} names {_owner(found)}; watching it {PATIENCE:.0f} s for a sign of life")
            alive = self._is_touched()
        if alive:
            raise ConfigError(
                f"output_dir={self.folder} is in use by {_owner(found)}; wait for that run or stop it, choose another "
                f"output_dir, or delete {self.path} if there is no such run"
            )
        self._take_away(found)

    def _is_touched(self) -> bool:
        def seen() -> tuple[bytes, int] | None:
            with contextlib.suppress(OSError), self.path.open("rb") as file:  # opening asks a file server again
                return file.read(), os.fstat(file.fileno()).st_mtime_ns
            return None

        first, deadline = seen(), time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(min(1.0, PATIENCE / 10))
            if (now := seen()) != first:
                return now is not None
        return False

    def _take_away(self, found: bytes) -> None:
        aside = self.path.with_name(f".{LOCK}.{uuid.uuid4().hex[:8]}")
        try:
            os.replace(self.path, aside)
        except FileNotFoundError:
            return
        if aside.read_bytes() == found:
            warn(f"{self.path} was left by {_owner(found)}, which has ended; this run takes the folder over")
        else:  # another new process was faster, and this is its lock
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()

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
