"""What a person's mistake looks like at the doors: one sentence on stderr and a non-zero exit, never a traceback.

Mistakes reach the entrances as ValueError (ConfigError among them), OSError (wrong path, no permission, disk full),
FloatingPointError (a run that diverged), MissingPackageError or a failed allocation. Everything else is our own mistake
and keeps its traceback.
"""

import functools
import sys
from collections.abc import Callable, Sequence

import torch

INTERRUPTED = 130  # the shell's code for a program ended by Ctrl-C


class MissingPackageError(ImportError):
    """An optional package that this command needs; the message holds the install line."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or in main memory (where torch raises a plain RuntimeError)."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "alloc" in text and "memory" in text


def user_message(error: BaseException) -> str | None:
    """The sentence to show for a person's mistake; None for an error of the program."""
    if isinstance(error, MemoryError) and error.args:  # ours, with the way out
        return f"not enough memory: {error}"
    if is_out_of_memory(error):
        needs = str(error).strip().split("\n")[0] or "an allocation failed"
        return (
            f"not enough memory: {needs.rstrip('.')}; use a smaller height and width, "
            "a window (model_kwargs.local_attn_size=15), a smaller model, or --device cpu"
        )
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, FloatingPointError, MissingPackageError)):
        return " ".join(str(error).split()) or type(error).__name__
    return None


def plain_errors(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Decorate an entrance's `main(argv) -> exit code`: mistakes become `error: <one sentence>` and code 1."""

    @functools.wraps(main)
    def entrance(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except KeyboardInterrupt:
            sys.stderr.write("\nstopped\n")
            return INTERRUPTED
        except Exception as error:
            message = user_message(error)
            if message is None:
                raise
            sys.stderr.write(f"error: {message}\n")
            return 1

    return entrance
