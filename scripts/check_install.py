"""Reports what the running Python environment lacks. Standard library only, so that it runs in a new environment.

``check_install.py missing GROUP=NEED ...`` prints one line ``GROUP<TAB>reason`` per unmet need, nothing if all are met.
A need is a requirement (``torch==2.13.0``), ``@FILE`` (every line of a requirements file), ``editable:NAME:DIR`` (the
distribution NAME is installed from DIR), ``linked:NAME:DIR`` (NAME.pth puts DIR on the import path) or
``checkout:DIR:COMMIT`` (DIR is a git checkout of COMMIT).

``check_install.py report NAME ...`` prints the installed ones of the named distributions with their versions.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

try:
    from packaging.requirements import Requirement
except ImportError:  # a new environment has only pip, which vendors a copy
    from pip._vendor.packaging.requirements import Requirement


def unmet_requirement(text: str) -> str | None:
    """The reason why the requirement ``text`` is not met, or None."""
    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} is {version}, required {requirement.specifier}"


def unmet_editable(name: str, directory: Path) -> str | None:
    """The reason why ``name`` is not installed from ``directory`` with its current entry points, or None."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    source = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
    if Path(unquote(urlparse(source).path)) != directory:
        return f"{name} is installed from {source or 'elsewhere'}, not from {directory}"
    scripts = Path(sysconfig.get_path("scripts"))
    for entry_point in distribution.entry_points:
        if entry_point.group == "console_scripts" and not (scripts / entry_point.name).exists():
            return f"the command {entry_point.name} is not in {scripts}"
    return None


def unmet_link(name: str, directory: Path) -> str | None:
    """The reason why ``name``.pth does not put ``directory`` on the import path, or None."""
    link = Path(sysconfig.get_path("purelib")) / f"{name}.pth"
    if link.is_file() and Path(link.read_text().strip()) == directory:
        return None
    return f"{name} is not on the import path"


def unmet_checkout(directory: Path, commit: str) -> str | None:
    """The reason why ``directory`` is not a detached git checkout of ``commit``, or None."""
    head = directory / ".git" / "HEAD"
    if not head.is_file():
        return f"{directory} is not checked out"
    found = head.read_text().strip()
    return None if found.startswith(commit.lower()) else f"{directory} is at {found[:12]}, required {commit[:12]}"


def reasons(need: str) -> Iterator[str]:
    """The reasons why ``need`` is not met; none if it is.

    Raises:
        ValueError: if ``need`` cannot be parsed.
    """
    kind, _, rest = need.partition(":")
    found: list[str | None]
    if need.startswith("@"):
        lines = (line.split("#")[0].strip() for line in Path(need[1:]).read_text(encoding="utf-8").splitlines())
        found = [unmet_requirement(line) for line in lines if line]
    elif kind in ("editable", "linked", "checkout"):
        first, _, second = rest.partition(":")
        if kind == "checkout":
            found = [unmet_checkout(Path(first), second)]
        else:
            check = unmet_editable if kind == "editable" else unmet_link
            found = [check(first, Path(second).resolve())]
    else:
        found = [unmet_requirement(need)]
    yield from (reason for reason in found if reason)


def main(arguments: list[str]) -> int:
    """Run ``missing`` or ``report``; the exit status is 0 unless the arguments cannot be parsed."""
    command, *rest = arguments or [""]
    if command == "missing":
        for item in rest:
            group, _, need = item.partition("=")
            for reason in reasons(need):
                print(f"{group}\t{reason}")
    elif command == "report":
        for name in rest:
            try:
                print(f"  {name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:
                continue
    else:
        print(f"check_install.py: unknown command {command!r}; use missing or report", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
