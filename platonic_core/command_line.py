"""What the rooms' command lines share: how errors and warnings are told.

An error is one line on stderr and exit code 2; Ctrl-C is 130.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = ["Parser", "run_command"]


class Parser(argparse.ArgumentParser):
    """Its errors are exceptions, and options are not abbreviated."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help lists the options)")


def run_command(name: str, make_parser: Callable[[], Parser], argv: Sequence[str] | None) -> int:
    """Parses `argv` and calls the ``run`` that the chosen command has set; returns the exit code."""

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        print(f"{name}: warning: {_one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            args = make_parser().parse_args(argv)
            args.run(args)
            sys.stdout.flush()
            return 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # whoever read our output has gone, as in `| head`
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
            print(f"{name}: error: {_one_line(error)}", file=sys.stderr)
            return 2


def _one_line(error: Any) -> str:
    return " ".join(str(error).split()) or type(error).__name__
