"""deploy.sh, run with a `docker` and an `ssh` that keep their state in files: what it does, in which order, and what it
leaves when something fails."""

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

pytestmark = pytest.mark.full  # some seconds for each deployment

# Knows what deploy.sh uses. Makes containers anew as Compose does: when tag or .env are not those they were made with.
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
    serving = sum(app["health"] == "healthy" and app["status"] == "running" for app in apps.values())
    with open(f"{home}/serving", "a") as file:
        file.write(f"{serving}\n")

def end(code=0, text=""):
    save()
    (sys.stderr if code else sys.stdout).write(text + "\n" if text else "")
    sys.exit(code)

def make():
    state["made"] += 1
    apps[f"c{state['made']}"] = {"tag": tag, "status": "running", "health": "starting", "env": found}

def up(count):
    for name, app in list(apps.items()):
        if "--no-recreate" not in args and (app["tag"], app["env"]) != (tag, found):
            log(f"made anew: {name}")
            del apps[name]
            make()
        app["status"] = "running"
    while len(apps) < count:
        make()

log("docker " + " ".join(word if len(word) < 60 else "..." for word in args) + f" TAG={tag}" * (args[0] == "compose"))
for word, wanted in fail.items():
    if word in " ".join(args) and wanted in (tag, True):
        end(1, f"stub: {word} fails")
    if word in " ".join(args) and wanted == f"hang {tag}":
        save()
        time.sleep(60)
match args:
    case ["compose", "ps", option, "app"]:
        end(0, "\n".join(name for name, app in apps.items() if option == "-aq" or app["status"] == "running"))
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
        told = f"{app['status']} {app['health']}"
        if app["health"] == "starting" and fail.get("starting") != app["tag"]:
            app["health"] = "unhealthy" if fail.get("health") == app["tag"] else "healthy"
        end(0, told)
    case ["exec", name, "python", "-c", _, path]:
        wrong = fail.get("smoke" if path.startswith("/ticker/") else "ready")
        log(f"asked {apps[name]['tag']} for {path}")
        end(*(1, "HTTP Error 503: Service Unavailable") if wrong == apps[name]["tag"] else (0, "200"))
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
        end(0, "\n".join(name.rpartition(":")[2] for name in place["images"] if name.rpartition(":")[0] == repository))
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
        sys.exit()  # `load` runs at the same time, and changes the state
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
    """A checkout with deploy.sh in it, a server's directory, and the stubs."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "stubs"
        self.tree = folder / "checkout"
        self.server = folder / "server"
        for path in (self.home, self.tree / "deploy" / "edge", self.server):
            path.mkdir(parents=True)
        stubs = {"docker": DOCKER, "ssh": SSH, "sleep": '#!/bin/sh\necho "here: sleep $1" >>HOME/log\n'}
        for name, text in stubs.items():
            path = self.home / name
            path.write_text(text.replace("HOME", str(self.home)).replace("PYTHON", sys.executable, 1))
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
        (self.server / ".env").write_text(SETTINGS.rstrip("\n"))  # as an editor may leave it

    def git(self, *arguments: str) -> str:
        name = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        command = ["git", "-C", str(self.tree), *name, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self, what: str) -> str:
        """Commit the tree as it is; returns the tag deploy.sh gives it."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", what)
        return self.git("rev-parse", "--short", "HEAD")

    def write(self, **state: Any) -> None:
        (self.home / "state").write_text(json.dumps(state))

    def fail(self, **what: Any) -> None:
        """Have words of docker commands fail; by tag, or whatever the tag (True)."""
        (self.home / "fail").write_text(json.dumps({word.replace("_", "-"): wanted for word, wanted in what.items()}))

    def state(self) -> Any:
        return json.loads((self.home / "state").read_text())

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        return kept | {"PATH": f"{self.home}:{os.environ['PATH']}"} | more

    def deploy(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Run deploy.sh; returns all it printed, which never holds a secret."""
        for name in ("log", "serving"):
            (self.home / name).write_text("")
        command = [str(self.tree / "deploy.sh"), *arguments]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=180, check=False, env=self.environment(**environment)
        )
        told = ended.stdout + ended.stderr
        assert ended.returncode == code, told
        assert not [secret for secret in SECRETS if secret in told]
        return told

    def next(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Commit something and deploy it."""
        self.tags.append(self.commit(f"number {len(self.tags) + 1}"))
        return self.deploy(*arguments, code=code, **environment)

    def log(self) -> list[str]:
        """Return what docker and sleep were told, without what only looks and waits."""
        looks = r"docker (compose (version|ps|config)|inspect|image (inspect|ls))|asked .*|docker exec|sleep 1$"
        lines = (self.home / "log").read_text().splitlines()
        return [line for line in lines if not re.match(rf"\w+: ({looks})", line)]

    def asked(self) -> list[str]:
        return re.findall(r": asked (.*)", (self.home / "log").read_text())

    def least_serving(self) -> int:
        """Return how many healthy containers there were at the worst of times."""
        return min(int(line) for line in (self.home / "serving").read_text().split())

    def apps(self, where: str = "here") -> list[str]:
        return [app["tag"] for app in self.state()[where]["apps"].values() if app["status"] == "running"]

    def names(self, where: str = "here") -> list[str]:
        return list(self.state()[where]["apps"])

    def lines(self, folder: Path | None = None) -> dict[str, str]:
        """Return what deploy.sh keeps in .env."""
        text = ((folder or self.tree) / ".env").read_text()
        return dict(re.findall(r"^(TAG|PREVIOUS_TAGS|REGISTRY)=(.*)$", text, re.MULTILINE))

    def everything(self) -> dict[str, str]:
        """Return every file of checkout and server, and the state of the stubs."""
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
    """Have that many containers of what runs, as `docker compose up -d --scale` makes them."""
    state = bench.state()
    (app,) = state[where]["apps"].values()
    for number in range(1, count):
        state[where]["apps"][f"scaled{number}"] = dict(app)
    bench.write(**state)


def test_the_first_deployment_is_a_plain_start(bench: Bench) -> None:
    """Build, start all, check the app, and note the tag; .env keeps its other lines and its permissions."""
    told = bench.deploy()
    (tag,) = bench.tags
    assert bench.log() == [
        f"here: docker build --build-arg VERSION={tag} --tag virtuoso:{tag} .",
        f"here: docker compose up -d --no-build TAG={tag}",
        "here: docker compose up -d --no-build --remove-orphans --wait --wait-timeout 180 --scale app=1 "
        + f"TAG={tag}",
    ]
    assert bench.asked() == [f"{tag} for /health/ready", f"{tag} for /ticker/BTC-USDT"]
    assert bench.apps() == [tag]
    assert (bench.tree / ".env").read_text() == SETTINGS + f"PREVIOUS_TAGS=\nTAG={tag}\n"
    assert stat.S_IMODE((bench.tree / ".env").stat().st_mode) == 0o600
    assert not (bench.tree / ".env.before").exists()
    assert f"tag {tag} runs" in told


def test_three_replicas_are_replaced_and_three_always_serve(bench: Bench) -> None:
    """New ones beside the old, all of them asked, the edge given time, then the old stopped; none is made anew."""
    bench.deploy()
    scale(bench, 3)
    old = bench.names()
    bench.next(SMOKE_SYMBOL="ETH-USDT")
    first, tag = bench.tags
    stop = " ".join(old)
    assert bench.log() == [
        f"here: docker build --build-arg VERSION={tag} --tag virtuoso:{tag} .",
        f"here: docker compose rm -f app TAG={tag}",
        f"here: docker compose up -d --no-build --no-deps --no-recreate --scale app=6 app TAG={tag}",
        "here: sleep 8",
        f"here: docker stop {stop}",
        f"here: docker rm {stop}",
        f"here: docker compose up -d --no-build --remove-orphans --wait --wait-timeout 180 --scale app=3 TAG={tag}",
    ]
    assert bench.asked() == [f"{tag} for /health/ready", f"{tag} for /ticker/ETH-USDT"] * 3
    assert bench.least_serving() == 3
    assert bench.apps() == [tag] * 3
    assert bench.lines() == {"TAG": tag, "PREVIOUS_TAGS": first}


def test_a_stopped_container_does_not_stand_in_for_a_new_one(bench: Bench) -> None:
    """One that has ended is removed first; Compose would start it again, with the old image."""
    bench.deploy()
    scale(bench, 2)
    state = bench.state()
    state["here"]["apps"]["scaled1"]["status"] = "exited"
    bench.write(**state)
    bench.next()
    assert bench.apps() == [bench.tags[1]]


def test_a_dry_run_prints_every_step_and_takes_none(bench: Bench) -> None:
    """Nothing is different afterwards, and what is printed is what is then done."""
    bench.deploy("--host", "ops@gate", "--dir", str(bench.server))
    bench.tags.append(bench.commit("second"))
    before = bench.everything()
    told = bench.deploy("--host", "ops@gate", "--dir", str(bench.server), "--dry-run")
    assert bench.everything() == before
    assert bench.log() == []
    real = bench.deploy("--host", "ops@gate", "--dir", str(bench.server))
    (new,) = bench.names("server")

    def steps(text: str) -> list[str]:
        return [line.replace(new, "NEW_CONTAINERS") for line in text.splitlines() if "$ " in line]

    assert steps(told) == steps(real)
    for part in ("build", "docker save", "git archive", "TAG=", "scale app=2", "/ticker/BTC-USDT", "docker stop c1"):
        assert part in told


def test_with_a_registry_the_image_goes_through_it(bench: Bench) -> None:
    """Pushed from here, pulled there, named after it, and remembered in .env for Compose and for the next time."""
    host = ["--host", "ops@gate", "--dir", str(bench.server)]
    told = bench.deploy(*host, REGISTRY="registry.example:5000/team")
    image = f"registry.example:5000/team/virtuoso:{bench.tags[0]}"
    assert [line for line in bench.log() if "push" in line or "pull" in line or "load" in line] == [
        f"here: docker push {image}",
        f"server: docker pull {image}",
    ]
    assert told.index("docker build") < told.index("docker push") < told.index("docker pull")
    assert bench.lines(bench.server)["REGISTRY"] == "registry.example:5000/team"
    bench.next(*host)
    assert bench.state()["registry"] == [f"registry.example:5000/team/virtuoso:{tag}" for tag in bench.tags]


def test_a_push_that_fails_stops_before_anything_runs(bench: Bench) -> None:
    """Exit code 1, and the server was not told to change anything."""
    before = (bench.server / ".env").read_text()
    bench.fail(push=True)
    bench.deploy("--host", "ops@gate", "--dir", str(bench.server), REGISTRY="registry.example", code=1)
    assert [line for line in bench.log() if line.startswith("server")] == []
    assert (bench.server / ".env").read_text() == before


def test_over_ssh_image_and_files_are_sent(bench: Bench) -> None:
    """No registry: the image by save and load, the files of the commit by archive, and .env is the server's own."""
    (bench.tree / ".env").unlink()
    told = bench.deploy("--host", "ops@gate", "--dir", str(bench.server), COMPOSE_PROJECT_NAME="blue")
    (tag,) = bench.tags
    assert bench.apps("server") == [tag]
    assert bench.apps("here") == []
    assert "server: docker load" in bench.log()
    assert (bench.server / "deploy/edge/nginx.conf").read_text() == "first\n"
    assert (bench.server / ".env").read_text() == SETTINGS + f"PREVIOUS_TAGS=\nTAG={tag}\n"
    assert not (bench.server / "deploy.sh").exists()
    assert "env TAG=" + tag + " REGISTRY= COMPOSE_PROJECT_NAME=blue docker compose up" in told.replace("''", "")


def test_files_that_changed_have_their_service_made_anew(bench: Bench) -> None:
    """Services read their files at the start. Only those whose files are others; over ssh as well as here."""
    host = ["--host", "ops@gate", "--dir", str(bench.server)]
    for options, where in (([], "here"), (host, "server")):
        bench.deploy(*options)
        (bench.tree / "deploy/edge/nginx.conf").write_text(f"another for {where}\n")
        bench.next(*options)
        assert [line for line in bench.log() if "made anew" in line] == [f"{where}: made anew: edge"]
        (bench.tree / "prometheus.yml").write_text(f"another for {where}\n")
        bench.next(*options)
        assert [line for line in bench.log() if "made anew" in line] == [f"{where}: made anew: prometheus"]


@pytest.mark.parametrize(
    ("fault", "over_ssh"), [("health", False), ("starting", False), ("ready", False), ("smoke", False), ("smoke", True)]
)
def test_new_containers_that_are_not_well_are_taken_away(bench: Bench, fault: str, over_ssh: bool) -> None:
    """The old ones run all the time and are what is left, with their files and tag; the log says why."""
    options = ["--host", "ops@gate", "--dir", str(bench.server)] if over_ssh else []
    where, folder = ("server", bench.server) if over_ssh else ("here", bench.tree)
    bench.deploy(*options)
    scale(bench, 3, where)
    old, env = bench.names(where), (folder / ".env").read_text()
    (bench.tree / "prometheus.yml").write_text("second\n")
    bench.tags.append(bench.commit("second"))
    bench.fail(**{fault: bench.tags[1]})
    told = bench.deploy(*options, code=1, **QUICK, HEALTHY_SECONDS="1" if fault == "starting" else "90")
    assert bench.names(where) == old
    assert bench.apps(where) == [bench.tags[0]] * 3
    assert (folder / ".env").read_text() == env
    assert not (folder / ".env.before").exists()
    assert f"last words of {bench.tags[1]}" in told
    assert "what ran before still runs" in told
    assert not [line for line in bench.log() if "docker stop" in line]
    if over_ssh:
        assert (bench.server / "prometheus.yml").read_text() == "first\n"
    if fault == "smoke":  # nothing is in the way of the next one
        bench.fail()
        bench.deploy(*options)
        assert bench.apps(where) == [bench.tags[1]] * 3


def test_a_failed_first_deployment_leaves_no_app(bench: Bench) -> None:
    """Nothing ran before, so nothing is what it goes back to."""
    bench.fail(smoke=bench.tags[0])
    assert "does not answer /ticker/BTC-USDT: HTTP Error 503" in bench.deploy(code=1, **QUICK)
    assert bench.names() == []
    assert (bench.tree / ".env").read_text() == SETTINGS


@pytest.mark.parametrize("over_ssh", [False, True])
def test_a_failure_after_the_switch_brings_the_previous_tag_back(bench: Bench, over_ssh: bool) -> None:
    """The other services do not come up: the old tag rolls in the way the new one did, without a gap."""
    options = ["--host", "ops@gate", "--dir", str(bench.server)] if over_ssh else []
    where, folder = ("server", bench.server) if over_ssh else ("here", bench.tree)
    bench.deploy(*options)
    scale(bench, 2, where)
    env = (folder / ".env").read_text()
    bench.tags.append(bench.commit("second"))
    bench.fail(remove_orphans=bench.tags[1])
    told = bench.deploy(*options, code=1)
    assert bench.apps(where) == [bench.tags[0]] * 2
    assert bench.least_serving() >= (0 if over_ssh else 2)  # counted for both places, and here there is none
    assert (folder / ".env").read_text() == env
    assert bench.asked()[-1] == f"{bench.tags[0]} for /ticker/BTC-USDT"
    assert f"tag {bench.tags[0]} runs again" in told


def test_what_fails_while_coming_back_is_told(bench: Bench) -> None:
    """The previous tag is not well either: what serves is left, and what to look at is named."""
    bench.deploy()
    bench.tags.append(bench.commit("second"))
    bench.fail(remove_orphans=bench.tags[1], smoke=bench.tags[0])
    assert "that failed too: see docker compose ps" in bench.deploy(code=1, **QUICK)
    assert bench.tags[1] in bench.apps()


def test_rollback_goes_back_and_back(bench: Bench) -> None:
    """To the tag before, and then to the one before that; nothing is built."""
    for _ in range(3):
        bench.next()
    first, second, third = bench.tags[1:]
    assert bench.lines() == {"TAG": third, "PREVIOUS_TAGS": f"{second},{first}"}
    bench.deploy("--rollback")
    assert not [line for line in bench.log() if "docker build" in line]
    assert bench.apps() == [second]
    assert bench.lines() == {"TAG": second, "PREVIOUS_TAGS": f"{first},{third}"}
    bench.deploy("--rollback")
    assert bench.apps() == [first]


def test_rollback_over_ssh_takes_the_files_back_too(bench: Bench) -> None:
    """The commit is in the tag, so its files are sent again."""
    host = ["--host", "ops@gate", "--dir", str(bench.server)]
    bench.deploy(*host)
    (bench.tree / "deploy/edge/nginx.conf").write_text("second\n")
    bench.next(*host)
    bench.deploy("--rollback", *host)
    assert (bench.server / "deploy/edge/nginx.conf").read_text() == "first\n"
    assert "server: made anew: edge" in bench.log()
    assert "server: docker load" not in bench.log()


def test_rollback_needs_something_to_go_back_to(bench: Bench) -> None:
    """After the first deployment there is nothing."""
    bench.deploy()
    assert "no tag was there before" in bench.deploy("--rollback", code=1)
    assert bench.apps() == [bench.tags[0]]


def test_a_tag_that_is_there_can_be_deployed(bench: Bench) -> None:
    """What was built elsewhere is deployed without a build; one that is not there is refused before any change."""
    bench.deploy()
    bench.next()
    bench.deploy("--tag", bench.tags[0])
    assert bench.apps() == [bench.tags[0]]
    assert "there is no image virtuoso:v9" in bench.deploy("--tag", "v9", code=1)
    assert bench.log() == []


def test_the_last_three_tags_are_kept(bench: Bench) -> None:
    """Older ones go, here and on the server; tags of somebody else's making stay."""
    host = ["--host", "ops@gate", "--dir", str(bench.server)]
    state = bench.state()
    state["server"]["images"] = ["virtuoso:latest", "other:0123456"]
    bench.write(**state)
    bench.deploy(*host)
    for _ in range(4):
        bench.next(*host)
    kept = [f"virtuoso:{tag}" for tag in bench.tags[:-4:-1]]
    assert bench.state()["server"]["images"] == [*kept, "virtuoso:latest", "other:0123456"]
    assert bench.state()["here"]["images"] == kept


def test_an_uncommitted_change_is_refused_unless_wanted(bench: Bench) -> None:
    """The tag would name what is not in it. With --dirty it says so."""
    (bench.tree / "new.py").write_text("x = 1\n")
    assert "not committed" in bench.deploy(code=1)
    assert bench.log() == []
    bench.deploy("--dirty")
    assert bench.apps() == [bench.tags[0] + "-dirty"]


def test_without_env_nothing_begins(bench: Bench) -> None:
    """Here and over ssh, the place where it has to be is named."""
    (bench.tree / ".env").unlink()
    assert "no file .env is here" in bench.deploy(code=1)
    (bench.server / ".env").unlink()
    told = bench.deploy("--host", "ops@gate", "--dir", str(bench.server), code=1)
    assert f"no file .env is in ops@gate:{bench.server}" in told
    assert bench.log() == []


def test_a_server_that_cannot_be_reached_is_told(bench: Bench) -> None:
    """That is another fault than a missing file."""
    assert "no command can be run in ops@unreachable" in bench.deploy("--host", "ops@unreachable", code=1)
    told = bench.deploy("--host", "ops@gate", "--dir", str(bench.server / "missing"), code=1)
    assert "is the directory there?" in told


def test_two_deployments_at_once_are_one_too_many(bench: Bench) -> None:
    """What another one left, or is just using, is not touched."""
    (bench.tree / ".env.before").write_text(SETTINGS)
    assert "a deployment runs, or one was cut off" in bench.deploy(code=1)
    assert bench.log() == []


@pytest.mark.parametrize("arguments", [["--hots", "x"], ["--host"], ["--dir", "/x"], ["--host", "-oProxyCommand=x"],
                                       ["--tag", "x", "--dirty"], ["--tag", "a b"]])  # fmt: skip
def test_wrong_usage_is_exit_code_2(bench: Bench, arguments: list[str]) -> None:
    """With a hint, and before anything is looked at."""
    assert "see --help" in bench.deploy(*arguments, code=2)


def test_help_names_every_option(bench: Bench) -> None:
    """And nothing of the code."""
    told = bench.deploy("--help")
    script = (ROOT / "deploy.sh").read_text()
    options = set(re.findall(r"--[a-z-]+(?=[ |)])", re.search(r"parse\(\) \{.*?\n\}", script, re.DOTALL)[0]))  # type: ignore[index]
    assert options >= {"--host", "--dry-run", "--rollback"}
    assert not [option for option in options if option not in told]
    assert "set -e" not in told


@pytest.mark.parametrize(
    ("at", "left", "word"), [("scale app=2 app", 0, "still runs"), ("remove-orphans", 1, "runs and is")]
)
def test_a_signal_leaves_a_state_that_is_named(bench: Bench, at: str, left: int, word: str) -> None:
    """Before the switch the old are left, after it the new; nothing of the other, and the next deployment may begin."""
    bench.deploy()
    bench.tags.append(bench.commit("second"))
    bench.fail(**{at: f"hang {bench.tags[1]}"})
    (bench.home / "log").write_text("")
    command = [str(bench.tree / "deploy.sh")]
    # A session of its own, so that the signal goes to all of it, as from a terminal. A shell cannot trap a signal that
    # was ignored when it started, as it is in the background jobs of a script.
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=bench.environment(), start_new_session=True, preexec_fn=heed_signals)  # fmt: skip
    deadline = time.monotonic() + 30
    while at not in (bench.home / "log").read_text():
        assert time.monotonic() < deadline, "it did not get there"
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    told = running.communicate(timeout=30)[0]
    assert running.returncode == 130, told
    assert "stopped by SIGINT" in told
    assert word in told
    assert bench.apps() == [bench.tags[left]]
    assert bench.lines()["TAG"] == bench.tags[left]
    assert not (bench.tree / ".env.before").exists()


async def test_the_probe_asks_a_real_gateway_with_its_own_key(start: StartGateway) -> None:
    """What deploy.sh runs in a container answers for a gateway with keys, and prints a status and nothing more."""
    live = await start(api_keys=f"me:{SECRETS[2]}")
    script = (ROOT / "deploy.sh").read_text()
    found = re.search(r"^PROBE='(.*?)'$", script, re.DOTALL | re.MULTILINE)
    assert found is not None
    probe = found[1].replace("http://127.0.0.1:8000", live.url)

    async def ask(path: str, keys: str) -> tuple[int, str]:
        command = [sys.executable, "-c", probe, path]
        environment = os.environ | {"API_KEYS": keys, "HTTP_PROXY": "http://127.0.0.1:9"}
        ended = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
        )
        return ended.returncode, ended.stdout + ended.stderr

    assert await ask("/health/ready", "") == (0, "200\n")
    assert await ask("/ticker/BTC-USDT", f"me:{SECRETS[2]}") == (0, "200\n")
    assert await ask("/ticker/BTC-USDT", "me:wrong-key") == (1, "HTTP Error 401: Unauthorized\n")
    assert await ask("/ticker/BTC-USDT", "short") == (1, "ConfigError\n")


def scripts() -> list[Path]:
    """Every shell script of the project."""
    found = [path for path in ROOT.rglob("*.sh") if ".venv" not in path.parts]
    return [*sorted(found), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    """Every shell script of the project is clean."""
    command = [tool("shellcheck", "shellcheck"), str(script)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
