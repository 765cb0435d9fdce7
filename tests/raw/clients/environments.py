"""Install the clients in environments of their own, in the user's cache folder.

Each Python client has a file of pinned packages here and an environment with only these packages.
The name of the environment's folder has a hash of the file, so that it is created once, and changed
pins create a new one. Wheels are kept in the folder that the Makefile uses. Only the first
installation needs a network.

`python -m tests.raw.clients.environments` creates all environments and prints times and sizes.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "virtuoso"
WHEELS = CACHE / "wheels"
PYTHON_CLIENTS = ("ccxt", "python-binance", "pybit", "python-kraken-sdk", "freqtrade")
BUILT_PACKAGES = "sdnotify"
"""Packages of which PyPI has no wheel."""
Command = Sequence[str | Path]
LIMIT_SECONDS = 540
"""Timeout of one command, on a busy machine."""
DIGITS = 12
"""Digits of the hash in the name of a folder."""


class InstallError(Exception):
    """A client could not be installed. The message has the end of the command's output."""


def python_of(client: str) -> Path:
    """Return the Python of a client's environment, which is created if it does not exist."""
    pins = HERE / f"{client}.txt"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = installed(f"{client}-{version}", pins, lambda path: create_environment(path, pins))
    return folder / "bin" / "python"


def npm_folder() -> Path:
    """Return the folder with the packages of `package-lock.json` in `node_modules`."""
    return installed("npm", HERE / "package-lock.json", install_npm)


def installed(name: str, pins: Path, install: Callable[[Path], None]) -> Path:
    """Return the folder of a name and the pins in a file. Install them if that was not done."""
    digest = sha256(pins.read_bytes()).hexdigest()[:DIGITS]
    folder = CACHE / "clients" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other pytest workers wait
        complete = folder / "complete"
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            install(folder)
            complete.touch()
    return folder


def create_environment(folder: Path, pins: Path) -> None:
    """Create a virtual environment without pip, and install packages from the wheel cache.

    Packages are not compiled, because a test imports few of them. `--no-deps`: the file pins all
    packages.
    """
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    pip: Command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "--python", folder / "bin" / "python", "install", "--no-index"]
    install += ["--find-links", WHEELS, "--no-deps", "--no-compile", "--requirement", pins]
    try:
        run(install)
    except InstallError:
        download = [*pip, "wheel", "--only-binary", ":all:", "--no-binary", BUILT_PACKAGES]
        run([*download, "--no-deps", "--wheel-dir", WHEELS, "--requirement", pins])
        run(install)


def install_npm(folder: Path) -> None:
    """Install the npm packages without running their scripts."""
    folder.mkdir()
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder)
    npm = shutil.which("npm")
    if npm is None:
        message = "npm is not installed (Debian: npm)"
        raise InstallError(message)
    options = ["--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
    run([npm, "ci", "--prefix", folder, *options])


def run(command: Command) -> None:
    """Run a command. Raise `InstallError` if it fails."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    if done.returncode:
        message = f"{' '.join(map(str, command))}: {(done.stdout + done.stderr)[-500:]}"
        raise InstallError(message)


def main() -> None:
    """Create all environments, and print how long each took and its size."""
    for name in ("npm", *PYTHON_CLIENTS):
        begin = time.monotonic()
        folder = npm_folder() if name == "npm" else python_of(name).parents[1]
        size = sum(file.lstat().st_size for file in folder.rglob("*")) / 1e6
        print(f"{name:18} {time.monotonic() - begin:6.1f} s {size:6.0f} MB  {folder}")


if __name__ == "__main__":
    main()
