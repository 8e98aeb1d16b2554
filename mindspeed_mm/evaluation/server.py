"""Answers of a server with OpenAI's chat completions: vLLM, SGLang, or a hosted one."""

from __future__ import annotations

import base64
import io
import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from mindspeed_mm.data.images import DATA_URI, decode_base64, is_data_uri, is_plain_jpeg, load_pixels
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.generation import Answer, GenerationSettings
from mindspeed_mm.evaluation.questions import Prompt
from mindspeed_mm.inputs import MEDIA_BYTES, read_bytes, reason, shorten
from mindspeed_mm.interfaces.conversation import IMAGE_TAG

_TEMPORARY = (408, 409, 425, 429)  # statuses below 500 that another try may change
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_MOST_QUOTED = 300
_PIECE = 64  # bytes that are read at a time: the time is checked between two reads
_MOST_BYTES = 64 * 2**20


class _Temporary(Exception):
    """A request failed in a way that another one may not.

    Attributes:
        pause: seconds that the server asks to wait; None if it does not.
        remedy: if no try helps.
    """

    def __init__(self, message: str, remedy: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.remedy, self.pause = remedy, pause


class Server:
    """A server that answers prompts; each thread has a connection of its own."""

    def __init__(
        self, url: str, *, model: str | None, api_key: str | None = None, timeout: float = 300.0, retries: int = 5,
        pause: float = _FIRST_PAUSE,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            url: ``http(s)://HOST:PORT[/v1]``.
            model: name of the model there; None: the only one that the server lists.
            api_key: sent as a bearer token; never shown.
            timeout: seconds in which the server has to answer a request.
            retries: further tries of a request that a lost connection, a 429 or a 5xx ended.
            pause: seconds before the first of them; twice as many before each following one.

        Raises:
            UserError: if ``url`` is none.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--server {shorten(url)} is no http or https address; write http://HOST:PORT/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError("--server has a user name, a password or parameters; write http://HOST:PORT/v1, and give "
                            "the key by --api-key-env")
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self.model = model or ""
        self._key, self._timeout, self._retries, self._pause = api_key, timeout, retries, pause
        self._local = threading.local()
        self._stopped = threading.Event()

    def check(self) -> None:
        """Ask the server for its models, before the first question.

        Raises:
            UserError: if it does not answer, refuses the key, or does not have the model.
        """
        status, content, _ = self._send("GET", "/models", retries=min(self._retries, 1))
        listed = content.get("data") if isinstance(content, dict) else None
        names = [str(one.get("id")) for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        if status != 200 or not names:  # some servers have no list
            if not self.model:
                raise UserError(f"--server {self.url} lists no models (status {status}); give --server-model NAME")
            return
        if not self.model:
            if len(names) > 1:
                raise UserError(f"--server {self.url} has the models {shorten(', '.join(names))}; choose one with "
                                "--server-model")
            self.model = names[0]
        elif self.model not in names:
            raise UserError(f"--server {self.url} does not have --server-model {shorten(self.model)}; it has "
                            f"{shorten(', '.join(names))}")

    def answers(
        self, prompts: Sequence[Prompt], settings: GenerationSettings, *, concurrency: int
    ) -> Iterator[tuple[int, Answer]]:
        """Index and answer of each prompt, in the order in which they come.

        Args:
            prompts: to answer.
            settings: of decoding.
            concurrency: requests at a time.

        Raises:
            UserError: for the first prompt that gets no answer.
        """
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        results: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
        for index in range(len(prompts)):
            todo.put(index)
        stopped = self._stopped = threading.Event()

        def work() -> None:
            while not stopped.is_set():
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    results.put((index, self.answer(prompts[index], settings)))
                except BaseException as error:  # raised again in the thread that waits
                    stopped.set()
                    results.put((index, error))

        for _ in range(min(concurrency, len(prompts))):  # daemons: Ctrl-C does not wait for the server
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in prompts:
                index, outcome = results.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield index, outcome
        finally:
            stopped.set()  # ends the pauses of other threads

    def answer(self, prompt: Prompt, settings: GenerationSettings) -> Answer:
        """The answer to one prompt.

        Raises:
            UserError: if the server gives none.
        """
        body = request_body(prompt, settings, model=self.model)
        status, content, tries = self._send("POST", "/chat/completions", body, retries=self._retries)
        if status != 200:
            remedy = "give the address that it redirects to" if 300 <= status < 400 else "see the server's log"
            raise self._error(f"answers {status} {self._quoted(content)} to the question "
                              f"'{shorten(prompt.question)}'", remedy)
        try:
            choice = content["choices"][0]
            text, end = choice["message"]["content"], choice.get("finish_reason")
            if text is not None and not isinstance(text, str):
                raise TypeError("its content is no text")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._error(f"gives no chat completion, but {self._quoted(content)}",
                              "give the address of an OpenAI-compatible server") from error
        return Answer((text or "").strip(), end == "length", tries)

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, retries: int
    ) -> tuple[int, Any, int]:
        """Status and content of a request, which is repeated after a failure that may pass; and how often it was.

        Raises:
            UserError: if the server cannot be reached or refuses the key.
        """
        stopped = self._stopped
        for attempt in range(retries + 1):
            try:
                status, content = self._request(method, path, body)
                break
            except _Temporary as error:
                if attempt == retries or stopped.is_set():
                    tries = f" ({attempt + 1} tries)" if attempt else ""
                    raise self._error(f"{error}{tries}", error.remedy) from error
                pause = self._pause * 2**attempt if error.pause is None else error.pause
                stopped.wait(min(pause, _LONGEST_PAUSE))
        if status in (401, 403):
            remedy = "set the variable of --api-key-env to a valid key"
            raise self._error(f"refuses the request ({status} {self._quoted(content)})", remedy)
        return status, content, attempt

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, Any]:
        import requests

        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        end = time.monotonic() + self._timeout
        try:
            with session.request(
                method, self.url + path, json=body, headers=headers, timeout=self._timeout, allow_redirects=False,
                auth=_no_netrc, stream=True,
            ) as response:
                content = _parsed(self._body(response.iter_content(_PIECE), end))
        except requests.Timeout as error:
            raise self._too_late() from error
        except (requests.RequestException, OSError, ValueError) as error:
            cause = _first_cause(error)
            if isinstance(cause, TimeoutError):  # while the answer was read
                raise self._too_late() from error
            why = self._without_key(reason(cause))
            raise _Temporary(f"cannot be reached: {why}", "start it, or correct the address") from error
        if response.status_code >= 500 or response.status_code in _TEMPORARY:
            after = response.headers.get("Retry-After", "")
            pause = float(after) if after.isdigit() and len(after) < 6 else None
            remedy = "lower --concurrency, raise --retries, or see the server's log"
            raise _Temporary(f"answers {response.status_code} {self._quoted(content)}", remedy, pause)
        return response.status_code, content

    def _body(self, pieces: Iterator[bytes], end: float) -> bytes:
        """All of an answer, which may come slowly, until ``end``."""
        body = bytearray()
        for piece in pieces:
            body += piece
            if time.monotonic() > end:
                raise self._too_late()
            if len(body) > _MOST_BYTES:
                raise self._error(f"sends more than {_MOST_BYTES} bytes for one answer",
                                  "give the address of an OpenAI-compatible server")
        return bytes(body)

    def _too_late(self) -> _Temporary:
        return _Temporary(f"does not answer within {self._timeout:g} s", "raise --timeout, or see its log")

    def _error(self, what: str, remedy: str) -> UserError:
        return UserError(f"--server {self.url} {what}; {remedy}")

    def _quoted(self, content: Any) -> str:
        """What a server says, for a message."""
        if isinstance(content, dict):
            error = content.get("error", content.get("message", content))
            content = error.get("message", error) if isinstance(error, dict) else error
        return self._without_key(shorten(content, _MOST_QUOTED))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _parsed(body: bytes) -> Any:
    """The JSON value of an answer, or its text where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def _first_cause(error: BaseException) -> BaseException:
    """The error of the system or of a library below requests, whose own one repeats the address."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return error


def _no_netrc(request: Any) -> Any:
    """The request as it is: requests would add a password from ``~/.netrc`` in place of the key."""
    return request


def request_body(prompt: Prompt, settings: GenerationSettings, *, model: str) -> dict[str, Any]:
    """The request for a prompt, as OpenAI's API defines it; images are data URIs in their places in the text."""
    body: dict[str, Any] = {
        "model": model, "messages": _messages(prompt), "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature, "seed": settings.seed, "stream": False,
    }
    if settings.temperature > 0:
        body["top_p"] = settings.top_p
        if settings.top_k:
            body["top_k"] = settings.top_k  # of vLLM and SGLang
    if settings.repetition_penalty is not None:
        body["repetition_penalty"] = settings.repetition_penalty  # likewise
    return body


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    images = iter(prompt.images)
    messages: list[dict[str, Any]] = []
    for message in prompt.messages:
        content: Any = message.text
        if message.role == "user" and IMAGE_TAG in message.text:
            content = []
            for place, piece in enumerate(message.text.split(IMAGE_TAG)):
                if place:
                    content.append({"type": "image_url", "image_url": {"url": image_uri(next(images))}})
                if piece:
                    content.append({"type": "text", "text": piece})
        messages.append({"role": message.role, "content": content})
    return messages


def image_uri(source: str) -> str:
    """An image as a data URI with the pixels that training sees: a plain JPEG as it is, others as PNG, upright."""
    content = b""
    if is_data_uri(source):
        head, _, text = source.partition(",")
        content = decode_base64(text) if head.lower().endswith(";base64") else b""
    else:
        content = _content(source)
    kind = "jpeg"
    if not is_plain_jpeg(content):
        file = io.BytesIO()
        Image.fromarray(load_pixels(source)).save(file, "PNG")
        content, kind = file.getvalue(), "png"
    return f"{DATA_URI}image/{kind};base64,{base64.b64encode(content).decode()}"


def _content(path: str) -> bytes:
    try:
        return read_bytes(Path(path), limit=MEDIA_BYTES)
    except OSError:
        return b""  # load_pixels says what is wrong


