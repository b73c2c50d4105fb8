"""Parts of the MLflow sink's tests: facts of a run, and a proxy that breaks what passes through it."""

from __future__ import annotations

import http.client
import json
import random
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gradwatch.collect.model import LayerTable, RunEnd, RunFacts, Window
from gradwatch.journal.manifest import Manifest, Optimizer
from gradwatch.sinks.mlflow import MlflowSink
from tests.services import MlflowServer, eventually

START = 1_700_000_000.0


def facts(
    run: str,
    attempt: int = 0,
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    mlflow: Mapping[str, str | None] | None = None,
    optimizers: tuple[str, ...] = ("default",),
    rank: int = 0,
    model: str | None = None,
) -> RunFacts:
    """Facts of a run in an experiment of its own (unless ``model`` says another)."""
    manifest = Manifest(
        run=run,
        model=model or f"model-{run}",
        run_name=f"name of {run}",
        attempt=attempt,
        rank=rank,
        world_size=2,
        gradwatch="0.1.0",
        optimizers=tuple(Optimizer(name) for name in optimizers),
        mlflow=dict(mlflow or {}),
    )
    return RunFacts(run, attempt, manifest, dict(hyperparameters or {"lr": 0.001, "git.commit": "c0ffee"}), START)


def window(number: int, *, attempt: int = 0, optimizer: str = "default", start: float = START) -> Window:
    """The fold of ten steps, with values that differ from window to window."""
    values = {"loss_mean": 1 / (number + 3), "grad_norm_max": number * 0.1 + 0.7, "grad_norm_last": 0.1 + number / 7}
    return Window(
        optimizer=optimizer,
        attempt=attempt,
        first_step=number * 10,
        last_step=number * 10 + 9,
        start_time=start + number,
        end_time=start + number + 0.9,
        steps=10,
        clipped=number % 4,
        nonfinite=0,
        skipped=0,
        replayed=0,
        values={**values, "clip_threshold_last": 1.0},
    )


def layer_table(step: int, layers: int = 3) -> LayerTable:
    names = [f"layer.{number}" for number in range(layers)]
    norms = [step + number / 8 for number in range(layers)]
    return LayerTable(step, 0, START + step, names, norms, norms, [float("nan")] * layers)


def end(state: str = "finished", reason: str = "", **more: Any) -> RunEnd:
    return RunEnd(state, reason or state, START + 60, 99, **more)


LAST_STEPS = {"step": [98.0, 99.0], "loss": [0.5, 0.25], "grad_norm": [1.5, float("inf")]}


@contextmanager
def sink(uri: str, state: Path, **options: Any) -> Iterator[MlflowSink]:
    """A sink with short pauses, drained at the end of the block."""
    options = {"backoff": (0.02, 0.2), "denied_pause": 0.2, "verify_after": (0.1, 0.3), **options}
    made = MlflowSink(uri, state_dir=state, **options)
    try:
        yield made
    finally:
        made.close(time.monotonic() + 20)


def drained(made: MlflowSink, seconds: float = 30.0) -> None:
    eventually(lambda: made.pending() == 0, "the sink has delivered all", seconds)


def stored_metrics(server: MlflowServer | Path, run_id: str) -> list[tuple[str, int, int, float]]:
    """What MLflow's database holds: (key, step, timestamp, value), read around MLflow."""
    path = server if isinstance(server, Path) else server.directory / "mlflow.db"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as database:
        query = "select key, step, timestamp, value from metrics where run_uuid = ? order by key, step, timestamp"
        rows = database.execute(query, (run_id,)).fetchall()
    database.close()
    return [(str(key), int(step), int(timestamp), float(value)) for key, step, timestamp, value in rows]


def expected_metrics(windows: list[Window], prefix: str = "gradwatch/") -> list[tuple[str, int, int, float]]:
    """The same from the windows themselves, with the clip rate counted here."""
    rows = []
    for each in windows:
        values = {**each.values, "steps": 10.0, "clip_rate": each.clipped / each.steps}
        rows += [(prefix + key, each.last_step, round(each.end_time * 1000), value) for key, value in values.items()]
    return sorted(rows, key=lambda row: row[:3])


# -- the proxy

#: What to do with a request: None to pass it on, a status to answer, or a number of seconds to wait before passing.
Rule = Callable[[str, str, bytes], "int | float | None"]


class FaultyProxy:
    """An HTTP proxy in front of a real server that breaks requests by ``rule(method, path, body)``."""

    def __init__(self, target: str) -> None:
        self.rule: Rule = lambda method, path, body: None
        #: What passed: (path, status, body).
        self.seen: list[tuple[str, int, bytes]] = []
        address = urllib.parse.urlsplit(target)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                verdict = proxy.rule(self.command, self.path, body)
                if isinstance(verdict, float):
                    time.sleep(verdict)
                elif verdict is not None:
                    self._answer(verdict, "application/json", _refusal(verdict), body)
                    return
                connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                try:
                    connection.request(self.command, self.path, body, headers)
                    answer = connection.getresponse()
                    content = answer.read()
                    kind = answer.getheader("Content-Type") or ""
                    self._answer(answer.status, kind, content, body)
                finally:
                    connection.close()

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass  # noqa: N815

            def _answer(self, status: int, kind: str, content: bytes, request: bytes) -> None:
                proxy.seen.append((self.path, status, request))
                with suppress(ConnectionError):  # whoever asked may be gone
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def calls(self, part: str) -> list[tuple[str, int, bytes]]:
        return [call for call in self.seen if part in call[0]]


def _refusal(status: int) -> bytes:
    code = {400: "INVALID_PARAMETER_VALUE", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}.get(status)
    return json.dumps({"error_code": code or "INTERNAL_ERROR", "message": "refused by the test"}).encode()


def half(status: int, seed: int = 1) -> Rule:
    """Break about half of all requests, by chance but the same in each run."""
    chance = random.Random(seed)
    return lambda method, path, body: status if chance.random() < 0.5 else None
