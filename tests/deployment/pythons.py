"""Run `make demo` and `make test` of the committed code on new Debian systems with their Python.

A system is a chroot with a minimal Debian, python3, python3-venv, make, git and ca-certificates.
Systems are kept for the next run. Mounts and processes are in namespaces that end with the run.
`make test-pythons` runs this script. It needs root, debootstrap, git and unshare.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
CHROOTS = CACHE / "virtuoso" / "chroots"
PACKAGE_CACHES = ("pip", "virtuoso/wheels")  # cache folders that systems share with the host
SUITES = ["trixie", "forky"]  # Python 3.13, and the newest Python of Debian
PACKAGES = "python3,python3-venv,make,git,ca-certificates"
SCRIPTS = Path("/usr/share/debootstrap/scripts")
CLONE = "/root/virtuoso"
# Files of the host for access to the package index: name server, pip configuration, certificates.
NETWORK_FILES = (
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/pip.conf",
    "/etc/xdg/pip",
    "/etc/ssl/certs/ca-certificates.crt",
)
# Passed in upper and lower case, together with all variables that start with PIP_.
NETWORK_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
# Ports of the demo, which uses the network of the host.
PORT = 18000
SANDBOX_PORT = 19100
ANSWER_SECONDS = 30
READY_SECONDS = 300  # start of the demo, including its installation and downloads


def main() -> int:
    """Run demo and tests on each system. Returns 1 if any of them failed."""
    parser = argparse.ArgumentParser(description="Run demo and tests on new Debian systems.")
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", default=SUITES, help="Debian release, such as trixie"
    )
    parser.add_argument("--mirror", default="http://deb.debian.org/debian")
    parser.add_argument(
        "--tests",
        default="",
        help="arguments for pytest, to run these tests instead of `make test`",
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        run_demo()
        return run_tests(shlex.split(options.tests))
    if os.geteuid() != 0:
        sys.exit("this script must run as root, because it uses chroot and mount")
    failed = []
    for suite in options.suites:
        system = install(suite, options.mirror)
        prepare(system)
        if (code := enter(system, options.tests)) != 0:
            failed.append(f"{suite} (exit code {code})")
    print(f"failed on: {', '.join(failed)}" if failed else "passed on all systems")
    return int(bool(failed))


def install(suite: str, mirror: str) -> Path:
    """Install a Debian release unless it exists. Returns its folder."""
    system = CHROOTS / suite
    if not system.exists():
        print(f"{suite}: installing Debian into {system}", flush=True)
        unfinished = system.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        # debootstrap has no script for releases newer than itself; the script of sid is the same.
        script = next(SCRIPTS / name for name in (suite, "sid") if (SCRIPTS / name).exists())
        command = [
            "debootstrap",
            "--variant=minbase",
            f"--include={PACKAGES}",
            suite,
            str(unfinished),
            mirror,
            str(script),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        unfinished.rename(system)
    return system


def prepare(system: Path) -> None:
    """Clone the checkout into a system and copy the network configuration of the host."""
    clone = system / CLONE[1:]
    shutil.rmtree(clone, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    sources = {path: path for path in NETWORK_FILES}
    sources[f"{Path.home()}/.config/pip"] = "/root/.config/pip"
    for path, target in ((Path(source), system / target[1:]) for source, target in sources.items()):
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        elif path.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            shutil.copy(path, target)


def enter(system: Path, tests: str) -> int:
    """Run this script in a system with its own namespaces. Returns the exit code."""
    caches = {CACHE / name: system / "root" / ".cache" / name for name in PACKAGE_CACHES}
    for folder in (*caches, *caches.values()):
        folder.mkdir(parents=True, exist_ok=True)
    inside = f'cd {CLONE} && python3 -m tests.deployment.pythons --inside "$0"'
    script = [
        f"mount -t proc proc {system}/proc",
        f"mount --rbind /dev {system}/dev",
        *(f"mount --bind {source} {target}" for source, target in caches.items()),
        f"chroot {system} sh -c '{inside}' \"$1\"",
    ]
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec"]
    command += ["\n".join(script), "sh", f"--tests={tests}"]
    network = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PIP_") or name.upper() in NETWORK_VARIABLES
    }
    environment = {
        "HOME": "/root",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.run(command, env=environment | network, check=False).returncode


def run_demo() -> None:
    """Start the demo, request a price from it, and stop it with the signal of Ctrl-C."""
    began = time.monotonic()
    command = ["make", "demo", f"PORT={PORT}", f"SANDBOX_PORT={SANDBOX_PORT}"]
    demo = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert demo.stdout is not None
    watchdog = threading.Timer(READY_SECONDS, os.killpg, (demo.pid, signal.SIGKILL))
    watchdog.start()
    url = None
    while url is None:
        line = demo.stdout.readline()
        print(line, end="", flush=True)
        if not line:
            watchdog.cancel()
            sys.exit("make demo ended before it was ready")
        url = line.split()[-1] if "curl -i" in line else None
    watchdog.cancel()
    seconds = time.monotonic() - began
    print(f"make demo was ready after {seconds:.0f} s with Python {sys.version.split()[0]}")
    with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
        print(f"GET {url}: {answer.status}", flush=True)  # other statuses raise an error
    os.killpg(demo.pid, signal.SIGINT)
    demo.communicate(timeout=ANSWER_SECONDS)


def run_tests(arguments: list[str]) -> int:
    """Run `make test`, or pytest with these arguments. Returns the exit code."""
    if not arguments:
        return subprocess.run(["make", "test"], check=False).returncode
    subprocess.run(["make", ".venv/.dev"], check=True)
    return subprocess.run([".venv/bin/pytest", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
