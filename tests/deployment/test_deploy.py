"""Tests of deploy.sh with stub programs for `docker` and `ssh` that keep their state in files.

They check the order of the steps and the state after failures.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartGateway, tool
from tests.processes import heed_signals

ROOT = Path(__file__).parents[2]
SECRETS = ["canary-of-redis", "canary-of-grafana", "canary-of-a-client"]
SETTINGS = f"REDIS_PASSWORD={SECRETS[0]}\nGRAFANA_PASSWORD={SECRETS[1]}\nAPI_KEYS=me:{SECRETS[2]}\n"
QUICK = {"READY_SECONDS": "1", "SMOKE_SECONDS": "1"}

pytestmark = pytest.mark.full  # each deployment takes some seconds

# Implements the docker commands that deploy.sh uses. Recreates containers like Compose, when the
# tag or .env differs from those of their creation.
DOCKER = r"""#!PYTHON -IS
import json, os, sys, time
args, home = sys.argv[1:], "HOME"
where = os.environ.get("STUB_WHERE", "here")
with open(f"{home}/state") as file:
    state = json.load(file)
with open(f"{home}/fail") as file:
    fail = json.load(file)
place = state[where]
apps = place["apps"]
tag = os.environ.get("TAG")
found = os.path.exists(".env") and open(".env").read()

def log(text):
    with open(f"{home}/log", "a") as file:
        file.write(f"{where}: {text}\n")

def save():
    with open(f"{home}/state.new", "w") as file:
        json.dump(state, file)
    os.replace(f"{home}/state.new", f"{home}/state")
    states = [(app["health"], app["status"]) for app in apps.values()]
    serving = states.count(("healthy", "running"))
    with open(f"{home}/serving", "a") as file:
        file.write(f"{serving}\n")

def end(code=0, text=""):
    save()
    (sys.stderr if code else sys.stdout).write(text + "\n" if text else "")
    sys.exit(code)

def make():
    state["made"] += 1
    app = {"tag": tag, "status": "running", "health": "starting", "env": found}
    apps[f"c{state['made']}"] = app

def up(count):
    for name, app in list(apps.items()):
        if "--no-recreate" not in args and (app["tag"], app["env"]) != (tag, found):
            log(f"made anew: {name}")
            del apps[name]
            make()
        app["status"] = "running"
    while len(apps) < count:
        make()

command = " ".join(word if len(word) < 60 else "..." for word in args)
log(f"docker {command}" + f" TAG={tag}" * (args[0] == "compose"))
for word, wanted in fail.items():
    if word in " ".join(args) and wanted in (tag, True):
        end(1, f"stub: {word} fails")
    if word in " ".join(args) and wanted == f"hang {tag}":
        save()
        time.sleep(60)
match args:
    case ["compose", "ps", option, "app"]:
        shown = [name for name in apps if option == "-aq" or apps[name]["status"] == "running"]
        end(0, "\n".join(shown))
    case ["compose", "up", *rest]:
        scale = [word for word in rest if word.startswith("app=")]
        if "--force-recreate" in rest:
            log(f"made anew: {rest[-1]}")
        elif f"{os.environ['REGISTRY']}/virtuoso:{tag}".lstrip("/") not in place["images"]:
            end(1, "stub: no such image")
        else:
            up(int(scale[0][4:]) if scale else max(1, len(apps)))
    case ["compose", "rm", "-f", "app"]:
        for name in [name for name, app in apps.items() if app["status"] != "running"]:
            del apps[name]
    case ["inspect", "-f", _, name]:
        app = apps[name]
        status = f"{app['status']} {app['health']}"
        if app["health"] == "starting" and fail.get("starting") != app["tag"]:
            app["health"] = "unhealthy" if fail.get("health") == app["tag"] else "healthy"
        end(0, status)
    case ["exec", name, "python", "-c", _, path]:
        wrong = fail.get("smoke" if path.startswith("/ticker/") else "ready")
        log(f"asked {apps[name]['tag']} for {path}")
        if wrong == apps[name]["tag"]:
            end(1, "HTTP Error 503: Service Unavailable")
        end(0, "200")
    case ["logs", *_, name]:
        end(0, f"last words of {apps[name]['tag']}")
    case ["stop", *names]:
        for name in names:
            apps[name]["status"] = "exited"
    case ["rm", "-f", *names] | ["rm", *names]:
        for name in names:
            if args[1] != "-f" and apps[name]["status"] == "running":
                end(1, f"stub: {name} is running")
            del apps[name]
    case ["image", "ls", *_, repository]:
        images = [name.rpartition(":") for name in place["images"]]
        end(0, "\n".join(tag for name, _, tag in images if name == repository))
    case ["image", "inspect", *_, name]:
        end(0 if name in place["images"] else 1)
    case ["image", "rm", name]:
        if name.rpartition(":")[2] in [app["tag"] for app in apps.values()]:
            end(1, "stub: in use")
        place["images"].remove(name)
    case ["build", *_, name, "."] if name not in place["images"]:
        place["images"].insert(0, name)
    case ["pull", name]:
        if name not in state["registry"]:
            end(1, "stub: not in the registry")
        place["images"].insert(0, name)
    case ["push", name]:
        state["registry"].append(name)
    case ["save", name]:
        print(name)
        sys.exit()  # `load` runs concurrently and changes the state
    case ["load"]:
        place["images"].insert(0, sys.stdin.read().strip())
end()
"""
SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
case $1 in *unreachable) echo "stub: no route" >&2; exit 255 ;; esac
STUB_WHERE=server exec env -u COMPOSE_PROJECT_NAME sh -c "$2"
"""


class Bench:
    """A checkout with deploy.sh, a directory of a server, and the stub programs."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "stubs"
        self.tree = folder / "checkout"
        self.server = folder / "server"
        for path in (self.home, self.tree / "deploy" / "edge", self.server):
            path.mkdir(parents=True)
        stubs = {
            "docker": DOCKER,
            "ssh": SSH,
            "sleep": '#!/bin/sh\necho "here: sleep $1" >>HOME/log\n',
        }
        for name, text in stubs.items():
            path = self.home / name
            path.write_text(
                text.replace("HOME", str(self.home)).replace("PYTHON", sys.executable, 1)
            )
            path.chmod(0o755)
        empty: dict[str, Any] = {"apps": {}, "images": []}
        self.write(made=0, registry=[], here=empty, server=empty)
        self.fail()
        shutil.copy(ROOT / "deploy.sh", self.tree)
        (self.tree / ".gitignore").write_text(".env\n")
        for name in ("docker-compose.yml", "prometheus.yml", "deploy/edge/nginx.conf"):
            (self.tree / name).write_text("first\n")
        self.git("init", "--quiet")
        self.tags = [self.commit("first")]
        (self.tree / ".env").write_text(SETTINGS)
        (self.tree / ".env").chmod(0o600)
        (self.server / ".env").write_text(
            SETTINGS.rstrip("\n")
        )  # some editors omit the final line feed

    def git(self, *arguments: str) -> str:
        name = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        command = ["git", "-C", str(self.tree), *name, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self, what: str) -> str:
        """Commit all files and return the tag that deploy.sh uses."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", what)
        return self.git("rev-parse", "--short", "HEAD")

    def write(self, **state: Any) -> None:
        (self.home / "state").write_text(json.dumps(state))

    def fail(self, **what: Any) -> None:
        """Let docker commands with these words fail, for one tag or for all tags (True)."""
        (self.home / "fail").write_text(
            json.dumps({word.replace("_", "-"): wanted for word, wanted in what.items()})
        )

    def state(self) -> Any:
        return json.loads((self.home / "state").read_text())

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        return kept | {"PATH": f"{self.home}:{os.environ['PATH']}"} | more

    def deploy(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Run deploy.sh and return its output, which may not contain a secret."""
        for name in ("log", "serving"):
            (self.home / name).write_text("")
        command = [str(self.tree / "deploy.sh"), *arguments]
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
            env=self.environment(**environment),
        )
        output = ended.stdout + ended.stderr
        assert ended.returncode == code, output
        assert not [secret for secret in SECRETS if secret in output]
        return output

    def deploy_next(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Commit a change and deploy it."""
        self.tags.append(self.commit(f"number {len(self.tags) + 1}"))
        return self.deploy(*arguments, code=code, **environment)

    def log(self) -> list[str]:
        """Return the logged steps, without read-only commands and waits."""
        reads = (
            r"docker (compose (version|ps|config)|inspect|image (inspect|ls))"
            r"|asked .*|docker exec|sleep 1$"
        )
        lines = (self.home / "log").read_text().splitlines()
        return [line for line in lines if not re.match(rf"\w+: ({reads})", line)]

    def asked(self) -> list[str]:
        return re.findall(r": asked (.*)", (self.home / "log").read_text())

    def least_serving(self) -> int:
        """Return the lowest number of healthy containers at any time."""
        return min(int(line) for line in (self.home / "serving").read_text().split())

    def apps(self, where: str = "here") -> list[str]:
        return [
            app["tag"] for app in self.state()[where]["apps"].values() if app["status"] == "running"
        ]

    def names(self, where: str = "here") -> list[str]:
        return list(self.state()[where]["apps"])

    def lines(self, folder: Path | None = None) -> dict[str, str]:
        """Return the lines of .env that deploy.sh writes."""
        text = ((folder or self.tree) / ".env").read_text()
        return dict(re.findall(r"^(TAG|PREVIOUS_TAGS|REGISTRY)=(.*)$", text, re.MULTILINE))

    def snapshot(self) -> dict[str, str]:
        """Return all files of the checkout and the server, and the state of the stubs."""
        folders = [*self.tree.rglob("*"), *self.server.rglob("*"), self.home / "state"]
        return {
            str(path): path.read_text(errors="replace")
            for path in folders
            if path.is_file() and ".git" not in path.parts
        }


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def scale(bench: Bench, count: int, where: str = "here") -> None:
    """Run this number of containers, like `docker compose up -d --scale`."""
    state = bench.state()
    (app,) = state[where]["apps"].values()
    for number in range(1, count):
        state[where]["apps"][f"scaled{number}"] = dict(app)
    bench.write(**state)


def test_first_deployment_builds_starts_and_checks(bench: Bench) -> None:
    """.env keeps its other lines and its permissions."""
    output = bench.deploy()
    (tag,) = bench.tags
    assert bench.log() == [
        f"here: docker build --build-arg VERSION={tag} --tag virtuoso:{tag} .",
        f"here: docker compose up -d --no-build TAG={tag}",
        "here: docker compose up -d --no-build --remove-orphans --wait --wait-timeout 180"
        f" --scale app=1 TAG={tag}",
    ]
    assert bench.asked() == [f"{tag} for /health/ready", f"{tag} for /ticker/BTC-USDT"]
    assert bench.apps() == [tag]
    assert (bench.tree / ".env").read_text() == SETTINGS + f"PREVIOUS_TAGS=\nTAG={tag}\n"
    assert stat.S_IMODE((bench.tree / ".env").stat().st_mode) == 0o600
    assert not (bench.tree / ".env.before").exists()
    assert f"tag {tag} is running" in output


def test_replicas_are_replaced_without_reducing_capacity(bench: Bench) -> None:
    """New containers start and are checked before the old ones stop. None is recreated."""
    bench.deploy()
    scale(bench, 3)
    old = bench.names()
    bench.deploy_next(SMOKE_SYMBOL="ETH-USDT")
    first, tag = bench.tags
    stop = " ".join(old)
    assert bench.log() == [
        f"here: docker build --build-arg VERSION={tag} --tag virtuoso:{tag} .",
        f"here: docker compose rm -f app TAG={tag}",
        "here: docker compose up -d --no-build --no-deps --no-recreate"
        f" --scale app=6 app TAG={tag}",
        "here: sleep 8",
        f"here: docker stop {stop}",
        f"here: docker rm {stop}",
        "here: docker compose up -d --no-build --remove-orphans --wait --wait-timeout 180"
        f" --scale app=3 TAG={tag}",
    ]
    assert bench.asked() == [f"{tag} for /health/ready", f"{tag} for /ticker/ETH-USDT"] * 3
    assert bench.least_serving() == 3
    assert bench.apps() == [tag] * 3
    assert bench.lines() == {"TAG": tag, "PREVIOUS_TAGS": first}


def test_stopped_containers_are_removed_first(bench: Bench) -> None:
    """Compose would restart a stopped container with the old image."""
    bench.deploy()
    scale(bench, 2)
    state = bench.state()
    state["here"]["apps"]["scaled1"]["status"] = "exited"
    bench.write(**state)
    bench.deploy_next()
    assert bench.apps() == [bench.tags[1]]


def test_dry_run_prints_the_steps_without_changes(bench: Bench) -> None:
    """The printed steps are those of the real deployment."""
    bench.deploy("--host", "ops@gate", "--dir", str(bench.server))
    bench.tags.append(bench.commit("second"))
    before = bench.snapshot()
    output = bench.deploy("--host", "ops@gate", "--dir", str(bench.server), "--dry-run")
    assert bench.snapshot() == before
    assert bench.log() == []
    real = bench.deploy("--host", "ops@gate", "--dir", str(bench.server))
    (new,) = bench.names("server")

    def steps(text: str) -> list[str]:
        return [line.replace(new, "NEW_CONTAINERS") for line in text.splitlines() if "$ " in line]

    assert steps(output) == steps(real)
    for part in (
        "build",
        "docker save",
        "git archive",
        "TAG=",
        "scale app=2",
        "/ticker/BTC-USDT",
        "docker stop c1",
    ):
        assert part in output


def test_image_is_pushed_to_and_pulled_from_the_registry(bench: Bench) -> None:
    """The registry is stored in .env for Compose and for the next deployment."""
    host = ["--host", "ops@gate", "--dir", str(bench.server)]
    output = bench.deploy(*host, REGISTRY="registry.example:5000/team")
    image = f"registry.example:5000/team/virtuoso:{bench.tags[0]}"
    assert [line for line in bench.log() if "push" in line or "pull" in line or "load" in line] == [
        f"here: docker push {image}",
        f"server: docker pull {image}",
    ]
    assert output.index("docker build") < output.index("docker push") < output.index("docker pull")
    assert bench.lines(bench.server)["REGISTRY"] == "registry.example:5000/team"
    bench.deploy_next(*host)
    assert bench.state()["registry"] == [
        f"registry.example:5000/team/virtuoso:{tag}" for tag in bench.tags
    ]


def test_failed_push_changes_nothing_on_the_server(bench: Bench) -> None:
    """The exit code is 1."""
    before = (bench.server / ".env").read_text()
    bench.fail(push=True)
    bench.deploy(
        "--host", "ops@gate", "--dir", str(bench.server), REGISTRY="registry.example", code=1
    )
    assert [line for line in bench.log() if line.startswith("server")] == []
    assert (bench.server / ".env").read_text() == before


def test_ssh_deployment_copies_image_and_files(bench: Bench) -> None:
    """Without a registry: `docker save` and `load`, `git archive`, and the .env of the server."""
    (bench.tree / ".env").unlink()
    output = bench.deploy(
        "--host", "ops@gate", "--dir", str(bench.server), COMPOSE_PROJECT_NAME="blue"
    )
    (tag,) = bench.tags
    assert bench.apps("server") == [tag]
    assert bench.apps("here") == []
    assert "server: docker load" in bench.log()
    assert (bench.server / "deploy/edge/nginx.conf").read_text() == "first\n"
    assert (bench.server / ".env").read_text() == SETTINGS + f"PREVIOUS_TAGS=\nTAG={tag}\n"
    assert not (bench.server / "deploy.sh").exists()
    assert (
        "env TAG=" + tag + " REGISTRY= COMPOSE_PROJECT_NAME=blue docker compose up"
        in output.replace("''", "")
    )


def test_services_are_recreated_when_their_files_change(bench: Bench) -> None:
    """Services read their files at startup. Other services keep running."""
    host = ["--host", "ops@gate", "--dir", str(bench.server)]
    for options, where in (([], "here"), (host, "server")):
        bench.deploy(*options)
        (bench.tree / "deploy/edge/nginx.conf").write_text(f"another for {where}\n")
        bench.deploy_next(*options)
        assert [line for line in bench.log() if "made anew" in line] == [
            f"{where}: made anew: edge"
        ]
        (bench.tree / "prometheus.yml").write_text(f"another for {where}\n")
        bench.deploy_next(*options)
        assert [line for line in bench.log() if "made anew" in line] == [
            f"{where}: made anew: prometheus"
        ]


@pytest.mark.parametrize(
    ("fault", "over_ssh"),
    [("health", False), ("starting", False), ("ready", False), ("smoke", False), ("smoke", True)],
)
def test_failing_new_containers_are_removed(bench: Bench, fault: str, over_ssh: bool) -> None:
    """The old containers keep running with their files and tag. The output shows the reason."""
    options = ["--host", "ops@gate", "--dir", str(bench.server)] if over_ssh else []
    where, folder = ("server", bench.server) if over_ssh else ("here", bench.tree)
    bench.deploy(*options)
    scale(bench, 3, where)
    old = bench.names(where)
    env = (folder / ".env").read_text()
    (bench.tree / "prometheus.yml").write_text("second\n")
    bench.tags.append(bench.commit("second"))
    bench.fail(**{fault: bench.tags[1]})
    output = bench.deploy(
        *options, code=1, **QUICK, HEALTHY_SECONDS="1" if fault == "starting" else "90"
    )
    assert bench.names(where) == old
    assert bench.apps(where) == [bench.tags[0]] * 3
    assert (folder / ".env").read_text() == env
    assert not (folder / ".env.before").exists()
    assert f"last words of {bench.tags[1]}" in output
    assert f"tag {bench.tags[0]} is still running" in output
    assert not [line for line in bench.log() if "docker stop" in line]
    if over_ssh:
        assert (bench.server / "prometheus.yml").read_text() == "first\n"
    if fault == "smoke":  # the next deployment works
        bench.fail()
        bench.deploy(*options)
        assert bench.apps(where) == [bench.tags[1]] * 3


def test_failed_first_deployment_leaves_no_container(bench: Bench) -> None:
    """.env is restored as well."""
    bench.fail(smoke=bench.tags[0])
    assert "does not answer /ticker/BTC-USDT: HTTP Error 503" in bench.deploy(code=1, **QUICK)
    assert bench.names() == []
    assert (bench.tree / ".env").read_text() == SETTINGS


@pytest.mark.parametrize("over_ssh", [False, True])
def test_failure_after_the_switch_restores_the_previous_tag(bench: Bench, over_ssh: bool) -> None:
    """The other services fail to start, and the old tag is deployed again without a gap."""
    options = ["--host", "ops@gate", "--dir", str(bench.server)] if over_ssh else []
    where, folder = ("server", bench.server) if over_ssh else ("here", bench.tree)
    bench.deploy(*options)
    scale(bench, 2, where)
    env = (folder / ".env").read_text()
    bench.tags.append(bench.commit("second"))
    bench.fail(remove_orphans=bench.tags[1])
    output = bench.deploy(*options, code=1)
    assert bench.apps(where) == [bench.tags[0]] * 2
    assert bench.least_serving() >= (
        0 if over_ssh else 2
    )  # also counted on this machine, which runs no container
    assert (folder / ".env").read_text() == env
    assert bench.asked()[-1] == f"{bench.tags[0]} for /ticker/BTC-USDT"
    assert f"tag {bench.tags[0]} is running again" in output


def test_failed_restore_is_reported(bench: Bench) -> None:
    """The new containers keep serving if the previous tag fails its checks, too."""
    bench.deploy()
    bench.tags.append(bench.commit("second"))
    bench.fail(remove_orphans=bench.tags[1], smoke=bench.tags[0])
    assert "restoring failed: check docker compose ps" in bench.deploy(code=1, **QUICK)
    assert bench.tags[1] in bench.apps()


def test_rollback_deploys_the_previous_tags_in_turn(bench: Bench) -> None:
    """Nothing is built."""
    for _ in range(3):
        bench.deploy_next()
    first, second, third = bench.tags[1:]
    assert bench.lines() == {"TAG": third, "PREVIOUS_TAGS": f"{second},{first}"}
    bench.deploy("--rollback")
    assert not [line for line in bench.log() if "docker build" in line]
    assert bench.apps() == [second]
    assert bench.lines() == {"TAG": second, "PREVIOUS_TAGS": f"{first},{third}"}
    bench.deploy("--rollback")
    assert bench.apps() == [first]


def test_rollback_over_ssh_restores_the_files(bench: Bench) -> None:
    """The tag names the commit of the files."""
    host = ["--host", "ops@gate", "--dir", str(bench.server)]
    bench.deploy(*host)
    (bench.tree / "deploy/edge/nginx.conf").write_text("second\n")
    bench.deploy_next(*host)
    bench.deploy("--rollback", *host)
    assert (bench.server / "deploy/edge/nginx.conf").read_text() == "first\n"
    assert "server: made anew: edge" in bench.log()
    assert "server: docker load" not in bench.log()


def test_rollback_fails_without_a_previous_tag(bench: Bench) -> None:
    """The first deployment has no previous tag."""
    bench.deploy()
    assert "cannot roll back" in bench.deploy("--rollback", code=1)
    assert bench.apps() == [bench.tags[0]]


def test_existing_tag_is_deployed_without_a_build(bench: Bench) -> None:
    """A missing image is rejected before any change."""
    bench.deploy()
    bench.deploy_next()
    bench.deploy("--tag", bench.tags[0])
    assert bench.apps() == [bench.tags[0]]
    assert "image virtuoso:v9 does not exist" in bench.deploy("--tag", "v9", code=1)
    assert bench.log() == []


def test_three_tags_are_kept(bench: Bench) -> None:
    """Older images are removed on both machines. Images with other tags are kept."""
    host = ["--host", "ops@gate", "--dir", str(bench.server)]
    state = bench.state()
    state["server"]["images"] = ["virtuoso:latest", "other:0123456"]
    bench.write(**state)
    bench.deploy(*host)
    for _ in range(4):
        bench.deploy_next(*host)
    kept = [f"virtuoso:{tag}" for tag in bench.tags[:-4:-1]]
    assert bench.state()["server"]["images"] == [*kept, "virtuoso:latest", "other:0123456"]
    assert bench.state()["here"]["images"] == kept


def test_uncommitted_changes_require_dirty(bench: Bench) -> None:
    """The tag of a dirty build ends in -dirty."""
    (bench.tree / "new.py").write_text("x = 1\n")
    assert "uncommitted changes" in bench.deploy(code=1)
    assert bench.log() == []
    bench.deploy("--dirty")
    assert bench.apps() == [bench.tags[0] + "-dirty"]


def test_missing_env_file_is_reported(bench: Bench) -> None:
    """The message names the machine and the directory."""
    (bench.tree / ".env").unlink()
    assert "no file .env here" in bench.deploy(code=1)
    (bench.server / ".env").unlink()
    output = bench.deploy("--host", "ops@gate", "--dir", str(bench.server), code=1)
    assert f"no file .env in ops@gate:{bench.server}" in output
    assert bench.log() == []


def test_unreachable_server_is_reported(bench: Bench) -> None:
    """The message differs from that of a missing .env."""
    assert "cannot run commands in ops@unreachable" in bench.deploy(
        "--host", "ops@unreachable", code=1
    )
    output = bench.deploy("--host", "ops@gate", "--dir", str(bench.server / "missing"), code=1)
    assert "check that the host and the directory exist" in output


def test_concurrent_deployment_is_refused(bench: Bench) -> None:
    """Files of the running or interrupted deployment are not changed."""
    (bench.tree / ".env.before").write_text(SETTINGS)
    assert "another deployment is running or was interrupted" in bench.deploy(code=1)
    assert bench.log() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hots", "x"],
        ["--host"],
        ["--dir", "/x"],
        ["--host", "-oProxyCommand=x"],
        ["--tag", "x", "--dirty"],
        ["--tag", "a b"],
    ],
)
def test_invalid_usage_exits_with_2(bench: Bench, arguments: list[str]) -> None:
    """The message points to --help, and no command is run."""
    assert "see --help" in bench.deploy(*arguments, code=2)


def test_help_names_every_option(bench: Bench) -> None:
    """The output contains no code."""
    output = bench.deploy("--help")
    script = (ROOT / "deploy.sh").read_text()
    parser = re.search(r"parse\(\) \{.*?\n\}", script, re.DOTALL)
    assert parser is not None
    options = set(re.findall(r"--[a-z-]+(?=[ |)])", parser[0]))
    assert options >= {"--host", "--dry-run", "--rollback"}
    assert not [option for option in options if option not in output]
    assert "set -e" not in output


@pytest.mark.parametrize(
    ("at", "left", "word"),
    [("scale app=2 app", 0, "still running"), ("remove-orphans", 1, "is running and checked")],
)
def test_signal_leaves_a_defined_state(bench: Bench, at: str, left: int, word: str) -> None:
    """Old containers remain before the switch, new ones after it. The next deployment can start."""
    bench.deploy()
    bench.tags.append(bench.commit("second"))
    bench.fail(**{at: f"hang {bench.tags[1]}"})
    (bench.home / "log").write_text("")
    command = [str(bench.tree / "deploy.sh")]
    # A new session, so that the signal reaches all its processes, as from a terminal. heed_signals
    # resets ignored signals, which a shell cannot trap; background jobs of scripts ignore SIGINT.
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=bench.environment(),
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    deadline = time.monotonic() + 30
    while at not in (bench.home / "log").read_text():
        assert time.monotonic() < deadline, "deploy.sh did not reach this step"
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    output = running.communicate(timeout=30)[0]
    assert running.returncode == 130, output
    assert "stopped by SIGINT" in output
    assert word in output
    assert bench.apps() == [bench.tags[left]]
    assert bench.lines()["TAG"] == bench.tags[left]
    assert not (bench.tree / ".env.before").exists()


async def test_probe_uses_the_api_key_of_the_gateway(start: StartGateway) -> None:
    """The program of deploy.sh prints only a status or an error without secrets."""
    live = await start(api_keys=f"me:{SECRETS[2]}")
    script = (ROOT / "deploy.sh").read_text()
    found = re.search(r"^PROBE='(.*?)'$", script, re.DOTALL | re.MULTILINE)
    assert found is not None
    probe = found[1].replace("http://127.0.0.1:8000", live.url)

    async def ask(path: str, keys: str) -> tuple[int, str]:
        command = [sys.executable, "-c", probe, path]
        environment = os.environ | {"API_KEYS": keys, "HTTP_PROXY": "http://127.0.0.1:9"}
        ended = await asyncio.to_thread(
            subprocess.run,
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            check=False,
        )
        return ended.returncode, ended.stdout + ended.stderr

    assert await ask("/health/ready", "") == (0, "200\n")
    assert await ask("/ticker/BTC-USDT", f"me:{SECRETS[2]}") == (0, "200\n")
    assert await ask("/ticker/BTC-USDT", "me:wrong-key") == (1, "HTTP Error 401: Unauthorized\n")
    assert await ask("/ticker/BTC-USDT", "short") == (1, "ConfigError\n")


def scripts() -> list[Path]:
    """Return every shell script of the project."""
    found = [path for path in ROOT.rglob("*.sh") if ".venv" not in path.parts]
    return [*sorted(found), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(script: Path) -> None:
    """Every shell script passes without a warning."""
    command = [tool("shellcheck", "shellcheck"), str(script)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
