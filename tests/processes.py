"""Processes of the machine, read from /proc, so that `ps` need not be installed."""

import signal
from contextlib import suppress
from pathlib import Path

import pytest

PROC = Path("/proc")


def children(parent: int) -> dict[int, str]:
    """Map the PID of each child process to its command line. Skip the test without /proc."""
    if not (PROC / "self" / "stat").exists():
        pytest.skip("no /proc on this system: the test needs Linux")
    commands = {}
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):  # the process has ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                commands[int(folder.name)] = command.replace("\0", " ")
    return commands


def heed_signals() -> None:
    """Restore the default signal handlers, which shells disable for background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
