"""Fifty webhooks a second: each change of state stands in MLflow afterwards (a minute of it: benchmarks/bridge.py)."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.bridge import TOKEN, lost, make_runs, send, tags_of
from tests.bridge.conftest import BridgeProcess, SqliteMlflow
from tests.services import eventually

RATE, SECONDS = 50.0, 10.0


def test_no_change_of_state_is_lost_at_fifty_webhooks_a_second(tmp_path: Path) -> None:
    with SqliteMlflow(tmp_path / "mlflow") as mlflow:
        runs = make_runs(mlflow.url)
        bridge = BridgeProcess(tmp_path / "bridge", mlflow.url)
        bridge.token_file.write_text(TOKEN)
        with bridge:
            eventually(bridge.is_ready, "the bridge has read MLflow", 60)
            sent = asyncio.run(send(bridge.webhook, RATE, SECONDS))
        assert sent.changes == len(sent.waits) == 500
        artifacts = tmp_path / "mlflow" / "artifacts"
        assert lost(sent.changes, artifacts, tags_of(mlflow.url, runs)) == []
        # The check can fail: of changes that were never sent, it finds none.
        assert len(lost(sent.changes + 7, artifacts, tags_of(mlflow.url, runs))) >= 7
