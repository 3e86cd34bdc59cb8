"""What is installed with bridgekit: pinned, from the packages that are meant, and nothing that is a stranger's."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = sorted([ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")])
LOCKS = {"requirements-clap.lock" if "clap" in project.parent.name else "requirements.lock" for project in PROJECTS}
#: Not pinned: its build depends on the machine.
BY_RANGE = {"torch", "torchvision"}
#: Vulnerabilities that would break a promise of docs/PROMISES.md: package, first version without it, and what it allowed.
VULNERABILITIES = {
    "CVE-2025-32434": ("torch", "2.6", "code in a checkpoint that is read with weights_only"),
    "CVE-2026-24747": ("torch", "2.10", "code in a checkpoint that is read with weights_only"),
    "CVE-2026-44513": ("diffusers", "0.38", "code in a model's folder without trust_remote_code"),
    "CVE-2026-4372": ("transformers", "5.3", "code of a kernel that a model's config names"),
    "CVE-2026-5241": ("transformers", "5.5", "trust_remote_code in a model's own config"),
    "CVE-2024-47874": ("starlette", "0.40", "form fields without a limit on their size"),
    "CVE-2025-62727": ("starlette", "0.49.1", "a Range header that takes quadratic time"),
    "CVE-2026-48710": ("starlette", "1.0.1", "a Host header that changes the path"),
    "CVE-2026-54283": ("starlette", "1.3.1", "URL-encoded forms without limits"),
    "CVE-2026-42561": ("python-multipart", "0.0.27", "headers of a part without a limit"),
    "GHSA-v9pg-7xvm-68hf": ("python-multipart", "0.0.31", "a whole body in memory"),
}


def asked(project: Path) -> list[tuple[str, str]]:
    """What a pyproject.toml asks for, extras and build among it: packages with their specifiers, as in `>=2.40,<2.64`."""
    lists = re.findall(r'^[\w-]+ = \[((?:[^\]"]|"[^"]*")*)\]', project.read_text(encoding="utf-8"), re.MULTILINE)
    strings = [string for found in lists for string in re.findall(r'"([^"]*)"', re.sub(r"#.*", "", found))]
    matches = [re.fullmatch(r"([A-Za-z][\w-]*)(?:\[[\w,]+\])?([<>=]=?.*)", string) for string in strings]
    return [(match.group(1).lower().replace("_", "-"), match.group(2)) for match in matches if match]


def requirements(project: Path) -> set[str]:
    """The names of the packages that a pyproject.toml asks for, extras and build among them."""
    return {name for name, _ in asked(project)}


def floors() -> list[tuple[str, str, str]]:
    """The folder of each project, a package that it asks for, and the lowest version of it that it accepts."""
    return [
        (project.parent.name, name, specifier.split(",")[0].lstrip("<>="))
        for project in PROJECTS
        for name, specifier in asked(project)
    ]


def numbers(version: str) -> list[int]:
    """A version to compare: 2.10 is after 2.9, and 1 is 1.0."""
    parts = [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]
    return parts + [0] * (4 - len(parts))


def test_the_reader_of_this_test_finds_requirements() -> None:
    assert {"torch", "pluggy", "ruff", "setuptools", "diffusers"} <= requirements(ROOT / "pyproject.toml")


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.parent.name)
def test_nothing_requires_the_unrelated_pypi_package_bridgekit(project: Path) -> None:
    assert {name for name in requirements(project) if name.startswith("bridgekit")} <= {"bridgekit-core"}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.parent.name)
def test_every_requirement_is_pinned_in_the_lock(project: Path) -> None:
    lock = ROOT / ("requirements-clap.lock" if "clap" in project.parent.name else "requirements.lock")
    pinned = set(re.findall(r"^([\w.-]+)==", lock.read_text(encoding="utf-8"), re.MULTILINE))
    others = {"bridgekit-core", "faster-whisper", "open-clip-torch", "sentence-transformers", "setuptools"}
    assert requirements(project) - BY_RANGE - others <= pinned | {
        "protobuf",
        "sentencepiece",
    }


@pytest.mark.parametrize("lock", sorted(LOCKS))
def test_a_lock_pins_no_build_of_torch(lock: str) -> None:
    assert not re.search(r"^(torch(vision)?=|nvidia-|cuda-|triton)", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("vulnerability", VULNERABILITIES)
def test_no_version_that_is_accepted_has_a_vulnerability_that_breaks_a_promise(vulnerability: str) -> None:
    package, safe, allowed = VULNERABILITIES[vulnerability]
    accepted = {project: floor for project, name, floor in floors() if name == package}
    assert accepted, f"nothing asks for {package}"
    low = {project: floor for project, floor in accepted.items() if numbers(floor) < numbers(safe)}
    assert not low, f"before {safe}, {package} has {vulnerability} ({allowed})"


@pytest.mark.skipif(os.environ.get("BRIDGEKIT_FLOORS") != "yes", reason="make floors installs the lowest versions")
def test_every_floor_is_the_version_that_is_installed() -> None:
    elsewhere = {"mkdocs", "mkdocs-material", "faster-whisper", "open-clip-torch", "sentence-transformers", "setuptools"}
    installed = {
        (project, name, floor): version(name)
        for project, name, floor in floors()
        if project != "bridgekit-clap" and name not in elsewhere and not name.startswith("bridgekit")
    }
    untested = {key: found for key, found in installed.items() if numbers(found) != numbers(key[2])}
    assert not untested, "lower floors than these versions are promised, but not tested"


def test_no_message_and_no_page_sends_anyone_to_pypi_for_bridgekit() -> None:
    files = [file for folder in ("bridgekit", "plugins", "docs", "examples") for file in (ROOT / folder).rglob("*")]
    for file in [*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        if file.suffix in (".py", ".md", ".toml") and file.is_file():
            wrong = re.findall(r"pip install (?:[-\w=]+ )*['\"]?bridgekit(?!-core).*", file.read_text(encoding="utf-8"))
            assert not wrong, f"{file}: {wrong}"
