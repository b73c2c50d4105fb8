"""The agent's HTTP: ``/metrics``, ``/healthz`` and the status page, from the standard library's server.

Three read-only pages for a scraper and a browser need no framework; what is
here is bounded: so many connections at once, so many seconds each, no request
body. Bound to loopback unless told otherwise; a bearer token and TLS where
asked for.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import unquote

from gradwatch import __version__

MAX_CONNECTIONS: Final = 32
TIMEOUT_SECONDS: Final = 10.0
#: A request has so long from the first wait for it to its answer. The time above is that of one read only: who sends
#: a byte now and then would never meet it, and 32 of them would keep the scraper out.
REQUEST_SECONDS: Final = 30.0

#: Nothing is loaded and nothing runs: styles in the page are all it has.
CONTENT_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_log = logging.getLogger("gradwatch.agent")

#: (status, content type, body) for a path and an Accept header; None where there is no such page.
Respond = Callable[[str, str], tuple[int, str, bytes] | None]


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = f"gradwatch/{__version__}"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT_SECONDS

    def handle_one_request(self) -> None:
        with self.server.bounded(self.connection):
            super().handle_one_request()

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        if path != "/healthz" and not self._allowed():
            self._send(HTTPStatus.UNAUTHORIZED, "text/plain", b"a bearer token is needed\n", body)
            return
        try:
            answer = self.server.respond(path, self.headers.get("Accept", ""))
        except Exception:
            _log.exception("page-failed path=%r", path[:100])
            answer = (500, "text/plain; charset=utf-8", b"something went wrong; the agent's log says what\n")
        status, kind, content = answer or (404, "text/plain; charset=utf-8", b"no such page\n")
        self._send(status, kind, content, body)

    def _allowed(self) -> bool:
        token = self.server.token
        if token is None:
            return True
        given = self.headers.get("Authorization", "")
        return hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {token}".encode())

    def _send(self, status: int, kind: str, content: bytes, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", CONTENT_POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """No line a request: scrapes come every few seconds for months."""


class Server(ThreadingHTTPServer):
    """Serves on a thread of its own from :meth:`start` to :meth:`stop`."""

    daemon_threads = True
    # A port that somebody listens on is an error to be told, not to be shared.
    allow_reuse_port = False

    def __init__(
        self,
        host: str,
        port: int,
        respond: Respond,
        *,
        token: str | None = None,
        tls: tuple[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind. ``tls`` is (certificate file, key file). Raises ``OSError`` where the address cannot be had."""
        self.respond, self.token = respond, token
        self._clock = clock
        self._deadlines: dict[socket.socket, float] = {}
        self._guard = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        context = None
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
        super().__init__((host, port), _Handler)
        self._context = context
        self._thread = threading.Thread(target=self.serve_forever, name="gradwatch-http", daemon=True)

    def get_request(self) -> tuple[Any, Any]:
        connection, client = super().get_request()
        # A client that says nothing must not hold a thread, nor, with TLS, the loop that accepts: it shakes
        # hands when its handler first reads.
        connection.settimeout(TIMEOUT_SECONDS)
        if self._context is not None:
            connection = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, client

    @contextlib.contextmanager
    def bounded(self, connection: socket.socket) -> Iterator[None]:
        """Within, a connection has ``REQUEST_SECONDS``; then it is shut, and what reads from it or writes ends."""
        with self._guard:
            self._deadlines[connection] = self._clock() + REQUEST_SECONDS
        try:
            yield
        finally:
            with self._guard:
                del self._deadlines[connection]

    def service_actions(self) -> None:
        """Called by the loop that accepts, twice a second and behind every connection."""
        now = self._clock()
        # Under the lock, which a connection needs to end: none of these is closed, nor its number another file's.
        with self._guard:
            for connection, deadline in self._deadlines.items():
                if now > deadline:
                    with contextlib.suppress(OSError):
                        # Of the plain socket: TLS would drop its state under the thread that reads.
                        socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left or spoke nonsense is no event of ours."""

    @property
    def address(self) -> str:
        """Where it listens, like ``127.0.0.1:9460``."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else str(host)
        return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join(TIMEOUT_SECONDS)
        self.server_close()
