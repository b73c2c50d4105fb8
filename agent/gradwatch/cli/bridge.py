"""``gradwatch bridge``: between MLflow, Alertmanager and Grafana; one for all runs."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from gradwatch.cli import CommandError

_LOG_FORMAT: Final = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s"
_PREFIX: Final = "GRADWATCH_BRIDGE_"
_MODES: Final = ("off", "dry-run", "on")
_HISTORY, _ALERTS, _GHOSTS = "From MLflow to metrics", "From alerts to MLflow and Grafana", "Runs that died unseen"


def _option(*names: str, help: str, panel: str | None = None, variable: str = "", **more: Any) -> Any:
    """An option that can be given in the environment too."""
    name = (names or ("",))[0].removeprefix("--").replace("-", "_").upper()
    return typer.Option(*names, help=help, envvar=variable or f"{_PREFIX}{name}", rich_help_panel=panel, **more)


def command(
    mlflow: Annotated[
        str,
        _option("--mlflow", metavar="URI", help="MLflow tracking server; by default MLFLOW_TRACKING_URI."),
    ] = "",
    listen: Annotated[
        str, _option("--listen", help="Address and port to serve on; port 0 takes a free one and says which.")
    ] = "127.0.0.1:9465",
    interval: Annotated[
        float, _option("--interval", help="Seconds from one poll of MLflow to the next.", panel=_HISTORY, min=1)
    ] = 30.0,
    poll_budget: Annotated[
        float,
        _option(
            "--poll-budget",
            help="Seconds after which a poll asks for no further page; it goes on in the next.",
            panel=_HISTORY,
            min=0.1,
        ),
    ] = 10.0,
    look_back: Annotated[
        float, _option("--look-back", help="Days for which retrains are counted.", panel=_HISTORY, min=0.01)
    ] = 30.0,
    aliases: Annotated[
        str,
        _option(
            "--aliases", help="Aliases that make a version the current one, the first that is there.", panel=_HISTORY
        ),
    ] = "champion,production,prod",
    webhook_token_file: Annotated[
        Path | None,
        _option(
            "--webhook-token-file",
            help=f"File with the bearer token that Alertmanager brings (or {_PREFIX}WEBHOOK_TOKEN). "
            "Without one, webhooks are refused.",
            panel=_ALERTS,
        ),
    ] = None,
    max_body: Annotated[int, _option("--max-body", help="Largest webhook in bytes.", panel=_ALERTS, min=1024)] = 32
    * 2**20,
    alertmanager: Annotated[
        str,
        _option(
            "--alertmanager",
            metavar="URL",
            help="Alertmanager, asked for what it holds after MLflow was away.",
            panel=_ALERTS,
        ),
    ] = "",
    grafana: Annotated[
        str, _option("--grafana", metavar="URL", help="Grafana, which gets an annotation an alert.", panel=_ALERTS)
    ] = "",
    grafana_token_file: Annotated[
        Path | None,
        _option(
            "--grafana-token-file",
            help=f"File with a service account's token (or {_PREFIX}GRAFANA_TOKEN).",
            panel=_ALERTS,
        ),
    ] = None,
    reap: Annotated[
        str,
        _option(
            "--reap",
            metavar="off|dry-run|on",
            help="What to do with runs that stand at RUNNING and whose heartbeat is older than a day: nothing, "
            "say so in the log, or close them.",
            panel=_GHOSTS,
        ),
    ] = "off",
    prometheus: Annotated[
        str,
        _option(
            "--prometheus",
            metavar="URL",
            help="Prometheus that scrapes this bridge and the agents; --reap on asks it for live series.",
            panel=_GHOSTS,
        ),
    ] = "",
    grace: Annotated[
        float, _option("--grace", help="Seconds to end what is under way when told to stop.", min=0)
    ] = 20.0,
) -> None:
    """Turn MLflow's history into metrics, and alerts into MLflow tags and Grafana annotations.

    One bridge serves all runs; it keeps nothing that a restart would lose. Every option can stand in the
    environment as GRADWATCH_BRIDGE_ and its name. It serves /metrics, /healthz, /readyz, /openapi.json and takes
    Alertmanager's webhooks at /webhooks/alertmanager.

    Examples:

        gradwatch bridge --mlflow http://mlflow:5000
        gradwatch bridge --mlflow http://mlflow:5000 --listen 0.0.0.0:9465 \\
            --webhook-token-file /etc/gradwatch/token --alertmanager http://alertmanager:9093
        gradwatch bridge --mlflow http://mlflow:5000 --reap dry-run

    In alertmanager.yml:

        receivers:
        - name: gradwatch
          webhook_configs:
          - url: http://bridge:9465/webhooks/alertmanager
            http_config: {authorization: {credentials_file: /etc/alertmanager/token}}
    """
    uri = mlflow or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise CommandError("which MLflow? give --mlflow http://host:5000, or set MLFLOW_TRACKING_URI")
    if reap not in _MODES:
        raise CommandError(f"--reap {reap}: choose off, dry-run or on")
    if reap == "on" and not prometheus:
        raise CommandError(
            "--reap on needs --prometheus: no run is closed while nobody can say that it has no live series"
        )
    grafana_token = _token("--grafana-token-file", grafana_token_file, f"{_PREFIX}GRAFANA_TOKEN")
    if grafana and not grafana_token:
        raise CommandError(f"--grafana needs a token: --grafana-token-file FILE, or {_PREFIX}GRAFANA_TOKEN")
    for name, url in (("--alertmanager", alertmanager), ("--grafana", grafana), ("--prometheus", prometheus)):
        if url and not url.startswith(("http://", "https://")):
            raise CommandError(f"{name} {url}: write it with http:// or https://")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=_LOG_FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
    logging.Formatter.converter = _utc

    from gradwatch.bridge.service import Bridge, Settings

    settings = Settings(
        tracking_uri=uri,
        interval=interval,
        poll_budget=poll_budget,
        look_back_days=look_back,
        aliases=[alias.strip() for alias in aliases.split(",") if alias.strip()],
        webhook_token=_token("--webhook-token-file", webhook_token_file, f"{_PREFIX}WEBHOOK_TOKEN"),
        max_body_bytes=max_body,
        alertmanager=alertmanager or None,
        grafana=grafana or None,
        grafana_token=grafana_token or "",
        prometheus=prometheus or None,
        reap=reap,  # type: ignore[arg-type]
        grace=grace,
    )
    _serve(Bridge(settings), _bind(listen), grace)


def _serve(bridge: Any, listener: socket.socket, grace: float) -> None:
    import uvicorn

    from gradwatch.bridge.web import application

    host, port = listener.getsockname()[:2]
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    logging.getLogger("gradwatch.bridge").info(
        "listen address=http://%s webhooks=%s", shown, bool(bridge.settings.webhook_token)
    )
    # uvicorn raises the signal again once it is done; an end in good order is no death by signal.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        application(bridge),
        log_config=None,
        access_log=False,
        server_header=False,
        # Longer than senders keep a connection that does nothing: who closes first loses no post on its way.
        timeout_keep_alive=120,
        timeout_graceful_shutdown=max(1, round(grace)),
        lifespan="on",
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    uvicorn.Server(config).run(sockets=[listener])


def _bind(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not port.isdigit() or int(port) > 65_535:
        raise CommandError(
            f"--listen {listen}: write it as host:port, like 127.0.0.1:9465, or 127.0.0.1:0 for any port"
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=512)
    except OSError as error:
        raise CommandError(
            f"cannot listen on {listen}: {error.strerror or error}; choose another with --listen, or 127.0.0.1:0"
        ) from None


def _token(option: str, file: Path | None, variable: str) -> str | None:
    if file is None:
        return os.environ.get(variable) or None
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{option} {file}: {error}") from None
    if not token:
        raise CommandError(f"{option} {file} is empty")
    return token


def _utc(*arguments: Any) -> Any:
    import time

    return time.gmtime(*arguments[-1:])
