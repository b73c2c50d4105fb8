"""The bridge's HTTP: the webhook, health, metrics, and the document that describes them.

A webhook is answered when its alerts stand in MLflow. Until then the sender
keeps them: 503 means "tell it again", every other refusal says in words what is
wrong with the post itself.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gradwatch.bridge.alerts import WebhookError, parse_post
from gradwatch.bridge.openapi import WEBHOOK_PATH, document
from gradwatch.bridge.service import Bridge

_log = logging.getLogger("gradwatch.bridge")

#: Seconds for a body to arrive, and for its alerts to be written.
BODY_SECONDS: Final = 30.0
WRITE_SECONDS: Final = 300.0
#: Reasons for refused alerts that an answer lists.
MAX_REASONS: Final = 10
_RETRY: Final = {"Retry-After": "10"}


class RefusedError(Exception):
    """An answer other than 200 to a webhook."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def application(bridge: Bridge) -> Starlette:
    """The ASGI application; the bridge starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        bridge.start()
        try:
            yield
        finally:
            await asyncio.to_thread(bridge.stop)

    async def healthz(_: Request) -> Response:
        return _text(200, "ok") if bridge.healthy else _text(503, "the poll of MLflow hangs")

    async def readyz(_: Request) -> Response:
        return _text(200, "ok") if bridge.ready else _text(503, bridge.trouble)

    async def metrics(request: Request) -> Response:
        # Made on a thread: a page of many runs takes a while, and webhooks go on meanwhile.
        content, kind = await asyncio.to_thread(bridge.exposition.render, request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": kind})

    async def openapi(_: Request) -> Response:
        return JSONResponse(document())

    async def webhook(request: Request) -> Response:
        try:
            answer = await _take(bridge, request)
            bridge.webhooks["accepted"] += 1
            return JSONResponse(answer)
        except RefusedError as refusal:
            bridge.webhooks["failed" if refusal.status == 503 else "refused"] += 1
            headers = {503: _RETRY, 401: {"WWW-Authenticate": "Bearer"}}.get(refusal.status)
            return JSONResponse({"error": str(refusal)}, refusal.status, headers)

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
            Route(WEBHOOK_PATH, webhook, methods=["POST"]),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: _in_words, Exception: _unforeseen},
    )


async def _take(bridge: Bridge, request: Request) -> dict[str, Any]:
    """Check, read and write a webhook; what became of its alerts."""
    _authenticate(bridge.settings.webhook_token, request)
    body = await _body(request, bridge.settings.max_body_bytes)
    try:
        alerts, refused = await asyncio.to_thread(lambda: parse_post(json.loads(body)))
    except WebhookError as error:
        raise RefusedError(400, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is no JSON: {str(error)[:200]}") from None
    if refused and not alerts:
        raise RefusedError(400, f"no alert of {len(refused)} can be taken; {refused[0]}")
    promise = bridge.submit(alerts)
    if promise is None:
        raise RefusedError(503, bridge.trouble or "too many alerts wait already; tell it again later")
    try:
        results = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(promise)), WRITE_SECONDS)
    except TimeoutError:
        raise RefusedError(503, f"not written within {WRITE_SECONDS:.0f} s; it goes on, tell it again") from None
    if results["failed"]:
        raise RefusedError(
            503, f"{results['failed']} of {len(alerts)} alerts could not be written to MLflow; tell it again"
        )
    for reason in refused[:MAX_REASONS]:
        _log.warning("alert-refused %s", reason)
    counts = {name: results[name] for name in ("applied", "unchanged", "unknown")}
    return {**counts, "refused": results["refused"] + len(refused), "reasons": refused[:MAX_REASONS]}


def _authenticate(token: str | None, request: Request) -> None:
    if token is None:
        raise RefusedError(403, "webhooks are off: the bridge was started without a token for them")
    given = request.headers.get("authorization", "")
    # Header values are Latin-1 text; compared as bytes, in a time that says nothing about the token.
    if not hmac.compare_digest(given.encode("latin-1", "replace"), f"Bearer {token}".encode()):
        raise RefusedError(401, "a bearer token is needed, and this is not it")


async def _body(request: Request, limit: int) -> bytes:
    """The body, of at most ``limit`` bytes; what is too long is not read to its end."""
    too_long = RefusedError(
        413,
        f"the body is longer than {limit} bytes; set max_alerts in Alertmanager's webhook_config, or raise the limit",
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_long
    except TimeoutError:
        raise RefusedError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise RefusedError(400, "the body ended early") from None
    return bytes(body)


def _text(status: int, text: str) -> Response:
    return PlainTextResponse(f"{text}\n", status)


async def _in_words(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _unforeseen(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": "something went wrong; the bridge's log says what"}, 500)
