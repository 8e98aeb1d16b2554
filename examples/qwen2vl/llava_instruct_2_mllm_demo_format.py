#!/usr/bin/env python3
"""Convert LLaVA-Instruct records to the message format of the training data (step 3 of the guide).

In:  [{"id": ..., "image": "x.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat ..."}, ...]}, ...]
Out: [{"images": ["./data/COCO2017/train2017/x.jpg"], "messages": [{"role": "user", "content": ...}, ...]}, ...]

Needs no other package; uses orjson if it is installed. Exit status: 0 on success or if only images are missing,
1 if malformed records were skipped, 2 if nothing was written.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import gc
import json
import os
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
IMAGE_TAG = "<image>"
READ = {"id", "image", "conversations"}  # the id is for people
TURN = {"from", "value"}
# Keys by which other formats change what is trained on, and the values that change nothing
CHANGES_TARGET: dict[str, tuple[Any, ...]] = {
    "system": (), "tools": (), "loss": (True, 1), "weight": (1,), "train": (True, 1), "tool_calls": (),
    "function_call": (), "reasoning_content": (), "reasoning": (), "objects": (),
}
NAMES_SHOWN = 5


class InputError(Exception):
    """A mistake that the user can correct: one line."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class Malformed(ValueError):
    """A record that cannot be converted, and the reason."""

    kind = "malformed records"


class OutOfOrder(Malformed):
    """Questions and answers do not take turns."""

    kind = "records whose turns are out of order"


class OtherTarget(Malformed):
    """A key that is not written would change what is trained on."""

    kind = "records with keys that would change what is trained on and have no place in the output"


class TagMismatch(Malformed):
    """The text refers to another number of images than there are."""

    kind = f"records whose number of {IMAGE_TAG} tags is not that of their images"


@dataclasses.dataclass
class Result:
    """Records by outcome.

    Attributes:
        kept: converted records.
        text_only: number of kept records without an image.
        with_system: number of kept records with a system message.
        missing: names of missing images; their records are skipped.
        malformed: index and reason of records that cannot be converted, by kind.
        unread: number of kept records with each key that is not read; a turn's begin with ``conversations.``.
    """

    kept: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    text_only: int = 0
    with_system: int = 0
    missing: list[str] = dataclasses.field(default_factory=list)
    malformed: dict[str, list[tuple[int, str]]] = dataclasses.field(default_factory=dict)
    unread: Counter[str] = dataclasses.field(default_factory=Counter)

    def summary(self) -> str:
        """Lines for the terminal."""
        lines = [f"kept {len(self.kept)} records, {self.text_only} of them text-only"]
        if self.missing:
            lines.append(f"skipped {len(self.missing)} records whose image is missing: {_first(self.missing)}")
        for kind, records in self.malformed.items():
            reasons = [f"record {index}: {reason}" for index, reason in records]
            lines.append(f"skipped {len(records)} {kind}: {_first(reasons, separator='; ')}")
        if self.unread:
            keys = [f"{key} ({count})" for key, count in self.unread.most_common()]
            lines.append(f"keys that are not read, with the number of records: {_first(keys)}")
        if self.with_system:
            lines.append(
                f'{self.with_system} records have a system message: set attr.system_tag to "system" for this file in '
                "the data configuration"
            )
        return "\n".join(lines)


def _first(items: list[str], *, separator: str = ", ") -> str:
    return separator.join(map(_one_line, items[:NAMES_SHOWN])) + (f"{separator}..." if len(items) > NAMES_SHOWN else "")


def _one_line(text: str) -> str:
    """``text`` without line breaks and other characters that a terminal would not show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class ImageNames:
    """Names of the existing images. Each directory is listed once: a stat call per file is slow on shared storage."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._names: dict[str, set[str]] = {}

    def __contains__(self, name: str) -> bool:
        directory, base = os.path.split(name)
        names = self._names.get(directory)
        if names is None:
            try:
                with os.scandir(os.path.join(self._root, directory)) as entries:
                    names = {entry.name for entry in entries}
            except (OSError, ValueError):  # no such directory, or none that could be: a NUL, a path too long
                names = set()
            self._names[directory] = names
        return base in names


def convert(records: list[Any], image_root: str) -> Result:
    """Convert ``records``; images are looked up, and written, below ``image_root``."""
    result, names = Result(), ImageNames(image_root)
    prefix = image_root.rstrip("/") + "/"
    for index, record in enumerate(records):
        try:
            messages, images = _parse(record)
        except Malformed as error:
            result.malformed.setdefault(error.kind, []).append((index, str(error)))
            continue
        absent = [name for name in images if name not in names]
        if absent:
            result.missing.append(absent[0])
            continue
        result.text_only += not images
        result.with_system += messages[0]["role"] == "system"
        result.unread.update(_unread(record))
        result.kept.append({"images": [prefix + name for name in images], "messages": messages})
    return result


def _parse(record: Any) -> tuple[list[dict[str, str]], list[str]]:
    """Messages and image names of one record.

    Raises:
        Malformed: with the reason, if the record cannot be converted.
    """
    if not isinstance(record, dict):
        raise Malformed("it is not an object")
    turns, images = record.get("conversations"), record.get("image")
    if not isinstance(turns, list) or not turns:
        raise Malformed("it has no list of conversations")
    images = [images] if isinstance(images, str) else images or []
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise Malformed("its image is not a file name")
    if any(name.startswith("/") or ".." in name.split("/") for name in images):
        raise Malformed("its image lies outside --image-root")
    messages, tags, expected = [], 0, "user"
    for place, turn in enumerate(turns):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None or not isinstance(text, str):
            raise Malformed(f"turn {place} lacks a known speaker ({', '.join(ROLES)}) or a text")
        if role != expected and not (role == "system" and place == 0):
            raise OutOfOrder(f"turn {place} is out of order: {speaker}")
        if role == "user":
            tags += text.count(IMAGE_TAG)
        if role != "system":
            expected = "assistant" if role == "user" else "user"
        messages.append({"role": role, "content": text})
    for holder in (record, *turns):
        for key in CHANGES_TARGET.keys() & holder.keys():
            if holder[key] not in (None, "", [], {}, *CHANGES_TARGET[key]):
                raise OtherTarget(f"{key} is {str(holder[key])[:40]}")
    if messages[-1]["role"] != "assistant":
        raise OutOfOrder("its last turn is not an answer")
    if tags != len(images):
        raise TagMismatch(f"{tags} {IMAGE_TAG} tags for {len(images)} images")
    return messages, images


def _unread(record: dict[str, Any]) -> set[str]:
    """Keys with content that are lost."""
    lost = {key for key in record.keys() - READ if record[key] is not None}
    turns = (turn for turn in record["conversations"] if len(turn) > 2)
    return lost | {f"conversations.{key}" for turn in turns for key in turn.keys() - TURN if turn[key] is not None}


def _json_functions() -> tuple[Callable[[bytes], Any], Callable[[Any], bytes]]:
    """Parse and dump; both pairs write the same bytes."""
    try:
        import orjson
    except ImportError:
        return _parse_json, lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


    def parse(content: bytes) -> Any:
        value = orjson.loads(content)
        return value if _num_quotes(content) == _num_quotes(orjson.dumps(value)) else _parse_json(content)

    return parse, orjson.dumps


def _num_quotes(content: bytes) -> int:
    """Number of quotes that begin or end a string of a JSON text: fewer where a key that occurs twice was lost."""
    return content.count(b'"') - content.count(b'\\"')


def _parse_json(content: bytes) -> Any:
    """As orjson, UTF-8 only, where the standard library guesses; and no object may have a key twice."""
    return json.loads(content.decode(), object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} occurs twice in one object")
    return content


def _read(path: Path) -> bytes:
    """The content of a regular file, without a byte-order mark.

    Raises:
        OSError: if it cannot be read. A FIFO is refused, where it would be waited for.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a regular file")
        return file.read().removeprefix(codecs.BOM_UTF8)


def run(*, source: Path, image_root: str, output: Path, overwrite: bool, limit: int | None) -> int:
    """Convert ``source`` into ``output``; returns the exit status.

    Raises:
        InputError: if nothing can be written.
    """
    if output.exists() and source.exists() and os.path.samefile(source, output):
        raise InputError(f"--output {output} is --input, which would be replaced; give another --output")
    parse, dump = _json_functions()
    try:
        records = parse(_read(source))
    except FileNotFoundError:
        raise InputError(
            f"{source} does not exist; download LLaVA-Instruct-150K there (step 3 of the guide) or give --input"
        ) from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{source} cannot be read as JSON ({_reason(error)}); download it again, or give --input"
        ) from error
    if not isinstance(records, list):
        raise InputError(f"{source} has no list of records; give LLaVA-Instruct's JSON file with --input")
    result = convert(records[:limit], image_root)
    if result.missing and not os.path.isdir(image_root):
        raise InputError(
            f"{image_root} is not a directory; unpack COCO2017 there (step 3 of the guide) or give --image-root"
        )
    if not result.kept:
        raise InputError(f"{source} has no record that can be used; " + result.summary().replace("\n", "; "))
    # One line per record. Within a text these quotes are escaped, so only records begin like this.
    try:
        dumped = dump(result.kept)
    except ValueError as error:  # half a character, which JSON can hold and UTF-8 cannot
        raise InputError(f"{source} has a text that cannot be written ({error}); download it again") from error
    lines = dumped.replace(b']},{"images":', b']},\n{"images":')
    content = b"[\n%b\n]\n" % memoryview(lines)[1:-1]
    done = _write(output, content, overwrite=overwrite)
    print(f"{done}\n{result.summary()}", flush=True)
    return 1 if result.malformed else 0


def _write(output: Path, content: bytes, *, overwrite: bool) -> str:
    """Write ``content`` atomically; returns what was done, for the terminal.

    Raises:
        InputError: if it cannot be written, or would replace another content without ``overwrite``.
    """
    try:
        if output.is_file():
            if output.stat().st_size == len(content) and output.read_bytes() == content:
                return f"{output} is up to date"
            if not overwrite:
                raise InputError(
                    f"{output} exists and differs from what would be written; give --overwrite or --output"
                )
        elif output.exists():
            raise ValueError("it is not a regular file")
        output.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are readable by their owner only
            os.replace(temporary, output)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, ValueError) as error:
        raise InputError(f"{output} cannot be written: {_reason(error)}; give another --output") from error
    return f"wrote {output}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    summary, *details = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog="\n\n".join(details), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=Path, default=Path("./data/llava_instruct_150k.json"), help="LLaVA-Instruct's JSON file")
    add("--image-root", default="./data/COCO2017/train2017", help="directory of the images; written as given")
    add("--output", type=Path, default=Path("./data/mllm_format_llava_instruct_data.json"), help="file to write")
    add("--overwrite", action="store_true", help="replace an output that differs")
    add("--limit", type=_positive, help="convert only this number of records, from the first")
    options = parser.parse_args(argv)
    # Millions of small objects are created and none becomes garbage, so collecting it only costs time.
    gc.disable()
    try:
        return run(
            source=options.input,
            image_root=options.image_root,
            output=options.output,
            overwrite=options.overwrite,
            limit=options.limit,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: standard output cannot be written: {_reason(error)}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it would fail again at exit
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
