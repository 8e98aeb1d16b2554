"""Images that a record holds itself or names by a URL: stored once as files, or turned into data URIs.

``ImageStore.resolve`` turns any form of an image into a string that ``images`` can open.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

from mindspeed_mm.data.images import decode_base64, is_data_uri, open_image
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import kind_of, reason, shorten

MAX_DOWNLOAD = 64 << 20  # bytes
_TRIES, _BACK_OFF = 3, 1.0  # seconds before the second try; twice as many before the third
_SLOWEST = 10  # times the time-out, for a whole download
_REDIRECTS = 5
_TEMPORARY = (408, 425, 429)  # statuses below 500 that another try may change
_CHUNK = 1 << 16
_BASE64_LENGTH = 64  # shortest text that is taken for an image
_URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"  # stay as they are; spaces and letters beyond ASCII are encoded
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; mindspeed-mm)", "Accept": "image/*,*/*;q=0.5"}
_WRAPPERS = ("url", "image", "image_url")
# Keys beside these, with the values that change nothing.
_NO_MEANING = {"type": ("image", "image_url", "input_image"), "detail": ("auto",)}


class _Temporary(Exception):
    """A download failed in a way that another try may not."""


class _Redirect(urllib.request.HTTPRedirectHandler):
    max_redirections = _REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    if urllib.parse.urlsplit(url).scheme.lower() not in ("http", "https"):
        raise ValueError(f"{shorten(url)} is no http or https address")


@cache
def _opener() -> urllib.request.OpenerDirector:
    """An opener for http and https only; urllib's own also opens files and ftp addresses."""
    certificates = ssl.create_default_context()  # once: loading them takes longer than many a download
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), _Redirect(),
        urllib.request.HTTPSHandler(context=certificates), urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def image_suffix(data: bytes) -> str | None:
    """Suffix of the format that image data begin like: png, jpg, webp, gif, bmp, tiff, avif or jp2; None for others."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith(b"BM") and data[6:10] == bytes(4):
        return "bmp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    starts = {
        b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg", b"GIF87a": "gif", b"GIF89a": "gif", b"II*\0": "tiff",
        b"MM\0*": "tiff", b"\0\0\0\x0cjP  \r\n\x87\n": "jp2",
    }
    return next((suffix for start, suffix in starts.items() if data.startswith(start)), None)


def _required_suffix(data: bytes) -> str:
    suffix = image_suffix(data)
    if suffix is None:
        raise ValueError(f"content of {len(data)} bytes that begins with {data[:8]!r} is no image data (PNG, JPEG, "
                         "WebP, GIF, BMP, TIFF, AVIF or JPEG 2000)")
    return suffix


def _begins_like_image(text: str) -> bool:
    """Whether a text begins with the base64 of an image's first bytes."""
    try:
        return image_suffix(decode_base64(text[:32])) is not None
    except ValueError:
        return False


class ImageStore:
    """Keeps the images of records, under names made from their content. Several processes may share a directory."""

    def __init__(
        self,
        directory: str | Path | None,
        *,
        copies: bool = True,
        allow_download: bool = False,
        timeout: float = 20.0,
    ) -> None:
        """Prepare a store; the directory is made when it is needed.

        Args:
            directory: where the files are kept; None to return data URIs instead.
            copies: whether images that records hold are stored; false: only downloads are, the others become data URIs.
            allow_download: whether http(s) addresses are fetched.
            timeout: seconds in which a server has to answer, and to send more; a whole download may take ten times
                as long.
        """
        self._root = None if directory is None else os.path.abspath(directory)
        self._copies = copies
        self._allow_download = allow_download
        self._timeout = timeout

    def owns(self, path: str) -> bool:
        """Whether ``path`` is a file of the store: it exists, and a list of its directory made earlier may lack it."""
        return self._root is not None and path.startswith(self._root + os.sep)

    def resolve(self, value: Any) -> str:
        """One image of a record as a path or a data URI.

        Args:
            value: a path, ``file://`` address or data URI, which stay as they are; an http(s) address; the content of
                an image, as bytes or as base64; ``{"bytes": ..., "path": ...}`` of ``datasets``, where bytes take
                precedence; one of these as the value of ``url``, ``image`` or ``image_url`` in an object.

        Raises:
            ValueError: saying what it is instead; the caller names file and record.
            UserError: if the store cannot be written.
        """
        if isinstance(value, str):
            return self._resolve_text(value)
        if isinstance(value, bytes):
            return self.put(value)
        if not isinstance(value, dict):
            raise ValueError(f"an image is {kind_of(value)}; write its path, its URL or its content (docs/media.md)")
        held = {key: item for key, item in value.items() if item is not None}  # Arrow gives every object all keys
        if held and held.keys() <= {"bytes", "path"}:
            return self.resolve(held["bytes"] if "bytes" in held else held["path"])
        key = next((key for key in _WRAPPERS if key in held), None)
        unread = [other for other in held if other != key and held[other] not in _NO_MEANING.get(other, ())]
        if key is None or unread:
            what = f"has the key {shorten(unread[0], 40)!r}, which is not read" if unread else "has no content"
            raise ValueError(f"an image is an object that {what}; write its path, or bytes, url or image alone")
        return self.resolve(held[key])

    def _resolve_text(self, text: str) -> str:
        if is_data_uri(text):
            return "data:" + text[5:]
        if text[:8].lower().startswith(("http://", "https://")):
            return self.fetch(text)
        if len(text) >= _BASE64_LENGTH and _begins_like_image(text):
            try:
                data = decode_base64(text)
            except ValueError as error:
                raise ValueError(f"image {shorten(text, 40)} is not valid base64: {reason(error)}") from error
            return self.put(data)
        return text

    def put(self, data: bytes) -> str:
        """Store an image that a record holds, unless it is there already.

        Returns:
            The path of its file, or a data URI if the store has no directory or takes no copies.

        Raises:
            ValueError: if the data do not begin like an image.
            UserError: if the file cannot be written.
        """
        return self._put(data, as_file=self._copies)

    def _put(self, data: bytes, *, as_file: bool) -> str:
        suffix = _required_suffix(data)
        if self._root is None or not as_file:
            return f"data:image/{'jpeg' if suffix == 'jpg' else suffix};base64,{base64.b64encode(data).decode()}"
        path = self._path(data, suffix)
        with contextlib.suppress(OSError):
            if os.path.getsize(path) == len(data):  # else it was cut off when the machine stopped
                return path
        _write(path, data)
        return path

    def _path(self, key: bytes, suffix: str) -> str:
        assert self._root is not None
        name = hashlib.blake2b(key, digest_size=20).hexdigest()
        return os.path.join(self._root, name[:2], f"{name}.{suffix}")

    def fetch(self, url: str) -> str:
        """Download an image, unless the store has that of this address.

        Returns:
            As :meth:`put`.

        Raises:
            ValueError: if it may not or cannot be fetched, or is no image.
            UserError: if the file cannot be written.
        """
        if not self._allow_download:
            raise ValueError(f"image URL {shorten(url)}: nothing is fetched unless basic_parameters.download_images is "
                             "true; set it, or download the file and write its path")
        note = None if self._root is None else self._path(url.encode("utf-8", "surrogatepass"), "url")
        if note is not None:
            with contextlib.suppress(OSError, ValueError):
                path = os.path.join(os.path.dirname(os.path.dirname(note)), Path(note).read_text())
                if self.owns(path) and os.path.getsize(path):
                    return path
        try:
            data = self._download(url)
            _check_whole(data)
            place = self._put(data, as_file=True)
        except ValueError as error:
            raise ValueError(f"image URL {shorten(url)} cannot be fetched: {reason(error)}") from error
        if note is not None:
            _write(note, os.path.relpath(place, self._root).encode())
        return place

    def _download(self, url: str) -> bytes:
        for attempt in range(1, _TRIES + 1):
            try:
                return self._read(url)
            except _Temporary as error:
                if attempt == _TRIES:
                    raise ValueError(f"{error} ({_TRIES} tries)") from error
            time.sleep(_BACK_OFF * 2 ** (attempt - 1))
        raise AssertionError

    def _read(self, url: str) -> bytes:
        """The content at an address, read once.

        Raises:
            _Temporary: for errors of the network or the server.
            ValueError: for others.
        """
        end = time.monotonic() + _SLOWEST * self._timeout
        _check_scheme(url)
        try:
            request = urllib.request.Request(urllib.parse.quote(url, safe=_URL_CHARACTERS), headers=_HEADERS)
            with _opener().open(request, timeout=self._timeout) as response:
                content = bytearray()
                while chunk := response.read(_CHUNK):
                    content += chunk
                    if len(content) > MAX_DOWNLOAD:
                        raise ValueError(f"it has more than {MAX_DOWNLOAD >> 20} MB")
                    if time.monotonic() > end:
                        raise _Temporary(f"it takes more than {_SLOWEST * self._timeout:.0f} s")
                if response.length:  # bytes that are missing
                    raise _Temporary(f"it ends {response.length} bytes too soon")
                return bytes(content)
        except urllib.error.HTTPError as error:
            error.close()
            message = f"the server answers {error.code} {shorten(error.reason, 100)}"
            if error.code >= 500 or error.code in _TEMPORARY:
                raise _Temporary(message) from error
            raise ValueError(message) from error
        except http.client.InvalidURL as error:
            raise ValueError(reason(error)) from error
        except (OSError, http.client.HTTPException) as error:
            inner = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(inner, ValueError):  # a certificate that is not valid
                raise ValueError(reason(inner)) from error
            raise _Temporary(reason(inner) if isinstance(inner, BaseException) else shorten(inner)) from error


def _check_whole(data: bytes) -> None:
    """Decode an image: one that was cut off on its way would stay in the store.

    Raises:
        ValueError: if it is damaged, or no image.
    """
    _required_suffix(data)
    try:
        with open_image(io.BytesIO(data)) as image:
            image.load()
    except UserError as error:
        raise ValueError(f"it is damaged: {reason(error.__cause__ or error)}") from error


def _write(path: str, data: bytes) -> None:
    """Write a file under another name, then rename it: other processes see all of it or nothing.

    Raises:
        UserError: if it cannot be written.
    """
    temporary = f"{path}.{os.urandom(6).hex()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise UserError(f"image {path} cannot be written: {reason(error)}; make room, or change permissions") from error
