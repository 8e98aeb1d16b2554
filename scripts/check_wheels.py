"""Checks that the package index has a wheel for everything that scripts/install.sh would install.

``python scripts/check_wheels.py npu cpu`` takes install.sh's plans for these devices, on x86 and arm, and looks up
every package and its dependencies for Python 3.10 and 3.11. Installs nothing; most packages need only their metadata.
Takes minutes and needs the index, so it is not part of the tests. Exits with 1 if a wheel is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
MACHINES = {"x86": "x86_64", "arm": "aarch64"}
PYTHONS = ("3.10", "3.11")
SHOWN = ("torch", "torch-npu", "megatron-core", "transformers", "numpy")
# tags that a system with glibc 2.28 or later accepts
MANYLINUX = (*(f"_2_{minor}" for minor in range(28, 4, -1)), "2014", "2010", "1")


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to install on."""

    python: str
    arch: str

    @property
    def options(self) -> list[str]:
        """pip options for it."""
        machine = MACHINES[self.arch]
        platforms = [f"manylinux{glibc}_{machine}" for glibc in MANYLINUX] + [f"linux_{machine}"]
        words = [word for platform in platforms for word in ("--platform", platform)]
        return ["--only-binary=:all:", "--implementation", "cp", "--python-version", self.python, *words]

    def applies(self, requirement: Requirement) -> bool:
        """Whether the requirement's marker holds on this machine."""
        environment = default_environment() | {
            "python_version": self.python, "python_full_version": f"{self.python}.0", "sys_platform": "linux",
            "platform_system": "Linux", "platform_machine": MACHINES[self.arch], "extra": "",
        }  # fmt: skip
        return requirement.marker is None or requirement.marker.evaluate(environment)


def plan(arch: str, device: str) -> tuple[list[str], list[tuple[str, bool]]]:
    """(lines of the constraints file, requirements with whether their dependencies are installed too)."""
    with tempfile.TemporaryDirectory() as directory:
        command = ["bash", "scripts/install.sh", "--arch", arch, "--device", device, "--dry-run", "--dev",
                   "--python", sys.executable, "--venv", str(Path(directory, "env"))]  # fmt: skip
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr.strip())
    constraints: list[str] = []
    requirements: list[tuple[str, bool]] = []
    for line in result.stdout.splitlines():
        words = shlex.split(re.sub(r"^ *\d+\. \[[^]]*\] ", "", line)) if re.match(r" *\d+\. ", line) else []
        if words[:1] == ["printf"] and "install-constraints.txt" in line:
            constraints = words[2 : words.index(">")]
        elif "pip" in words and "--editable" not in words:
            rest = words[words.index("--constraint") + 2 :]
            requirements += [(text, "--no-deps" not in rest) for text in _named(rest)]
    return constraints, requirements


def _named(words: list[str]) -> Iterator[str]:
    """The requirements among pip's arguments, requirements files included."""
    words = [word for word in words if word != "--no-deps"]
    while words:
        word = words.pop(0)
        if word == "-r":
            lines = (ROOT / words.pop(0)).read_text(encoding="utf-8").splitlines()
            yield from (text for line in lines if (text := line.split("#")[0].strip()))
        else:
            yield word


def look_up(requirements: Iterable[str], target: Target, constraints: Path) -> list[dict]:
    """The wheels pip selects for the requirements, without dependencies: entries of its report.

    Raises:
        LookupError: with pip's last line, if one of them has no wheel.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed",
                   "--target", directory, "--report", str(report), "--constraint", str(constraints), *target.options,
                   *requirements]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: No matching")]
            raise LookupError((errors or result.stderr.strip().splitlines() or ["pip failed"])[-1])
        return json.loads(report.read_text())["install"]


def check(target: Target, device: str) -> tuple[dict[str, str], dict[str, str]]:
    """(wheel of each package, reason for each package without one)."""
    constraints, requirements = plan(target.arch, device)
    found: dict[str, str] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "constraints.txt")
        path.write_text("\n".join(constraints))
        level = {text: follow for text, follow in requirements if target.applies(Requirement(text))}
        while level:
            try:
                entries = look_up(level, target, path)
            except LookupError:
                entries = []
                for text in level:  # one by one, to name the missing ones
                    try:
                        entries += look_up([text], target, path)
                    except LookupError as error:
                        missing[text] = str(error)
            follow = {_key(Requirement(text).name): with_them for text, with_them in level.items()}
            level = {}
            for entry in entries:
                name = _key(entry["metadata"]["name"])
                found[name] = entry["download_info"]["url"].rsplit("/", 1)[-1]
                for line in entry["metadata"].get("requires_dist", []) if follow[name] else []:
                    requirement = Requirement(line)
                    if target.applies(requirement) and _key(requirement.name) not in {*found, *map(_key, level)}:
                        level[f"{requirement.name}{requirement.specifier}"] = True
            level = {text: flag for text, flag in level.items() if _key(Requirement(text).name) not in found}
    return found, missing


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", name)[0]).lower()


def main() -> int:
    """Print the wheels found and missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="+", metavar="DEVICE", help="value of install.sh --device")
    parser.add_argument("--verbose", action="store_true", help="list every wheel")
    options = parser.parse_args()
    status = 0
    for device in options.devices:
        for arch in MACHINES:
            for python in PYTHONS:
                found, missing = check(Target(python, arch), device)
                named = [found[name] for name in SHOWN if name in found]
                print(f"{device}, {arch}, Python {python}: {len(found)} wheels, {len(missing)} missing")
                print("  " + "\n  ".join(sorted(found.values()) if options.verbose else named), flush=True)
                for text, reason in missing.items():
                    status = 1
                    print(f"  missing: {text}: {reason}")
    return status


if __name__ == "__main__":
    sys.exit(main())
