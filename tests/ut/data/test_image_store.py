"""Images as bytes, base64 and addresses: one file each, whoever writes it; and what is refused, in one line."""

from __future__ import annotations

import base64
import io
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data import image_store
from mindspeed_mm.data.image_store import ImageStore
from mindspeed_mm.data.images import load_pixels
from mindspeed_mm.errors import UserError

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "avif": "AVIF",
           "jp2": "JPEG2000"}


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


PNG = picture()
TEXT = base64.b64encode(PNG).decode()
URI = "data:image/png;base64," + TEXT


@pytest.mark.parametrize("suffix", FORMATS)
def test_content_becomes_one_file_or_a_data_uri(tmp_path: Path, suffix: str) -> None:
    if FORMATS[suffix] not in Image.SAVE:
        pytest.skip("this Pillow does not write the format")
    data = picture(FORMATS[suffix])
    path, uri = ImageStore(tmp_path).put(data), ImageStore(None).put(data)
    assert path.endswith(f".{suffix}") and Path(path).read_bytes() == data and Path(path).parent.parent == tmp_path
    assert np.array_equal(load_pixels(path), load_pixels(uri))
    assert ImageStore(None).resolve(base64.encodebytes(data).decode()) == uri  # broken into lines
    before = os.stat(path)
    assert ImageStore(tmp_path).put(data) == path and os.stat(path) == before
    Path(path).write_bytes(data[:10])  # the machine has stopped
    assert ImageStore(tmp_path).put(data) == path and Path(path).read_bytes() == data


def test_several_writers_of_the_same_images(tmp_path: Path) -> None:
    contents = [PNG + bytes([number]) for number in range(20)]
    threads = [threading.Thread(target=lambda: [ImageStore(tmp_path).put(data) for data in contents]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.read_bytes() for path in stored) == sorted(contents)


@pytest.mark.parametrize(("value", "expected"), [
    ("a/b.png", "a/b.png"), ("file:///a.png", "file:///a.png"), (URI, URI),
    ("DATA:image/png;BASE64,A", "data:image/png;BASE64,A"), ("a" * 64, "a" * 64), ("s3://bucket/a.png", "s3://bucket/a.png"),
    (PNG, URI), (TEXT, URI),
    ({"bytes": PNG, "path": "a.png"}, URI), ({"bytes": None, "path": "a.png"}, "a.png"), ({"path": "a.png"}, "a.png"),
    ({"bytes": TEXT}, URI),
    ({"url": URI, "detail": "auto"}, URI), ({"image": "a.png", "url": None}, "a.png"),
    ({"type": "image_url", "image_url": {"url": "a.png", "detail": None}}, "a.png"),
])
def test_forms_of_an_image(value: Any, expected: str) -> None:
    assert ImageStore(None).resolve(value) == expected


@pytest.mark.parametrize(("value", "message"), [
    (3, "an image is a number; write its path"), (None, "an image is null"), ([PNG], "an image is a list"),
    ({}, "an object that has no content"), ({"bytes": None, "path": None}, "an object that has no content"),
    ({"image": "a.png", "max_pixels": 5}, "has the key 'max_pixels', which is not read"),
    ({"url": "a.png", "detail": "low"}, "has the key 'detail', which is not read"),
    ({"url": "a.png", "image": "b.png"}, "has the key 'image', which is not read"),
    (b"", "content of 0 bytes that begins with b'' is no image data"),
    (b"%PDF-1.4 and more", "begins with b'%PDF-1.4' is no image data"),
    ("/9j/" + "x" * 70 + ".jpg", "is not valid base64"), (TEXT[:-2], "is not valid base64: Incorrect padding"),
    ("http://host/a.png", "image URL http://host/a.png: nothing is fetched unless basic_parameters.download_images is"),
    ("HTTPS://host/a.png", "nothing is fetched unless"),
])
def test_what_is_no_image(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        ImageStore(None).resolve(value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_store_that_cannot_be_written_is_no_bad_record(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory; make room"):
        ImageStore(tmp_path / "file").put(PNG)


def test_data_uris_with_parameters() -> None:
    expected = load_pixels(URI)
    for uri in (f"DATA:image/png;charset=utf-8;BASE64,{TEXT}", f"data:;base64,{TEXT}", URI[:60] + "\n" + URI[60:]):
        assert np.array_equal(load_pixels(uri), expected)
    for uri, message in (("data:image/svg+xml,%3Csvg/%3E", "must be base64 .*percent-encoding is not read"),
                         ("data:image/png;base64,%89PNG", "Only base64 data|Non-base64|Incorrect padding"),
                         ("data:image/png;base64", "must be base64|not an image")):
        with pytest.raises(UserError, match=message):
            load_pixels(uri)


class Handler(BaseHTTPRequestHandler):
    """Answers by the path: /STATUS,STATUS,... gives one status after the other, the last again and again."""

    counts: Counter[str] = Counter()

    def do_GET(self) -> None:
        asked = self.counts[self.path]
        self.counts[self.path] += 1
        kind = self.path.split("/")[1]
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", {"ok": "/200", "loop": "/redirect/loop", "file": "file:///etc/passwd",
                                          "ftp": "ftp://host/a.png"}[
                self.path.split("/")[2]])
            self.end_headers()
            return
        statuses = [int(word) for word in kind.split(",")] if kind[0].isdigit() else [200]
        data = b"<html>" if kind == "page" else PNG
        self.send_response(statuses[min(asked, len(statuses) - 1)])
        if kind != "open":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if kind == "slow":
            time.sleep(0.4)
        self.wfile.write(data[: len(data) // 2] if kind in ("cut", "open") else data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(image_store, "_BACK_OFF", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    Handler.counts.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["200/ü b.png?a=%20", "500,200", "500,429,200", "redirect/ok"])
def test_downloads(host: str, tmp_path: Path, path: str) -> None:
    url = f"{host}/{path}"
    place = ImageStore(tmp_path, allow_download=True).resolve({"url": url})
    assert Path(place).read_bytes() == PNG and ImageStore(tmp_path).owns(place) and not ImageStore(None).owns(place)
    asked = Handler.counts.total()
    assert ImageStore(tmp_path, allow_download=True).fetch(url) == place and Handler.counts.total() == asked
    assert ImageStore(tmp_path).put(PNG) == place
    Path(place).unlink()
    assert ImageStore(tmp_path, allow_download=True).fetch(url) == place and Handler.counts.total() > asked
    assert ImageStore(None, allow_download=True).fetch(url) == URI


@pytest.mark.parametrize(("path", "tries", "message"), [
    ("404", 1, "the server answers 404 Not Found"), ("500", 3, r"the server answers 500 .* \(3 tries\)"),
    ("slow", 3, r"timed out \(3 tries\)"), ("cut", 3, "bytes too soon"), ("open", 1, "it is damaged: .*truncated"),
    ("page", 1, "begins with b'<html>' is no image data"), ("redirect/loop", None, "the server answers 302"),
    ("redirect/file", 1, "the server answers 302 .*is not allowed"),
    ("redirect/ftp", 1, "ftp://host/a.png is no http or https address"),
])
def test_downloads_that_fail(host: str, tmp_path: Path, path: str, tries: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"image URL {host}/{path} cannot be fetched: .*{message}") as raised:
        ImageStore(tmp_path, allow_download=True, timeout=0.2).fetch(f"{host}/{path}")
    assert "\n" not in str(raised.value) and not list(tmp_path.rglob("*.*"))
    assert tries in (None, Handler.counts[f"/{path}"])


def test_limits_of_a_download(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(tmp_path, allow_download=True, timeout=1)
    monkeypatch.setattr(image_store, "MAX_DOWNLOAD", len(PNG) - 1)
    with pytest.raises(ValueError, match="it has more than 0 MB"):
        store.fetch(f"{host}/200")
    monkeypatch.setattr(image_store, "_SLOWEST", 0)
    monkeypatch.setattr(image_store, "MAX_DOWNLOAD", len(PNG))
    with pytest.raises(ValueError, match=r"it takes more than 0 s \(3 tries\)"):
        store.fetch(f"{host}/200/again")
    with pytest.raises(ValueError, match="Connection refused"):
        store.fetch("http://127.0.0.1:1/a.png")
    for url in ("http://", "http://[", "http://h\n/"):
        with pytest.raises(ValueError, match="cannot be fetched"):
            store.fetch(url)
