"""Where the image and video files of records are."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from urllib.parse import unquote

from mindspeed_mm.data.image_store import ImageStore
from mindspeed_mm.data.parsing import Record, Video, is_text
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_directory, shorten


def require_video_reader() -> None:
    """Check that video files can be read.

    Raises:
        UserError: if PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise UserError("the data has videos, and PyAV, which reads them, is not installed: pip install av")


def found_media(record: Record, finder: MediaFinder) -> tuple[list[str], list[Video]]:
    """A record's images and videos with their paths resolved; images that it holds itself are stored as files.

    Raises:
        ValueError: naming the first file that does not exist, or what an image is instead.
        UserError: if there is a video file and nothing that reads it, or the store cannot be written.
    """

    def found(path: str, kind: str) -> str:
        if not path:
            raise ValueError(f"the path of {'an' if kind == 'image' else 'a'} {kind} is empty; write it, or remove it")
        if (path.startswith("data:") and kind != "video") or finder.store.owns(path):
            return path
        if path.startswith("file://"):
            path = unquote(path.removeprefix("file://").removeprefix("localhost"))
        if "://" in path[:16]:
            raise ValueError(f"{kind} {shorten(path)} is a URL, and nothing is fetched from a network; download it, "
                             "and write its path")
        place = finder.find(path) if is_text(path) and "\0" not in path else None
        if place is None and (directory := finder.find_directory(path)):
            raise ValueError(f"{kind} {shorten(directory)} is a directory; write the path of a file")
        if place is None:
            places = " and ".join(map(shorten, finder.places(path)))
            raise ValueError(
                f"{kind} {shorten(path)} does not exist (looked for {places}); put it there, correct the path or "
                'basic_parameters.dataset_dir, or set dataloader_param.on_bad_sample to "skip"'
            )
        return place

    images = [found(finder.store.resolve(image), "image") for image in record.images]
    videos = []
    for video in record.videos:
        if video["path"] is not None:
            require_video_reader()
            videos.append(Video(path=found(video["path"], "video"), frames=None))
        else:
            videos.append(Video(path=None, frames=[found(path, "video frame") for path in video["frames"] or ()]))
    return images, videos


class MediaFinder:
    """Finds image and video files.

    Absolute paths are taken as they are; a relative one starts from ``dataset_dir``, or, if there is no such file, from
    the working directory. So a path that already contains ``dataset_dir`` is not joined to it a second time.

    Each directory is listed once and cached, because 80,000 stat calls take minutes on shared storage.
    """

    def __init__(self, dataset_dir: str | Path, store: ImageStore | None = None) -> None:
        """Prepare to find files.

        Args:
            dataset_dir: where relative paths start.
            store: of images that records hold themselves or name by a URL; None: data URIs, and no URLs.
        """
        self.store = store or ImageStore(None)
        self._root = str(dataset_dir)
        self._names: dict[str, frozenset[str]] = {}

    def find(self, path: str) -> str | None:
        """Path of the file, or None if there is no such file."""
        return next((place for place in self.places(path) if self._exists(place)), None)

    def find_directory(self, path: str) -> str | None:
        """Path of a directory of this name, or None."""
        return next((place for place in self.places(path) if is_directory(place)), None)

    def places(self, path: str) -> list[str]:
        """Where a path may lead, in order."""
        return [path] if os.path.isabs(path) else [os.path.join(self._root, path), path]

    def _exists(self, path: str) -> bool:
        directory, name = os.path.split(path)
        names = self._names.get(directory)
        if names is None:
            names = self._names[directory] = _list(directory or ".")
        return name in names


def _list(directory: str) -> frozenset[str]:
    """Names of the files in a directory; none if it cannot be listed."""
    try:
        with os.scandir(directory) as entries:
            return frozenset(entry.name for entry in entries if not _is_directory(entry))
    except OSError:
        return frozenset()


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: opening it says so
        return False
