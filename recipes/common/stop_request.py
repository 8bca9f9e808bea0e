"""How a run is asked to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """Turns SIGTERM and SIGINT into a request that the loop answers at its next step boundary.

    `request.signal` is the number received, or 0. A launcher that has ended counts as SIGTERM: it would not pass one
    on. A second signal ends the process at once. On exit the handlers are as they were.
    """

    def __init__(self) -> None:
        self._received = 0
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ
        self._launcher = os.getppid() if launched else None

    @property
    def signal(self) -> int:
        if not self._received and self._launcher not in (None, os.getppid()):
            self._received = signal.SIGTERM
        return self._received

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(number, signal.SIG_DFL)
