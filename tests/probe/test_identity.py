"""Every rank finds the same run at once, and no two trainings are taken for one."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradwatch.journal import layout
from gradwatch.probe import identity
from gradwatch.probe.identity import absolute_uri, mlflow_target, new_id, resolve, run_name, safe_id

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_given", set())
    monkeypatch.setattr(identity, "_process_group", lambda: None)


def test_the_first_variable_that_is_set_names_the_run() -> None:
    sources = [
        "GRADWATCH_RUN",
        "GRADWATCH_JOB_UID",
        "JOBSET_UID",
        "JOB_UID",
        "TORCHELASTIC_RUN_ID",
        "SLURM_JOB_ID",
    ]
    env = {name: f"id-of-{name}" for name in sources}
    for name in sources:
        found = resolve("churn", env)
        assert found.source == name
        assert found.run == (f"id-of-{name}" if name != "SLURM_JOB_ID" else "slurm-id-of-SLURM_JOB_ID-".rstrip("-"))
        del env[name]
    assert resolve("churn", env).source == "new"


def test_torchruns_default_id_names_nothing() -> None:
    assert resolve("churn", {"TORCHELASTIC_RUN_ID": "none"}).source == "new"
    assert resolve("churn", {"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "77"}).run == "slurm-77"


@pytest.mark.parametrize(
    ("env", "run"),
    [
        ({"SLURM_JOB_ID": "77"}, "slurm-77"),
        ({"SLURM_JOB_ID": "77", "SLURM_CLUSTER_NAME": "alps"}, "slurm-alps-77"),
        ({"SLURM_JOB_ID": "79", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "2"}, "slurm-77-2"),
        ({"SLURM_JOB_ID": "77", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "3"}, "slurm-77-step3"),
    ],
)
def test_a_slurm_job_an_array_task_and_a_step_have_their_own_ids(env: dict[str, str], run: str) -> None:
    assert resolve("churn", env).run == run


def test_a_second_run_of_one_process_has_its_own_id() -> None:
    env = {"GRADWATCH_RUN": "night-7"}
    assert [resolve("churn", env).run for _ in range(3)] == ["night-7", "night-7-2", "night-7-3"]


def test_ids_are_safe_for_the_file_system_and_distinct() -> None:
    hostile = [
        "",
        ".",
        "..",
        "../../etc/passwd",
        "a/b",
        "a b",
        "a\nb",
        "-rf",
        ".hidden",
        "é",
        "é",
        "x" * 500,
        "日本",
    ]
    ids = [safe_id(text) for text in hostile]
    assert len(set(ids)) == len(set(hostile))
    for run in ids:
        assert layout.RUN_NAME.fullmatch(run)
        assert safe_id(run) == run
    assert safe_id("Fine_id-1.2") == "Fine_id-1.2"


def test_new_ids_sort_by_time_name_the_model_and_never_collide() -> None:
    earlier, later = new_id("Churn LSTM!", now=1.7e9), new_id("Churn LSTM!", now=1.7e9 + 1)
    assert earlier < later
    assert re.fullmatch(r"churn-lstm-20231114T221320-[0-9a-f]{10}", earlier)
    assert len({new_id("m", now=0) for _ in range(10_000)}) == 10_000
    assert layout.RUN_NAME.fullmatch(new_id("/" * 300))


def test_a_run_has_a_name_for_people() -> None:
    assert run_name("a") == run_name("a")
    assert re.fullmatch(r"[a-z]+-[a-z]+-[0-9a-f]{2}", run_name("a"))
    assert len({run_name(str(n)) for n in range(1000)}) > 950
    assert resolve("churn", {"GRADWATCH_RUN_NAME": "Tuesday's"}).run_name == "Tuesday's"


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, (0, 0, 1, 1, True)),
        (TORCHRUN, (5, 1, 8, 4, True)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 3, 4, 4, False)),
        ({"RANK": "9"}, (9, 9, 10, 10, False)),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_NTASKS": "4"}, (0, 0, 1, 1, True)),  # a batch script
        (
            {
                "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NODEID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            },
            (5, 1, 8, 4, True),
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            (1, 1, 2, 2, True),
        ),
        ({"RANK": "x", "WORLD_SIZE": "-1", "LOCAL_RANK": ""}, (0, 0, 1, 1, True)),
    ],
)  # fmt: skip
def test_the_place_among_the_ranks(env: dict[str, str], place: tuple[int, int, int, int, bool]) -> None:
    found = resolve("churn", env)
    assert (
        found.rank,
        found.local_rank,
        found.world_size,
        found.local_world_size,
        found.local_rank_known,
    ) == place


def test_an_initialised_process_group_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_process_group", lambda: (1, 2))
    found = resolve("churn", {})
    assert (found.rank, found.world_size) == (1, 2)


@pytest.mark.parametrize(
    ("env", "attempt"),
    [
        ({"JOBSET_RESTART_ATTEMPT": "2"}, 2),
        ({"TORCHELASTIC_RESTART_COUNT": "3"}, 3),
        ({"SLURM_RESTART_COUNT": "1"}, 1),
        ({"JOBSET_RESTART_ATTEMPT": "2", "TORCHELASTIC_RESTART_COUNT": "1"}, 3),
        ({}, 0),
    ],
)
def test_the_launcher_tells_the_attempt_to_all_ranks_alike(env: dict[str, str], attempt: int, tmp_path: Path) -> None:
    for rank in range(3):
        identity._given.clear()
        found = resolve("churn", {"GRADWATCH_RUN": "r", "RANK": str(rank), "WORLD_SIZE": "3", **env}, tmp_path)
        assert found.attempt == attempt


def test_the_journal_knows_the_attempts_that_nothing_else_counted(tmp_path: Path) -> None:
    env = {"GRADWATCH_RUN": "r"}
    for attempt in range(3):
        identity._given.clear()
        found = resolve("churn", env, tmp_path)
        assert (found.attempt, found.attempt_source) == (attempt, "journal" if attempt else "first")
        layout.attempt_directory(tmp_path, "r", 0, attempt).mkdir(parents=True)
    (tmp_path / "r" / "rank-0" / "attempt-99x").mkdir()
    identity._given.clear()
    assert resolve("churn", {**env, "TORCHELASTIC_RESTART_COUNT": "1"}, tmp_path).attempt == 3
    identity._given.clear()
    assert resolve("churn", {**env, "TORCHELASTIC_RESTART_COUNT": "7"}, tmp_path).attempt == 7


SHOW = (
    "import json, sys; from gradwatch.probe.identity import resolve; "
    "i = resolve('churn', json.loads(sys.argv[1])); "
    "print(json.dumps([i.run, i.source, i.warning]))"
)
LAUNCH = (
    "import json, subprocess, sys\n"
    "for rank in range(3):\n"
    "    env = {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '3', 'LOCAL_WORLD_SIZE': '3'}\n"
    "    env.update(json.loads(sys.argv[2]))\n"
    "    subprocess.run([sys.executable, '-c', sys.argv[1], json.dumps(env)], check=True)\n"
)


def _launch(**env: str) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, SHOW, json.dumps(env)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_ranks_of_one_launcher_agree_and_two_launches_differ() -> None:
    first, second = _launch(), _launch()
    assert first[0][1:] == ["launcher", ""]
    assert first[0] == first[1] == first[2]
    assert second[0] == second[1] == second[2]
    assert first[0][0] != second[0][0]
    assert first[0][0].startswith("churn-2")


def test_nodes_that_share_nothing_are_told_what_to_set() -> None:
    several = _launch(WORLD_SIZE="6")
    assert "GRADWATCH_RUN" in several[0][2]


def test_the_active_mlflow_run_is_found_without_importing_mlflow() -> None:
    code = (
        "import sys; from gradwatch.probe.identity import mlflow_target as t; import os\n"
        "assert t({}).run_id is None and t({}).tracking_uri is None\n"
        "x = t({'MLFLOW_RUN_ID': 'abc', 'MLFLOW_TRACKING_URI': 'https://bob:hunter2@mlflow.example/'})\n"
        "assert (x.run_id, x.source) == ('abc', 'MLFLOW_RUN_ID'), x\n"
        "assert x.tracking_uri == 'https://mlflow.example/' and 'hunter2' not in repr(x), x\n"
        "assert x.secret_uri == 'https://bob:hunter2@mlflow.example/'\n"
        "assert 'mlflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_run_that_is_active_in_the_trainer_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri("sqlite:///here.db")
    try:
        with mlflow.start_run() as run:
            found = mlflow_target({"MLFLOW_RUN_ID": "other", "MLFLOW_TRACKING_URI": "http://other"})
        assert (found.run_id, found.source) == (run.info.run_id, "active")
        assert found.tracking_uri == f"sqlite:///{tmp_path}/here.db"
        assert found.experiment == run.info.experiment_id
    finally:
        mlflow.set_tracking_uri(before)


def test_a_broken_mlflow_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", object())  # type: ignore[arg-type]
    assert mlflow_target({"MLFLOW_RUN_ID": "abc"}).run_id == "abc"


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("sqlite:///a.db", "sqlite:///{}/a.db"),
        ("sqlite:////x/a.db", "sqlite:////x/a.db"),
        ("./mlruns", "{}/mlruns"),
        ("file:mlruns", "file:{}/mlruns"),
        ("file:///x/mlruns", "file:///x/mlruns"),
        ("http://host:5000", "http://host:5000"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_a_tracking_uri_means_the_same_elsewhere(
    uri: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri(uri) == meant.format(tmp_path)


def test_host_and_boot_are_known() -> None:
    found = resolve("churn", {})
    assert found.host == os.uname().nodename
    assert re.fullmatch(r"[0-9a-f-]{36}", found.boot_id)
    assert resolve("churn", {"NODE_NAME": "node-7"}).host == "node-7"
    assert all(a != b for a, b in itertools.pairwise(resolve("m", {}).run for _ in range(5)))
