"""A line at the bottom of the terminal that says how far a run is."""

import logging
import math
import time
from collections.abc import Callable
from typing import TextIO


class ProgressLine(logging.StreamHandler):
    """Log lines scroll by above; the last line is the bar. Off where the stream is no terminal: then it only logs.

    step 120  [######..............] 30%  0.131 s/step  1:02 left
    """

    def __init__(self, stream: TextIO):
        super().__init__(stream)
        self.is_shown = stream.isatty()
        self.text = ""
        self.last: tuple[float, int] | None = None  # when `seconds` was last measured, and at which step
        self.seconds: float | None = None  # per step, a running mean

    def emit(self, record: logging.LogRecord) -> None:
        self._write("\r\033[K" if self.text else "")
        super().emit(record)
        self._write(self.text)

    def show(self, step: int, share: float, seconds_left: Callable[[float], float]) -> None:
        """share: of the run that is done, in [0, 1]; seconds_left: from seconds per step, inf for a run without end."""
        self._measure(step)
        if not self.is_shown:
            return
        pace, left = "", math.inf
        if self.seconds is not None:
            pace, left = f"  {self.seconds:.3f} s/step", seconds_left(self.seconds)
        left = "" if left == math.inf else f"  {_clock(left)} left"
        filled = round(20 * share)
        self.text = f"\r\033[Kstep {step}  [{'#' * filled}{'.' * (20 - filled)}] {share:.0%}{pace}{left}"
        self._write(self.text)

    def clear(self) -> None:
        """The run is over."""
        self._write("\r\033[K" if self.text else "")
        self.text = ""

    def _measure(self, step: int) -> None:
        now = time.monotonic()
        if self.last is not None and step > self.last[1]:
            pace = (now - self.last[0]) / (step - self.last[1])
            self.seconds = pace if self.seconds is None else 0.9 * self.seconds + 0.1 * pace
        self.last = (now, step)

    def _write(self, text: str) -> None:
        if text:
            self.stream.write(text)
            self.stream.flush()


def _clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
