"""The workflow of continuous integration: that it is one, does what a person does, and may do no more than it needs."""

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


def test_it_is_a_workflow() -> None:
    """It holds against the schema of GitHub's workflows, which check-jsonschema carries."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_it_runs_the_commands_of_the_ci_script() -> None:
    """`make test` runs on each version of Python, where one failure hides no other, and `make test-all` on one."""
    assert JOBS["test"]["strategy"] == {"fail-fast": False, "matrix": {"python": ["3.11", "3.12", "3.13", "3.14"]}}
    by_hand = re.findall(r"\b(make [\w-]+(?: \w+=\w+)*)", (ROOT / ".ci" / "run").read_text())
    assert by_hand == ["make ci-deps", "make test COVERAGE=1", "make test-all"]
    assert runs("test") == ["sudo make ci-deps", "make test COVERAGE=1"]
    assert runs("long") == ["sudo make ci-deps", "make test-all"]
    assert JOBS["long"]["env"] == {"VIRTUOSO_ALL_TOOLS": "1"}
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {command.split()[1] for command in by_hand} <= targets
    (setup,) = [step["with"] for step in JOBS["test"]["steps"] if "setup-python" in step.get("uses", "")]
    assert (setup["python-version"], setup["cache"]) == ("${{ matrix.python }}", "pip")


def test_the_image_is_built_linted_and_run_as_it_will_be() -> None:
    """Without a writable file system or a privilege, and it has to live and to stop."""
    text = "\n".join(runs("image"))
    for part in ("hadolint Dockerfile", "docker compose config --quiet", "docker build", "--read-only", "/health/live"):
        assert part in text
    assert text.index("docker build") < text.index("docker run")
    assert "pip-audit --requirement requirements.txt" in "\n".join(runs("dependencies"))


def test_it_may_only_read() -> None:
    """No job asks for more, no token stays in the checkout, no secret is used, no event runs with rights."""
    assert CI["permissions"] == {"contents": "read"}
    assert not [name for name, job in JOBS.items() if "permissions" in job]
    checkouts = [step for job in JOBS.values() for step in job["steps"] if "actions/checkout" in step.get("uses", "")]
    assert len(checkouts) == len(JOBS)
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)
    assert "secrets." not in TEXT
    assert set(CI[True]) == {"push", "pull_request", "schedule"}  # YAML reads `on` as true


def test_every_action_is_pinned_by_hash() -> None:
    """A tag may be moved to other code; a hash may not. The version stands behind it, for people."""
    uses = re.findall(r"uses: *(.*)", TEXT)
    assert uses
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in uses), uses


def test_no_command_takes_what_others_wrote() -> None:
    """Nothing of an event, such as a title, is put into a shell's words."""
    assert not [command for job in JOBS for command in runs(job) if "${{" in command]


@pytest.mark.parametrize("job", list(JOBS))
def test_every_job_is_bounded(job: str) -> None:
    """In time; and a newer push ends the run of the one before."""
    assert 0 < JOBS[job]["timeout-minutes"] <= 60
    assert JOBS[job]["runs-on"] == "ubuntu-24.04"
    assert CI["concurrency"]["cancel-in-progress"] is True
