"""How a run is asked to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType

import psutil

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)]
"""The signals that ask a run to stop; the last is Ctrl-Break of Windows, the only one that another process can send."""


def has_ended(parent: int) -> bool:
    """Whether the process that started this one has ended. On Windows its number remains that of the parent."""
    return os.getppid() != parent or (os.name == "nt" and not psutil.pid_exists(parent))


class StopRequest:
    """Turns `SIGNALS` into a request that the loop answers at its next step boundary.

    `request.signal` is the number received, or 0. A launcher that has ended counts as SIGTERM, which it could not pass
    on. A second signal ends the process at once. On exit the previous handlers are restored.
    """

    def __init__(self) -> None:
        self._received = 0
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ
        self._launcher = os.getppid() if launched else None

    @property
    def signal(self) -> int:
        if not self._received and self._launcher is not None and has_ended(self._launcher):
            self._received = signal.SIGTERM
        return self._received

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(number, signal.SIG_DFL)
