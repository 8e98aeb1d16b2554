"""``mm-convert check_hf``: what a Hugging Face directory lacks, and for which program.

Only small files and the headers of safetensors files are read, so the time does not grow with the weights. The
requirements were established by reading the programs' sources and, for transformers, by loading damaged directories;
docs/handover.md has the versions.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.check_hf.adapter import check_adapter
from mindspeed_mm.checkpoint.check_hf.assets import check_assets
from mindspeed_mm.checkpoint.check_hf.consumers import READ, TITLES, Finding, chosen, titles
from mindspeed_mm.checkpoint.check_hf.model import check_model
from mindspeed_mm.checkpoint.directory import (
    ADAPTER,
    ADAPTER_CONFIG,
    BEST,
    BEST_TRACKER,
    METADATA,
    TRACKER,
    find_checkpoint,
    is_adapter_directory,
    named_checkpoint,
)
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_directory, is_present, read_json, shorten
from mindspeed_mm.models.spec import ModelSpec

__all__ = ["Report", "check_hf", "lacking_assets"]


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of :func:`check_hf`.

    Attributes:
        directory: that was checked.
        content: what it holds, in a line.
        consumers: that were asked for.
        findings: all, those of other consumers too.
        seconds: that the check took.
    """

    directory: Path
    content: str
    consumers: tuple[str, ...]
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def ready(self) -> bool:
        """Whether all the consumers that were asked for can use the directory."""
        return not any(finding.blocks & set(self.consumers) for finding in self.findings)

    def missing(self, consumer: str) -> list[Finding]:
        """What keeps a consumer from using the directory."""
        return [finding for finding in self.findings if consumer in finding.blocks]

    def notes(self, consumer: str) -> list[Finding]:
        """What the user of a consumer should know."""
        return [finding for finding in self.findings if consumer in finding.notes]

    def verdict(self, consumer: str) -> str:
        """``ready``, ``ready, 1 note``, or ``missing: tokenizer, weights``."""
        if missing := self.missing(consumer):
            return f"missing: {', '.join(dict.fromkeys(finding.topic for finding in missing))}"
        count = len(self.notes(consumer))
        return "ready" + (f", {count} note{'s' * (count > 1)}" if count else "")

    def text(self) -> str:
        """The table, and below it each finding with its remedy."""
        width = max(len(TITLES[name]) for name in TITLES)
        lines = [f"{self.directory}: {self.content} ({self.seconds:.1f} s)", ""]
        lines += [f"{'consumer':<{width}}  {'as of':<10}  verdict"]
        lines += [f"{TITLES[name]:<{width}}  {READ[name]:<10}  {self.verdict(name)}" for name in self.consumers]
        wanted = set(self.consumers)
        missing = [finding for finding in self.findings if finding.blocks & wanted]
        notes = [finding for finding in self.findings if finding.notes & wanted and finding not in missing]
        for heading, findings in (("missing", missing), ("notes", notes)):
            lines += ["", heading] if findings else []
            for finding in findings:
                names = titles((finding.blocks or finding.notes) & wanted)
                if finding in missing and finding.notes & wanted:
                    names += f"; note for {titles(finding.notes & wanted)}"
                lines += [f"  {finding.topic} ({names}): {finding.problem}", f"    -> {finding.remedy}"]
        return "\n".join(lines)

    def json(self) -> str:
        """The same for programs."""

        def as_object(finding: Finding) -> dict[str, Any]:
            return {"topic": finding.topic, "problem": finding.problem, "remedy": finding.remedy}

        consumers = {
            name: {
                "ready": not self.missing(name),
                "as_of": READ[name],
                "missing": [as_object(finding) for finding in self.missing(name)],
                "notes": [as_object(finding) for finding in self.notes(name)],
            }
            for name in self.consumers
        }
        content = {"directory": str(self.directory), "content": self.content, "ready": self.ready,
                   "consumers": consumers}
        return json.dumps(content, indent=2, ensure_ascii=False)


def check_hf(directory: str | Path, *, consumers: Collection[str] = (), checksums: bool = False) -> Report:
    """Check a model directory, or a directory of LoRA adapters.

    Args:
        directory: to check; of a LoRA run's checkpoint, the adapters inside are checked.
        consumers: keys of ``consumers.TITLES``, or ``transformers`` for both generations; all if empty.
        checksums: also read all files that the exporter has recorded, and compare their checksums.

    Raises:
        UserError: if the directory is none of these, or an unknown consumer is named.
    """
    wanted, began, path = chosen(consumers), time.monotonic(), named_checkpoint(Path(directory))
    if path.name == BEST and not is_present(path) and is_directory(path.parent):
        raise UserError(f"--dir {shorten(path)}: {path.parent} has no {BEST_TRACKER}, which names the best checkpoint; "
                        "train with --keep-best, or name a Hugging Face directory")
    if not path.is_dir():
        raise UserError(f"--dir {shorten(path)} is not a directory; name a Hugging Face directory")
    path = _checkpoint(path)
    if is_present(path / ADAPTER / ADAPTER_CONFIG) and not is_present(path / "config.json"):
        path = path / ADAPTER
    if is_adapter_directory(path):
        content, findings = check_adapter(path)
    else:
        _refuse_checkpoint(path)
        content, findings = check_model(path, checksums=checksums)
    return Report(path, content, wanted, tuple(findings), time.monotonic() - began)


def _checkpoint(path: Path) -> Path:
    """The checkpoint that the tracker file of a ``--save`` directory names; other directories as they are."""
    named = is_present(path / TRACKER) and not is_present(path / "config.json")
    return find_checkpoint(path, "--dir") if named else path


def _refuse_checkpoint(path: Path) -> None:
    """Name the command that makes a Hugging Face directory of a checkpoint."""
    if not is_present(path / "config.json") and is_present(path / METADATA):
        raise UserError(
            f"--dir {path} is a distributed checkpoint; export it with mm-convert ... dcp_to_hf --load_dir {path} "
            "--save_dir DIR --model_assets_dir HF_DIR, then check that DIR"
        )


def lacking_assets(path: Path, spec: ModelSpec, model_config: Any) -> str:
    """What the small files of a model directory lack and for whom, in one line; empty if that is nothing.

    Args:
        path: Hugging Face directory.
        spec: of its model family.
        model_config: of the model.
    """
    findings = check_assets(path, spec, model_config, read_json(path / "config.json"))
    parts = [f"{finding.topic} ({titles(finding.blocks | finding.notes)}): {finding.problem}" for finding in findings]
    return shorten("; ".join(parts), 900) if parts else ""
