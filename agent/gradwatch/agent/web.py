"""What is answered at which path."""

from __future__ import annotations

import time

from gradwatch.agent import page
from gradwatch.agent.server import Respond
from gradwatch.agent.service import Agent

_HTML = "text/html; charset=utf-8"
_TEXT = "text/plain; charset=utf-8"


def responder(agent: Agent) -> Respond:
    """Pages over an agent's present state."""

    def respond(path: str, accept: str) -> tuple[int, str, bytes] | None:
        if path == "/metrics":
            ended = agent.ends_shown()
            content, kind = agent.exposition.render(accept)
            agent.was_scraped(ended)
            return 200, kind, content
        if path == "/healthz":
            return (200, _TEXT, b"ok\n") if agent.healthy else (503, _TEXT, b"the loop has stopped\n")
        with agent.lock:
            runs = list(agent.runs.values())
            if path == "/":
                return 200, _HTML, page.front(runs, agent.old, str(agent.settings.root), time.time())
            name = path.removeprefix("/runs/")
            known = agent.runs.get(name) if name != path else None
            return None if known is None else (200, _HTML, page.detail(known, time.time()))

    return respond
