"""A server with OpenAI's chat completions, in a thread; answers are what a test says."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

Reply = tuple[int, Any]


def completion(text: str, finish_reason: str = "stop") -> Reply:
    """A whole answer."""
    message = {"role": "assistant", "content": text}
    return 200, {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


def pictures(body: Mapping[str, Any]) -> list[Image.Image]:
    """The images of a request, decoded from their data URIs."""
    contents = [message["content"] for message in body["messages"] if isinstance(message["content"], list)]
    uris = [part["image_url"]["url"] for content in contents for part in content if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(uri.partition(";base64,")[2], validate=True))) for uri in uris]


class StubServer:
    """The server, as a context manager.

    Attributes:
        url: to give to the client.
        requests: path, headers and body of each request for an answer, in the order of their arrival.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Reply], *, models: tuple[str, ...] = ("stub",)) -> None:
        """Answer requests by ``reply``, which gets the body and gives status and content.

        Content is sent as JSON, text as it is, an iterator's bytes as they come.
        """
        self.requests: list[tuple[str, Mapping[str, str], dict[str, Any]]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = {"object": "list", "data": [{"id": name} for name in models]}
                self._send((200, content) if self.path == "/v1/models" else (404, {}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append((self.path, dict(self.headers), body))
                self._send(reply(body))

            def _send(self, answer: Reply) -> None:
                status, content = answer
                if isinstance(content, Iterator):  # more is promised than comes
                    self.send_response(status)
                    self.send_header("Content-Length", "1000000")
                    self.end_headers()
                    with contextlib.suppress(OSError):  # the client has gone
                        for piece in content:
                            self.wfile.write(piece)
                    return
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> StubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
