"""Tests of the systemd units and the crontab: syntax, hardening and commands."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import maintenance
from tests.conftest import tool

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = ["virtuoso.service", "virtuoso-maintenance.service", "virtuoso-maintenance.timer"]
# Exposure from 0 to 100; systemd prints tenths.
MAX_EXPOSURE = {"virtuoso.service": 20, "virtuoso-maintenance.service": 30}


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze, which needs no running systemd for these commands."""
    command = [tool("systemd-analyze", "systemd"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def unit(name: str) -> dict[str, dict[str, list[str]]]:
    """Parse a unit into sections, keys and lists of values."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in (DEPLOY / name).read_text().replace("\\\n", " ").splitlines():
        if section := re.fullmatch(r"\[(\w+)\]", line):
            found[section[1]] = {}
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found[list(found)[-1]].setdefault(key, []).append(value)
    return found


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """`systemd-analyze verify` prints nothing."""
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for name in UNITS:
        (units / name).write_text((DEPLOY / name).read_text())
    for target in (
        "network-online",
        "basic",
        "sysinit",
        "shutdown",
        "timers",
        "time-set",
        "time-sync",
        "multi-user",
    ):
        (units / f"{target}.target").write_text(f"[Unit]\nDescription={target}\n")
    for program in ("opt/virtuoso/.venv/bin/uvicorn", "usr/bin/docker"):
        (tmp_path / program).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / program).touch(mode=0o755)
    verified = analyze("verify", f"--root={tmp_path}", "--man=no", *UNITS)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


@pytest.mark.parametrize("name", list(MAX_EXPOSURE))
def test_services_are_hardened(name: str) -> None:
    """The exposure that systemd computes is far below its level MEDIUM."""
    judged = analyze(
        "security",
        "--offline=true",
        "--no-pager",
        f"--threshold={MAX_EXPOSURE[name]}",
        str(DEPLOY / name),
    )
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert "Unknown" not in judged.stderr


def test_service_and_image_use_the_same_command() -> None:
    """The service listens on 127.0.0.1 and runs in the directory of .env."""
    service = unit("virtuoso.service")["Service"]
    program, *words = shlex.split(service["ExecStart"][0])
    assert program == "/opt/virtuoso/.venv/bin/uvicorn"
    assert words[:5] == ["src.api:app", "--host", "127.0.0.1", "--port", "8000"]
    assert service["WorkingDirectory"] == ["/opt/virtuoso"]
    dockerfile = ROOT / "Dockerfile"
    if dockerfile.exists():
        shell = re.search(
            r"^CMD (\[.*?\])", dockerfile.read_text().replace("\\\n", " "), re.MULTILINE | re.DOTALL
        )
        assert shell is not None
        in_image = re.findall(r'"([^"]+)"', shell[1])[1:]
        assert sorted(words) == sorted(
            "127.0.0.1" if word == "0.0.0.0" else word for word in in_image
        )
    graceful = int(words[words.index("--timeout-graceful-shutdown") + 1])
    assert int(service["TimeoutStopSec"][0]) > graceful


def test_timer_runs_the_daily_task_and_catches_up() -> None:
    """Once a day, with a random delay, also after the machine was off."""
    timer = unit("virtuoso-maintenance.timer")["Timer"]
    assert timer == {
        "OnCalendar": ["*-*-* 04:10:00"],
        "RandomizedDelaySec": ["10min"],
        "Persistent": ["true"],
    }
    service = unit("virtuoso-maintenance.service")["Service"]
    assert service["ExecStart"][0].endswith(" python maintenance.py daily")
    assert service["Type"] == ["oneshot"]


def jobs() -> list[tuple[list[str], str]]:
    """Return schedule and command of every crontab line, including commented ones."""
    lines = (DEPLOY / "crontab").read_text().splitlines()
    found = re.findall(r"^(?:# )?\s*((?:[\d*/]+\s+){5})(.*)$", "\n".join(lines), re.MULTILINE)
    return [(fields.split(), rest) for fields, rest in found]


def test_maintenance_tasks_of_cron_and_systemd_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Each task is one of maintenance.py."""
    with pytest.raises(SystemExit):
        maintenance.main(["--help"])
    listed = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)
    assert listed is not None
    text = "\n".join((DEPLOY / name).read_text() for name in [*UNITS, "crontab"])
    tasks = re.findall(r"maintenance\.py (\w+)", text)
    assert set(tasks) <= set(listed[1].split(","))
    assert len(tasks) == len(jobs()) + 2  # the service file names two


def test_crontab_lines_are_valid() -> None:
    """Five valid fields, a user, and a command without an unescaped percent sign."""
    assert len(jobs()) == 7
    bounds = [59, 23, 31, 12, 7]
    for fields, rest in jobs():
        for field, most in zip(fields, bounds, strict=True):
            assert all(0 <= int(number) <= most for number in re.findall(r"\d+", field)), field
        user, command = rest.split(maxsplit=1)
        assert user in ("root", "virtuoso")
        assert command.startswith("cd /opt/virtuoso && ")
        assert "%" not in command
        assert ("docker compose exec -T app" in command) == (user == "root")
    assert [fields[:2] for fields, rest in jobs() if "daily" in rest] == [["10", "4"]] * 2


def test_first_run_and_missed_runs_are_explained() -> None:
    """Both files name the alert and say that the first run is by hand."""
    for name in ("virtuoso-maintenance.service", "crontab"):
        text = (DEPLOY / name).read_text()
        assert "VirtuosoMaintenanceMissed" in text
        assert "by hand" in text
