"""Tests of the CI workflow: schema, commands, permissions and pinned actions."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
TEXT = WORKFLOW.read_text()
CI: dict[Any, Any] = yaml.safe_load(TEXT)
JOBS: dict[str, dict[str, Any]] = CI["jobs"]


def runs(job: str) -> list[str]:
    """Return the commands of a job."""
    return [step["run"].strip() for step in JOBS[job]["steps"] if "run" in step]


def test_workflow_matches_the_schema() -> None:
    """The schema of GitHub workflows is part of check-jsonschema."""
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        str(WORKFLOW),
    ]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_workflow_runs_the_commands_of_the_ci_script() -> None:
    """`make test` runs on each Python version, `make test-all` on one.

    The soak of the script is shorter, so that CI takes less than 25 minutes.
    """
    assert JOBS["test"]["strategy"] == {
        "fail-fast": False,
        "matrix": {"python": ["3.11", "3.12", "3.13", "3.14"]},
    }
    expected = re.findall(r"\b(make [\w-]+(?: \w+=\w+)*)", (ROOT / ".ci" / "run").read_text())
    assert expected == [
        "make ci-deps",
        "make test COVERAGE=1",
        "make test-all SOAK_SECONDS=120",
    ]
    assert runs("test") == ["sudo make ci-deps", "make test COVERAGE=1"]
    assert runs("long") == ["sudo make ci-deps", "make test-all"]
    assert JOBS["long"]["env"] == {"VIRTUOSO_ALL_TOOLS": "1"}
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {command.split()[1] for command in expected} <= targets
    (setup,) = [
        step["with"] for step in JOBS["test"]["steps"] if "setup-python" in step.get("uses", "")
    ]
    assert (setup["python-version"], setup["cache"]) == ("${{ matrix.python }}", "pip")


def test_image_is_linted_built_and_run_as_in_production() -> None:
    """The container has a read-only file system, and must start and stop."""
    text = "\n".join(runs("image"))
    for part in (
        "hadolint Dockerfile",
        "docker compose config --quiet",
        "docker build",
        "--read-only",
        "/health/live",
    ):
        assert part in text
    assert text.index("docker build") < text.index("docker run")
    assert "pip-audit --requirement requirements.txt" in "\n".join(runs("dependencies"))


def test_workflow_has_read_only_permissions() -> None:
    """No job has more permissions, keeps the token in the checkout, or uses secrets."""
    assert CI["permissions"] == {"contents": "read"}
    assert not [name for name, job in JOBS.items() if "permissions" in job]
    checkouts = [
        step
        for job in JOBS.values()
        for step in job["steps"]
        if "actions/checkout" in step.get("uses", "")
    ]
    assert len(checkouts) == len(JOBS)
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)
    assert "secrets." not in TEXT
    assert set(CI[True]) == {"push", "pull_request", "schedule"}  # YAML reads `on` as true


def test_actions_are_pinned_by_commit_hash() -> None:
    """Tags can be moved to other code. A comment shows the version."""
    uses = re.findall(r"uses: *(.*)", TEXT)
    assert uses
    assert all(
        re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in uses
    ), uses


def test_commands_contain_no_expressions() -> None:
    """Text of an event, for example a title, never becomes part of a shell command."""
    assert not [command for job in JOBS for command in runs(job) if "${{" in command]


@pytest.mark.parametrize("job", list(JOBS))
def test_jobs_have_a_timeout(job: str) -> None:
    """A newer push cancels the previous run."""
    assert 0 < JOBS[job]["timeout-minutes"] <= 60
    assert JOBS[job]["runs-on"] == "ubuntu-24.04"
    assert CI["concurrency"]["cancel-in-progress"] is True
