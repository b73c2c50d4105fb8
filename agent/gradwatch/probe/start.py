"""How a run begins and ends: identity, journal, hooks, seam, and the agent beside it."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import time
from typing import Any

from torch import Tensor

from gradwatch import __version__
from gradwatch.journal import JournalWriter, attempt_directory, layout
from gradwatch.journal.manifest import Manifest, Optimizer
from gradwatch.journal.writer import DEFAULT_CAPACITY
from gradwatch.probe import collectives, ends, identity, launch, metadata, scaler, schedulers, seam, tensors, unfinished
from gradwatch.probe.arguments import Settings
from gradwatch.probe.aside import Aside
from gradwatch.probe.columns import MAX_GROUPS, StepColumns
from gradwatch.probe.contract import setup
from gradwatch.probe.mlflow_target import mlflow_target
from gradwatch.probe.run import Run
from gradwatch.probe.sampling import BUCKETS, sections
from gradwatch.probe.session import Session

#: Tensors beyond this many are in the global norm only.
MAX_TENSORS = 4096
#: Seconds that `finish` gives device values under way.
DRAIN_SECONDS = 2.0

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _inert_in_child() -> None:
    """A forked child has the parent's mappings and hooks: its stores would overwrite the parent's rows."""
    for session in list(_sessions):
        session.aside.off = True


os.register_at_fork(after_in_child=_inert_in_child)


def begin(settings: Settings, aside: Aside) -> Run:
    """Start recording. Raises ``OSError`` or whatever else went wrong; nothing is left hooked then."""
    _end_former(settings)
    unfinished.clear_up(_sessions)
    root = settings.root or launch.default_root(os.environ)
    who = identity.resolve(settings.name, os.environ, root)
    if who.warning:
        aside.say(who.warning)
    table = tensors.tensor_table(settings.models, settings.optimizers)[:MAX_TENSORS]
    group_counts = [sum(len(part.param_groups) for part in parts) for parts in settings.optimizers.values()]
    columns = StepColumns.of(group_counts, _has_tensor_rates(settings))
    facts = metadata.collect(
        settings.models,
        settings.optimizers,
        scheduler=settings.scheduler,
        config=settings.config,
        max_norm=settings.max_norm,
    )
    target = mlflow_target(os.environ)
    manifest = Manifest(
        run=who.run,
        model=settings.name,
        run_name=settings.run_name or who.run_name,
        tier=settings.tier,
        attempt=who.attempt,
        rank=who.rank,
        local_rank=who.local_rank,
        world_size=who.world_size,
        host=who.host,
        boot_id=who.boot_id,
        pid=os.getpid(),
        start_time=time(),
        parent=os.environ.get("GRADWATCH_PARENT", ""),
        gradwatch=__version__,
        optimizers=tuple(
            Optimizer(o["name"], o["class"], bool(o["linear"]), tuple(o["groups"])) for o in facts["optimizers"]
        ),
        tensors=tuple(row.tensor for row in table),
        host_columns=columns.host,
        device_columns=columns.device,
        sections=sections(len(table), settings.histograms),
        buckets=BUCKETS if settings.histograms else 0,
        budgets={
            **{code: float(value) for code, value in settings.budgets.items()},
            "clip_rate": settings.clip_rate_budget,
            "generalization_gap": settings.gap_budgets,
        },
        max_norm=settings.max_norm,
        hyperparameters=metadata.flatten(facts),
        config=facts["config"],
        mlflow=target.to_json(),
        unchecked=tuple(_unchecked(settings, table)),
        collectives=collectives.joined(row.parameter for row in table),
    )
    writer = _create(root, manifest)
    session = Session(
        writer, columns, settings.optimizers, {id(row.parameter): i for i, row in enumerate(table)}, aside, facts
    )
    aside.run = writer.manifest.run
    run = Run(session, aside, settings.optimizers)
    try:
        for probe in session.probes:
            if settings.initial_step is not None:
                probe.start_at(settings.initial_step)
        session.attach()
        seam.acquire(session)
        scaler.acquire(session)
        schedulers.acquire(session)
        setup.check_decay(session.contracts.report, facts["optimizers"], table)
        setup.check_coverage(session.contracts.report, _not_optimized(settings))
        run._ends = ends.watch_process_end(_weakly(run), writer.directory / layout.SIGTERM)
    except BaseException:
        _let_go(run, session)
        writer.close()
        raise
    _sessions.add(session)
    # It also keeps the run for as long as its optimizer is there, though the loop may not have kept it.
    session.ended_by_successor = functools.partial(run.finish, reason="watched again")
    try:
        # The tracking server's credentials reach the agent by its environment and are written nowhere.
        secret = {} if target.secret_uri is None else {"MLFLOW_TRACKING_URI": target.secret_uri}
        run._agent = launch.ensure_agent(root, {**os.environ, **secret})
    except Exception as error:
        aside.failed(error, "starting the agent")
    return run


def _weakly(run: Run) -> Callable[[ends.End], None]:
    """What the end of the process is told to, which does not keep the run alive until then."""
    here = weakref.ref(run)

    def told(end: ends.End) -> None:
        run = here()
        if run is not None:
            run._ended(end)

    return told


def _end_former(settings: Settings) -> None:
    """End the runs of optimizers that are watched anew, as where a notebook's cell is run again."""
    mine = {id(part) for parts in settings.optimizers.values() for part in parts}
    for session in list(_sessions):
        if any(id(part) in mine for probe in session.probes for part in probe.optimizers):
            session.ended_by_successor()


def finish(run: Run, session: Session, end: dict[str, Any]) -> None:
    """Write the end, let go of everything."""
    _let_go(run, session)
    if not session.aside.off:
        try:
            session.recorder.drain(DRAIN_SECONDS)
        except Exception as error:  # an accelerator whose context is lost answers nothing any more
            session.aside.failed(error, "taking in the last values of the device")
    # Also of a run whose recording stepped aside: it ended, and not abruptly.
    session.event("end", **end)
    _sessions.discard(session)
    session.writer.close()
    session.forget()
    if run._agent is not None:
        run._agent.finished(run.id)


def _let_go(run: Run, session: Session) -> None:
    session.detach()
    seam.release(session)
    scaler.release(session)
    schedulers.release(session)
    if run._ends is not None:
        run._ends.close()


def _create(root: Path, manifest: Manifest) -> JournalWriter:
    """Create the journal; an attempt whose number is taken already is the next one."""
    capacity = DEFAULT_CAPACITY
    asked = os.environ.get("GRADWATCH_JOURNAL_MB", "").strip()
    if asked:
        try:
            capacity = int(float(asked) * 2**20) or DEFAULT_CAPACITY
        except (ValueError, OverflowError):
            raise ValueError(f"GRADWATCH_JOURNAL_MB: expected a number of MiB, got {asked!r}") from None
    for _ in range(1000):
        directory = attempt_directory(root, manifest.run, manifest.rank, manifest.attempt)
        try:
            return JournalWriter(directory, manifest, capacity)
        except (FileExistsError, BlockingIOError):
            manifest = replace(manifest, attempt=manifest.attempt + 1)
        except ValueError:
            if not manifest.buckets:
                raise
            # Too many tensors for their histograms: the norms matter more.
            manifest = replace(manifest, buckets=0, sections=sections(len(manifest.tensors), False))
    raise FileExistsError(f"{root / manifest.run}: a thousand attempts already; remove old runs")


def _unchecked(settings: Settings, table: Sequence[tensors.TensorRow]) -> Iterator[dict[str, str]]:
    """What the probe cannot see in this run, for the manifest: a check that cannot fail must not look passed."""
    for entry, how in seam.coverage().items():
        if how == "none":
            yield {"check": f"clips through {entry}", "reason": "this torch has another function there"}
    if any(row.tensor.placement for row in table):
        yield {
            "check": "clip-each-microbatch, clip-before-backward, clip-after-step, gradients-not-cleared",
            "reason": "sharded parameters accumulate without gradient hooks: backward passes are not counted",
        }
        yield {
            "check": "clip-ineffective, clip-norm-overflow",
            "reason": "the norm of sharded gradients is known behind all ranks only, to the agent",
        }
    if any((row.tensor.placement or {}).get("kind") in ("flat", "unknown") for row in table):
        yield {
            "check": "clips by clip_grad_norm_ of FSDP1's module",
            "reason": "its own code: unless run.log_clip reports it, norms are those of clipped shards",
        }
    held = sum(len(g["params"]) for parts in settings.optimizers.values() for p in parts for g in p.param_groups)
    if held > MAX_TENSORS:
        yield {"check": "norms of each tensor", "reason": f"{held} tensors; the first {MAX_TENSORS} have columns"}
    if any(sum(len(p.param_groups) for p in parts) > MAX_GROUPS for parts in settings.optimizers.values()):
        yield {"check": "rates of each group", "reason": f"the first {MAX_GROUPS} parameter groups have columns"}
    if any(
        isinstance(g.get("lr"), Tensor) for parts in settings.optimizers.values() for p in parts for g in p.param_groups
    ):
        yield {"check": "scheduler-per-microbatch", "reason": "learning rates are tensors, which are not read here"}


def _not_optimized(settings: Settings) -> list[str]:
    """Names of trainable parameters that no optimizer holds."""
    held = {
        id(parameter)
        for parts in settings.optimizers.values()
        for part in parts
        for group in part.param_groups
        for parameter in group["params"]
    }
    named = tensors.named_parameters(settings.models)
    return [name for name, _, parameter in named if parameter.requires_grad and id(parameter) not in held]


def _has_tensor_rates(settings: Settings) -> bool:
    """Whether a learning rate lives on a device, where reading it would synchronise."""
    return any(
        isinstance(group.get("lr"), Tensor) and group["lr"].device.type != "cpu"
        for parts in settings.optimizers.values()
        for part in parts
        for group in part.param_groups
    )
