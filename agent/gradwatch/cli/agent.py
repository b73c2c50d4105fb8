"""``gradwatch agent``: tails journals, serves ``/metrics`` and a status page, uploads to MLflow."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from gradwatch.cli import CommandError

if TYPE_CHECKING:
    from gradwatch.collect.model import Sink

#: Where the state goes by default, below the journals: names with a leading dot are no runs.
STATE: Final = ".agent"
DEFAULT: Final = "127.0.0.1:9460"
#: A bearer token that requests must bring, where no file is named.
TOKEN: Final = "GRADWATCH_AGENT_TOKEN"
#: Parameters of glibc's ``mallopt``.
_M_ARENA_MAX: Final = -8
_M_MMAP_THRESHOLD: Final = -3
_LOG_FORMAT: Final = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s"


def command(
    directory: Annotated[Path, typer.Option("--dir", help="The directory of journals to follow.", show_default=False)],
    state: Annotated[
        Path | None,
        typer.Option(help="Where the agent keeps its own state; by default DIR/.agent.", show_default=False),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where to serve; port 0 takes a free one and says which. By default 127.0.0.1:9460, or any free "
            "port where that is taken.",
            show_default=False,
        ),
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(metavar="URI", help="MLflow tracking server; by default MLFLOW_TRACKING_URI.", show_default=False),
    ] = None,
    until_done: Annotated[
        bool, typer.Option("--until-done", help="Leave when every run seen has ended and is delivered.")
    ] = False,
    drain: Annotated[
        bool,
        typer.Option(
            "--drain",
            help="When told to stop, follow the runs to their end first, and wait for a last scrape; for a sidecar, "
            "which is told after its trainer.",
        ),
    ] = False,
    grace: Annotated[float, typer.Option(help="Seconds to deliver what is left when told to stop.", min=0)] = 25.0,
    linger: Annotated[
        float,
        typer.Option(help="With --until-done or --drain: seconds for a last scrape, where something scrapes.", min=0),
    ] = 45.0,
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with a bearer token that requests must bring (or {TOKEN}).", show_default=False),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="TLS certificate (PEM).", show_default=False)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="TLS private key (PEM).", show_default=False)] = None,
) -> None:
    """Follow the journals below a directory: serve /metrics and a status page, upload to MLflow.

    Runs are found as they appear. The directory may be mounted read-only when --state names another one.
    One agent a directory: a second one says so and leaves.

    Examples:

        gradwatch agent --dir /journals
        gradwatch agent --dir /journals --state /var/lib/gradwatch --listen 0.0.0.0:9460
        gradwatch agent --dir /journals --mlflow http://mlflow:5000 --until-done
    """
    _stay_small()
    if not directory.is_dir():
        raise CommandError(f"{directory} is no directory; make it, or name the one where trainings write")
    host, port = _address(listen or DEFAULT)
    token = _token(token_file)
    if (tls_cert is None) != (tls_key is None):
        raise CommandError("TLS needs both --tls-cert and --tls-key")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=_LOG_FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
    logging.Formatter.converter = _utc

    from gradwatch.agent.service import Agent, Settings
    from gradwatch.agent.web import responder
    from gradwatch.journal import Lock

    store = _store(directory, state)
    try:
        lock = Lock(store.directory / "agent.lock")
    except BlockingIOError:
        print(f"gradwatch agent: another agent follows {directory} already{_who(store.directory)}", file=sys.stderr)
        raise typer.Exit(1) from None
    agent = Agent(
        Settings(directory.absolute(), until_done, grace, linger, drain),
        store,
        _sinks(mlflow, directory.absolute(), store.directory),
    )
    respond = responder(agent)
    try:
        server = _server(host, port, respond, token, tls_cert, tls_key)
    except CommandError:
        if listen is not None:
            raise
        # Nobody asked for this port: another agent, of another directory, may have it.
        server = _server(host, 0, respond, token, tls_cert, tls_key)
    agent.address = server.address
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    # Whoever started us may wait for signals with these blocked, and a process inherits that.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    # What a former agent counted is counted again before anybody can see less of it.
    agent.catch_up()
    server.start()
    scheme = "http" if tls_cert is None else "https"
    logging.getLogger("gradwatch.agent").info("listen address=%s://%s dir=%s", scheme, server.address, directory)
    try:
        while True:
            agent.run()
            if agent.stopped:
                break
            # A training that begins just now finds the lock held and starts no agent: look once more when it is free.
            agent.step_back()
            lock.release()
            if not agent.something_new():
                break
            try:
                lock = Lock(store.directory / "agent.lock")
            except BlockingIOError:
                break
    finally:
        agent.leave()
        server.stop()
        lock.release()


def _stay_small() -> None:
    """Settings that keep the resident memory flat, before numpy is imported and threads are started."""
    import ctypes
    import resource

    # numpy's BLAS would keep a pool of threads, and memory for each, for sums of a few numbers.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    # A journal is five descriptors while it is read.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # One arena for all threads (each scrape has one), and blocks of rows given back when they are done with.
    try:
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_ARENA_MAX, 1)
        allocator.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
    except (OSError, AttributeError):  # another C library than glibc
        pass


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdigit() or int(port) > 65_535:
        raise CommandError(
            f"--listen {listen}: write it as host:port, like 127.0.0.1:9460, or 127.0.0.1:0 for any port"
        )
    return host or "127.0.0.1", int(port)


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--token-file {file}: {error}") from None
    if not token:
        raise CommandError(f"--token-file {file} is empty")
    return token


def _store(directory: Path, state: Path | None) -> Any:
    from gradwatch.agent.store import Store

    place = state if state is not None else directory / STATE
    try:
        return Store(place)
    except OSError as error:
        hint = "" if state is not None else "; name a writable directory with --state"
        raise CommandError(f"cannot keep state in {place}: {error.strerror or error}{hint}") from None


def _who(state: Path) -> str:
    import json

    try:
        document = json.loads((state / "agent.json").read_text())
        return f": process {int(document['pid'])}, {str(document['address'])[:100]}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _sinks(uri: str | None, directory: Path, state: Path) -> list[Sink]:
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    if uri is None:
        return []
    from importlib.util import find_spec

    from gradwatch.sinks.mlflow import MlflowSink

    mlflow = MlflowSink(uri, state_dir=state)
    if find_spec("plotly") is None:
        return [mlflow]
    from gradwatch.sinks.reports import Reports

    return [mlflow, Reports(directory, uri, mlflow.run_id)]


def _server(host: str, port: int, respond: Any, token: str | None, cert: Path | None, key: Path | None) -> Any:
    from gradwatch.agent.server import Server

    tls = None if cert is None or key is None else (str(cert), str(key))
    try:
        return Server(host, port, respond, token=token, tls=tls)
    except OSError as error:
        if tls is not None and error.errno is None:
            raise CommandError(f"--tls-cert {cert}, --tls-key {key}: {error}") from None
        raise CommandError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --listen, "
            "or 127.0.0.1:0 for any free port"
        ) from None


def _utc(*arguments: Any) -> Any:
    import time

    return time.gmtime(*arguments[-1:])
