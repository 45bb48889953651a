"""utils/progress.py: the bar stays below the log, and out of files."""

import io
import logging

from utils.progress import ProgressLine, _clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("x", logging.INFO, __file__, 1, text, None, None)


def test_the_bar_and_the_log_share_a_terminal(monkeypatch):
    now = iter([10.0, 12.0])
    monkeypatch.setattr("utils.progress.time.monotonic", lambda: next(now))
    terminal = Terminal()
    line = ProgressLine(terminal)
    line.show(1, 0.25, lambda pace: 3 * pace)
    line.show(2, 0.5, lambda pace: 65 * pace)
    assert terminal.getvalue().endswith("\r\033[Kstep 2  [##########..........] 50%  2.000 s/step  2:10 left")
    line.emit(record("saved"))
    bar = "\r\033[Kstep 2  [##########..........] 50%  2.000 s/step  2:10 left"
    assert terminal.getvalue().endswith(f"\r\033[Ksaved\n{bar}")
    line.clear()
    assert terminal.getvalue().endswith("\r\033[K")


def test_a_file_gets_the_log_only():
    file = io.StringIO()
    line = ProgressLine(file)
    line.show(1, 0.5, lambda pace: 1.0)
    line.emit(record("saved"))
    line.clear()
    assert file.getvalue() == "saved\n"


def test_clocks():
    assert [_clock(s) for s in (4.4, 125, 3723)] == ["0:04", "2:05", "1:02:03"]
