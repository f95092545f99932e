"""An embedding server with OpenAI's `POST /embeddings`, of words: texts that share words are near each other."""

import hashlib
import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

DIMENSIONS = 32


class EmbeddingServer:
    """`with EmbeddingServer() as server:` serves at `server.url`; `server.down = True` makes it answer 503."""

    def __init__(self) -> None:
        self.down = False
        self.texts: list[str] = []
        """All that it was ever asked for."""
        self.at_work = threading.Event()
        """Cleared: it thinks about every request, and answers none."""
        self.at_work.set()
        self.refused = ""
        """A word that makes it answer 400, as models do to texts beyond their length."""
        self.fails_at = ""
        """A word that makes it answer 500, as servers do whose model chokes on a text."""
        self.hangs_at = ""
        """A word that it thinks about until it is closed, while it answers others."""
        self.drip_s = 0.0
        """Seconds between one byte of an answer and the next."""
        self.closing = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.at_work.set()
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Its base URL."""
        host, port = self._http.server_address[:2]
        return f"http://{host!s}:{port}/v1"


def embedding_of(text: str) -> list[float]:
    """One number for each of 32 kinds of words, and a little of each."""
    vector = [0.01] * DIMENSIONS
    for word in text.lower().split():
        vector[hashlib.sha256(word.encode()).digest()[0] % DIMENSIONS] += 1.0
    return vector


def _handler(server: EmbeddingServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # http.server's name.
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.texts.extend(request["input"])
            server.at_work.wait()
            if server.hangs_at and any(server.hangs_at in text for text in request["input"]):
                server.closing.wait()
            if server.down:
                self.send_error(503)
                return
            if server.fails_at and any(server.fails_at in text for text in request["input"]):
                self.send_error(500)
                return
            if server.refused and any(server.refused in text for text in request["input"]):
                self.send_error(400)
                return
            data = [{"index": n, "embedding": embedding_of(text)} for n, text in enumerate(request["input"])]
            body = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(ConnectionError):  # Of who has not waited for it.
                if not server.drip_s:
                    self.wfile.write(body)
                    return
                for byte in body:
                    self.wfile.write(bytes((byte,)))
                    if server.closing.wait(server.drip_s):
                        return

        def log_message(self, format: str, *args: Any) -> None:
            """Not in the tests' output."""

    return Handler
