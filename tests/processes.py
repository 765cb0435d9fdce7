"""Processes of the machine, read from /proc: the program `ps` need not be installed."""

import signal
from contextlib import suppress
from pathlib import Path

import pytest

PROC = Path("/proc")


def children(parent: int) -> dict[int, str]:
    """Map the number of each child process to its command line. Skip the test on systems without /proc."""
    if not (PROC / "self" / "stat").exists():
        pytest.skip("no /proc on this system: the test needs Linux")
    found = {}
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):  # the process has ended since
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                found[int(folder.name)] = command.replace("\0", " ")
    return found


def heed_signals() -> None:
    """Undo what a shell does to its background jobs: they ignore these signals, and so do all processes they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
