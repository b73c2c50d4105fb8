"""The status page and its server: what is shown, nothing that runs, nothing that breaks out."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gradwatch.agent.page import curve
from gradwatch.agent.server import MAX_CONNECTIONS, REQUEST_SECONDS, Server
from gradwatch.agent.web import responder
from gradwatch.testing import FakeClock, JournalBuilder
from tests.agent.test_service import Bench
from tests.services import eventually

EVIL = "<script>alert('x')</script>\"'&\n\x00"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    clock = FakeClock()
    bench = Bench(tmp_path, clock)
    journal = JournalBuilder(
        bench.root, run="run-1", run_name=EVIL, model=EVIL, clock=clock, hyperparameters={EVIL: EVIL, "lr": 0.1},
        unchecked=({"check": EVIL, "reason": EVIL},), tensors=[f"{EVIL}.w"],
    )  # fmt: skip
    for i in range(50):
        journal.step(loss=1.0 / (i + 1), grad_norm=float(i % 5 + 1), clip_threshold=4.5)
    journal.validation(loss=1.0, train={"loss": 0.5}, slice=EVIL, **{EVIL: 1.0})
    journal.event("finding", code="clip-missing", message=EVIL, severity="ticket", evidence={EVIL: EVIL})
    bench.turn(4)
    yield bench
    journal.end("failed", reason=EVIL, message=EVIL)


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def get(bench: Bench, path: str) -> str:
    answer = responder(bench.agent)(path, "")
    assert answer is not None
    assert answer[0] == 200
    return answer[2].decode()


def test_the_list_shows_state_steps_loss_norm_clip_rate_and_curves(bench: Bench) -> None:
    page = Tags(get(bench, "/"))
    assert page.tags.count("svg") == page.tags.count("polyline") == 2
    for piece in (
        "running",
        "49",
        "clip rate",
        "20.0 %",
        "above 4.5",
        "gradient norm",
        "training loss",
        "clip-missing",
    ):
        assert piece in page.text


@pytest.mark.parametrize("path", ["/", "/runs/run-1"])
def test_nothing_of_a_journal_becomes_markup(bench: Bench, path: str) -> None:
    page = Tags(get(bench, path))
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>alert('x')</script>" in page.text
    assert "\x00" not in page.text


def test_a_run_has_a_page_with_findings_and_hyperparameters(bench: Bench) -> None:
    page = Tags(get(bench, "/runs/run-1"))
    for piece in ("Findings", "Hyperparameters", "Validation", "Layers", "Not checked", "+100.0 %"):
        assert piece in page.text
    respond = responder(bench.agent)
    assert respond("/runs/other", "") is None
    assert respond("/runs/", "") is None
    assert respond("/nothing", "") is None
    assert respond("/../etc/passwd", "") is None


def test_an_empty_directory_has_a_page(tmp_path: Path) -> None:
    assert "No run yet" in get(Bench(tmp_path, FakeClock()), "/")


def test_a_curve_is_scaled_to_its_box_and_needs_two_points() -> None:
    assert curve([(0, 1.0)]) == ""
    assert curve([(0, float("nan")), (1, 2.0)]) == ""
    assert 'points="0.0,34.0 80.0,18.0 160.0,2.0"' in curve([(0, 0.0), (5, 1.0), (10, 2.0)])


@pytest.fixture
def server(bench: Bench) -> Iterator[Server]:
    server = Server("127.0.0.1", 0, responder(bench.agent))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """(certificate file, key file) of a server at 127.0.0.1 that signed for itself."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        capture_output=True,
    )  # fmt: skip
    assert made.returncode == 0
    return str(cert), str(key)


def test_headers_forbid_scripts_framing_tricks_and_caching(server: Server) -> None:
    with urllib.request.urlopen(f"http://{server.address}/") as answer:
        headers = answer.headers
        body = answer.read()
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "script" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert b"http-equiv=refresh" in body
    assert b"prefers-color-scheme: dark" in body
    assert b"width=device-width" in body


def test_other_methods_and_pages_are_refused(server: Server) -> None:
    host, _, port = server.address.partition(":")
    for method, path, status in (("POST", "/metrics", 501), ("GET", "/x", 404), ("HEAD", "/metrics", 200)):
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request(method, path)
        assert connection.getresponse().status == status
        connection.close()


def test_silent_clients_do_not_keep_others_out(server: Server) -> None:
    host, _, port = server.address.partition(":")
    silent = [socket.create_connection((host, int(port)), timeout=10) for _ in range(MAX_CONNECTIONS - 1)]
    try:
        with urllib.request.urlopen(f"http://{server.address}/healthz", timeout=10) as answer:
            assert answer.read() == b"ok\n"
    finally:
        for client in silent:
            client.close()


@pytest.mark.parametrize("secure", [False, True])
def test_clients_that_drip_do_not_keep_others_out(bench: Bench, certificate: tuple[str, str], secure: bool) -> None:
    clock = FakeClock()
    server = Server("127.0.0.1", 0, responder(bench.agent), tls=certificate if secure else None, clock=clock)
    server.start()
    trust = ssl.create_default_context(cafile=certificate[0]) if secure else None
    url = f"{'https' if secure else 'http'}://{server.address}/healthz"

    def connected() -> socket.socket:
        client = socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10)
        return client if trust is None else trust.wrap_socket(client, server_hostname="127.0.0.1")

    def answered() -> bool:
        for client in dripping:
            with contextlib.suppress(OSError):
                client.sendall(b"y")
        try:
            with urllib.request.urlopen(url, context=trust, timeout=10) as answer:
                return bool(answer.read() == b"ok\n")
        except OSError:
            return False

    dripping = [connected() for _ in range(MAX_CONNECTIONS)]
    try:
        for client in dripping:
            client.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        eventually(lambda: len(server._deadlines) == MAX_CONNECTIONS, "all are being read")
        assert not answered()
        clock.advance(REQUEST_SECONDS + 1)
        eventually(answered, "the scraper is answered")
    finally:
        for client in dripping:
            client.close()
        server.stop()


def test_tls(bench: Bench, certificate: tuple[str, str]) -> None:
    server = Server("127.0.0.1", 0, responder(bench.agent), tls=certificate)
    server.start()
    try:
        context = ssl.create_default_context(cafile=certificate[0])
        # Another client says nothing, and holds nobody up.
        with (
            socket.create_connection(("127.0.0.1", server.server_address[1])),
            urllib.request.urlopen(f"https://{server.address}/healthz", context=context, timeout=10) as answer,
        ):
            assert answer.read() == b"ok\n"
    finally:
        server.stop()
