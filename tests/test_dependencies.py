"""Tests of the requirements files: complete, consistent and documented for every Python."""

import re
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FILES = ("requirements.txt", "requirements-demo.txt", "requirements-dev.txt")
PYTHONS = ("3.11.2", "3.11.9", "3.12.0", "3.13.0", "3.14.0")  # Debian 12 has 3.11.2
SYSTEMS = {"Linux": "linux", "Darwin": "darwin"}  # platform_system and sys_platform
TRANSITIVE = "# Required by the package"  # comment above the packages that others require

Pins = dict[str, Requirement]
Environment = dict[str, str]
HERE: Environment = {name: str(value) for name, value in default_environment().items()}


def parse(text: str) -> Pins:
    """Map the normalized name of each package to its line."""
    lines = [
        Requirement(line.strip()) for line in re.findall(r"^[A-Za-z][^#\n]*", text, re.MULTILINE)
    ]
    return {canonicalize_name(line.name): line for line in lines}


def direct(file: str) -> Pins:
    """Return the packages that the project itself uses."""
    return parse((ROOT / file).read_text().partition(TRANSITIVE)[0])


def installed_by(file: str) -> Pins:
    """Return all packages that a file installs, with those of the files it includes."""
    text = (ROOT / file).read_text()
    included = [installed_by(other) for other in re.findall(r"^-r (\S+)$", text, re.MULTILINE)]
    return parse(text) | dict(chain.from_iterable(pins.items() for pins in included))


def environment(python: str, system: str) -> Environment:
    """Return the values of environment markers on another Python or system."""
    version = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    return HERE | version | {"platform_system": system, "sys_platform": SYSTEMS[system]}


def applies(requirement: Requirement, values: Environment, extra: str = "") -> bool:
    """Return True if a requirement applies in an environment."""
    return requirement.marker is None or requirement.marker.evaluate(values | {"extra": extra})


def required_by(pins: Pins, values: Environment) -> list[tuple[str, Requirement]]:
    """Return the requirements of all packages, each with the name of the package that has it.

    The requirements come from the metadata of the installed packages, so packages for other Python
    versions are left out.
    """
    waiting = [
        (name, "") for name, pin in pins.items() if applies(pin, values) and applies(pin, HERE)
    ]
    seen = set(waiting)
    found = []
    while waiting:
        name, extra = waiting.pop()
        requirements = [Requirement(text) for text in metadata.requires(name) or []]
        active = [
            requirement for requirement in requirements if applies(requirement, values, extra)
        ]
        found += [(name, requirement) for requirement in active]
        extras = {
            (canonicalize_name(other.name), extra) for other in active for extra in other.extras
        } - seen
        seen |= extras
        waiting += extras
    return found


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("file", FILES)
def test_all_requirements_are_pinned_to_matching_versions(
    file: str, python: str, system: str
) -> None:
    """`pip install --no-deps -r` of each file installs every required package."""
    pins = installed_by(file)
    values = environment(python, system)
    unmet = []
    for name, requirement in required_by(pins, values):
        pin = pins.get(canonicalize_name(requirement.name))
        version = next(iter(pin.specifier)).version if pin and applies(pin, values) else None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{name} requires {requirement}; pinned: {version}")
    assert not unmet


def test_every_line_pins_one_version() -> None:
    """Each line has the form name==version."""
    pins = installed_by(FILES[-1])
    assert len(pins) > 50
    assert not [
        str(pin) for pin in pins.values() if [part.operator for part in pin.specifier] != ["=="]
    ]


def test_pinned_versions_are_installed() -> None:
    """If this fails, run `make test`, which updates the environment."""
    pins = {name: pin for name, pin in installed_by(FILES[-1]).items() if applies(pin, HERE)}
    assert {name: metadata.version(name) for name in pins} == {
        name: next(iter(pin.specifier)).version for name, pin in pins.items()
    }


def test_no_superfluous_package_is_pinned() -> None:
    """Each package in the second part of a file is required by another package."""
    pins = installed_by(FILES[-1])
    pairs = [pair for python in PYTHONS for pair in required_by(pins, environment(python, "Linux"))]
    required = {canonicalize_name(requirement.name) for _, requirement in pairs}
    used = required.union(*(direct(file) for file in FILES))
    assert set(pins) <= used


def test_direct_requirements_are_documented() -> None:
    """docs/dependencies.md has one row per direct package, in the order of the files."""
    table = (ROOT / "docs" / "dependencies.md").read_text().partition("## Packages\n")[2]
    rows = re.findall(
        r"^\| `([\w.-]+)` \| [^|]+ \| \d{4}-\d{2} \| (?:any|each) \| [^|]+ \|$", table, re.MULTILINE
    )
    used = [name for file in FILES for name in direct(file)]
    assert rows == used


def test_compiled_packages_are_documented() -> None:
    """A new Python version may lack a wheel for these packages."""
    table = (
        (ROOT / "docs" / "dependencies.md")
        .read_text()
        .partition("## Compiled packages")[2]
        .partition("\n## ")[0]
    )
    documented = re.findall(r"^\| `([\w.-]+)` \| [^|]+ \| \d{4}-\d{2} \|$", table, re.MULTILINE)
    used = {name for file in FILES for name in direct(file)}
    others = [
        name
        for name, pin in installed_by(FILES[-1]).items()
        if name not in used and applies(pin, HERE)
    ]
    wheels = {name: metadata.distribution(name).read_text("WHEEL") or "" for name in others}
    compiled = {name for name, wheel in wheels.items() if "Root-Is-Purelib: false" in wheel}
    assert compiled <= set(documented)
    assert documented == sorted(documented)
    assert compiled >= set(documented) - {"coincurve"}
