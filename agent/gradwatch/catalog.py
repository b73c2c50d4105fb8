# ruff: noqa: E501  (a table reads better with one row a line)
"""The catalogue: every metric gradwatch exports and every finding it can report.

This module is a leaf (it imports nothing of gradwatch) and the one truth: the
exporter refuses a series that is not listed here, ``docs/metrics.md`` and
``docs/findings/`` are generated from it, and alert rules and dashboards are
checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

PREFIX: Final = "gradwatch_"

MetricType = Literal["counter", "gauge", "histogram", "info"]
Scope = Literal["run", "rank", "agent", "bridge"]
Severity = Literal["info", "ticket", "page"]
FindingKind = Literal["contract", "health"]

#: The closed set of states of a run, in the order of a life.
RUN_STATES: Final = ("starting", "running", "stalled", "finished", "failed", "killed", "abrupt")
#: The states that a run does not leave, but by a new attempt.
END_STATES: Final = ("finished", "failed", "killed", "abrupt")
#: The quantiles of ``grad_norm_q``.
QUANTILES: Final = (0.5, 0.9, 0.95, 0.99)
#: Upper bounds of ``grad_norm_distribution``: two a decade from 1e-4 to 1e4.
GRAD_NORM_BUCKETS: Final = (*(float(f"{m}e{e}") for e in range(-4, 4) for m in (1, 3)), 1e4)
#: Upper bounds of ``step_duration_seconds``: from 100 µs to 10 minutes.
STEP_SECONDS_BUCKETS: Final = (1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported metric.

    ``name`` is without prefix and, for a counter, without ``_total``;
    ``labels`` come after ``model`` and ``run``, which every metric of scope
    ``run`` or ``rank`` carries. ``scope`` says who exports it: ``run`` comes
    once a run from the agent beside rank 0, ``rank`` also carries ``rank``.
    """

    name: str
    type: MetricType
    labels: tuple[str, ...]
    help: str
    unit: str = ""
    scope: Scope = "run"

    @property
    def family(self) -> str:
        """The family's name as ``# TYPE`` shows it in the classic text format."""
        return self.exposed

    @property
    def exposed(self) -> str:
        """The name of its series: prefix, name, and the suffix that its type demands."""
        suffix = {"counter": "_total", "info": "_info"}.get(self.type, "")
        return f"{PREFIX}{self.name}{suffix}"

    @property
    def all_labels(self) -> tuple[str, ...]:
        base = {"run": ("model", "run"), "rank": ("model", "run", "rank"), "agent": (), "bridge": ()}[self.scope]
        return base + self.labels


def _m(name: str, type_: MetricType, labels: str, help_: str, unit: str = "", scope: Scope = "run") -> Metric:
    return Metric(name, type_, tuple(labels.split()), help_, unit, scope)


METRICS: Final[tuple[Metric, ...]] = (
    # -- steps
    _m("steps", "counter", "optimizer", "Optimizer steps taken, each counted once however often it was replayed after a restart."),
    _m("replayed_steps", "counter", "optimizer", "Steps trained again because a restart resumed from an older checkpoint (lost work)."),
    _m("clipped_steps", "counter", "optimizer", "Steps whose pre-clip global gradient norm was above the clip threshold."),
    _m("nonfinite_steps", "counter", "optimizer", "Steps whose gradients held NaN or infinity and that no GradScaler skipped."),
    _m("skipped_steps", "counter", "optimizer", "Attempted steps that a GradScaler skipped because scaled gradients overflowed."),
    _m("step", "gauge", "optimizer", "Number of the last optimizer step."),
    _m("recent_steps", "gauge", "optimizer", "Steps in the recent window: the last 30 minutes, reaching back to at least 200 steps."),
    _m("recent_clipped_steps", "gauge", "optimizer", "Clipped steps in the recent window (see recent_steps)."),
    _m("recent_nonfinite_steps", "gauge", "optimizer", "Non-finite, unskipped steps in the recent window (see recent_steps)."),
    _m("nonfinite_steps_in_a_row", "gauge", "optimizer", "Length of the present unbroken series of non-finite, unskipped steps."),
    _m("step_duration_seconds", "histogram", "", "Time from one optimizer step to the next, validation and checkpoints included.", "seconds"),
    _m("samples", "counter", "", "Training samples consumed, where the loop logs them."),
    # -- gradients and clipping
    _m("grad_norm", "gauge", "optimizer", "Pre-clip, unscaled global L2 norm of the gradients at the last step."),
    _m("grad_norm_max", "gauge", "optimizer", "Largest pre-clip gradient norm of the last 60 seconds."),
    _m("grad_norm_q", "gauge", "optimizer q", "Quantiles of the pre-clip gradient norm over the last 1,000 steps."),
    _m("grad_norm_distribution", "histogram", "optimizer", "Distribution of the pre-clip gradient norm over all steps."),
    _m("clip_threshold", "gauge", "optimizer", "max_norm of the last gradient clip."),
    _m("clip_coefficient", "gauge", "optimizer", "Factor that the last clip put on the gradients: min(1, max_norm / (norm + 1e-6))."),
    _m("loss_scale", "gauge", "", "Loss scale of the GradScaler."),
    # -- weights
    _m("weight_norm", "gauge", "optimizer", "Global L2 norm of the weights at the last sample."),
    _m("update_ratio", "gauge", "optimizer", "Norm of the last sampled update over the norm of the weights."),
    _m("layer_grad_norm", "gauge", "layer", "Pre-clip L2 gradient norm of a layer (top layers, and 'other')."),
    _m("layer_weight_norm", "gauge", "layer", "L2 norm of a layer's weights at the last sample (top layers, and 'other')."),
    _m("layer_update_ratio", "gauge", "layer", "Sampled update norm over weight norm of a layer (top layers, and 'other')."),
    # -- hyperparameters
    _m("learning_rate", "gauge", "optimizer group", "Learning rate of a parameter group at the last step."),
    _m("effective_learning_rate", "gauge", "optimizer group", "Learning rate times clip coefficient, where the step is linear in the gradient (SGD family)."),
    _m("weight_decay", "gauge", "optimizer group", "Weight decay of a parameter group at the last step."),
    _m("hyperparameter", "gauge", "name group", "Numeric hyperparameters as the run was started with, by name and parameter group."),
    # -- losses and validation
    _m("loss", "gauge", "split slice", "Last loss by split (train: mean of the last window)."),
    _m("score", "gauge", "name split slice", "Last value of a validation metric by name."),
    _m("generalization_gap", "gauge", "metric slice", "Relative gap between validation and training, positive when validation is worse.", "ratio"),
    _m("gap_over_budget_validations", "gauge", "metric slice", "Validations in a row whose generalization gap was above the run's budget."),
    _m("validations", "counter", "", "Validations logged."),
    # -- budgets and service levels
    _m("clip_rate_budget", "gauge", "", "Share of recent steps that may be clipped before it is a problem.", "ratio"),
    _m("generalization_gap_budget", "gauge", "metric", "Relative generalization gap that the run tolerates.", "ratio"),
    _m("slo_events", "counter", "slo result", "Events of a service level: good and bad."),
    # -- findings
    _m("violations", "counter", "contract", "Violations of a training contract, by contract finding code."),
    _m("findings", "counter", "code severity", "Findings raised, by code and severity."),
    _m("finding_active", "gauge", "code severity", "1 while a finding is active, else 0."),
    # -- the run
    _m("run_state", "gauge", "state", "1 for the state that the run is in, 0 for the others."),
    _m("run_attempt", "gauge", "", "Number of the run's present attempt; 0 is the first."),
    _m("run_start_timestamp_seconds", "gauge", "", "Unix time at which the run's first attempt started.", "seconds"),
    _m("last_step_timestamp_seconds", "gauge", "", "Unix time of the last step.", "seconds"),
    _m("run", "info", "run_name tier optimizer scheduler precision mlflow_run_id commit model_version world_size torch_version gradwatch_version device host team", "Facts of the run, for joins and tables."),
    # -- each rank
    _m("rank_step", "gauge", "", "Number of a rank's last step.", scope="rank"),
    _m("rank_grad_norm", "gauge", "", "Pre-clip global gradient norm as this rank computed it.", scope="rank"),
    _m("rank_grad_norm_local", "gauge", "", "L2 norm of the gradient shards that this rank holds.", scope="rank"),
    _m("rank_grad_norm_squares", "gauge", "", "What this rank adds to the squared global gradient norm: of a sharded model the root of the sum over all ranks is the norm, on however many nodes they are. Absent where every rank holds the whole gradient.", scope="rank"),
    _m("rank_step_duration_seconds", "gauge", "", "Time of this rank's last step.", "seconds", scope="rank"),
    _m("rank_last_step_timestamp_seconds", "gauge", "", "Unix time of this rank's last step.", "seconds", scope="rank"),
    _m("probe_seconds", "counter", "", "Time that the probe spent on the training thread.", "seconds", scope="rank"),
    _m("journal_rows_missed", "counter", "", "Journal rows overwritten or torn before the agent read them.", scope="rank"),
    # -- the agent about itself
    _m("sink_errors", "counter", "sink", "Failed deliveries by sink.", scope="agent"),
    _m("sink_backlog", "gauge", "sink", "Items that a sink has still to deliver.", scope="agent"),
    _m("sink_dropped", "counter", "sink", "Items that fell out of a sink's bounded backlog.", scope="agent"),
    _m("agent_runs", "gauge", "", "Runs that the agent shows.", scope="agent"),
    _m("agent", "info", "version", "Facts of the agent.", scope="agent"),
    # -- the bridge
    _m("bridge_last_poll_timestamp_seconds", "gauge", "", "Unix time of the bridge's last good poll of MLflow.", "seconds", scope="bridge"),
    _m("bridge_poll_seconds", "gauge", "", "Duration of the bridge's last poll of MLflow.", "seconds", scope="bridge"),
    _m("bridge_ghost_runs", "gauge", "", "MLflow runs that stand at RUNNING without a heartbeat.", scope="bridge"),
    _m("bridge_webhooks", "counter", "result", "Alertmanager webhooks by result: accepted, failed (answered 503), refused.", scope="bridge"),
    _m("bridge_annotations", "counter", "result", "Grafana annotations by result: written, failed.", scope="bridge"),
    _m("bridge_reaped_runs", "counter", "", "Ghost runs that the bridge has closed.", scope="bridge"),
    _m("run_heartbeat_timestamp_seconds", "gauge", "model run run_name tier", "Unix time of the last heartbeat that the run's agent wrote to MLflow, for RUNNING runs.", "seconds", scope="bridge"),
    _m("run_heartbeat_state", "gauge", "model run state", "1 for the state that the last heartbeat of a RUNNING run told.", scope="bridge"),
    _m("retrains", "gauge", "model outcome", "Runs of a model in the look-back by outcome.", scope="bridge"),
    _m("retrains_recent_bad", "gauge", "model", "How many of the last 5 ended runs of a model ended badly.", scope="bridge"),
    _m("retrain_duration_seconds", "gauge", "model", "Duration of the last ended run of a model.", "seconds", scope="bridge"),
    _m("model_version_info", "gauge", "model alias version run optimizer scheduler", "1 for the current and the previous version of a model.", scope="bridge"),
    _m("model_version_score", "gauge", "model version name", "Last validation score recorded by the run behind a version.", scope="bridge"),
    _m("model_version_gap", "gauge", "model version metric", "Last generalization gap recorded by the run behind a version.", "ratio", scope="bridge"),
    _m("model_version_hyperparameter", "gauge", "model version name", "Numeric hyperparameters recorded with a version, under plain names (lr, weight_decay, max_norm, batch_size).", scope="bridge"),
    _m("score_drop_budget", "gauge", "model name", "Relative drop of a validation score that a model tolerates from one version to the next.", "ratio", scope="bridge"),
    _m("hyperparameter_drift", "gauge", "model name", "Relative change, without sign, of a hyperparameter of the model's newest run from its current version; for names and schedules 0 or 1.", "ratio", scope="bridge"),
    _m("metadata_complete", "gauge", "model version", "1 where the version carries all metadata that an audit needs.", scope="bridge"),
)  # fmt: skip

BY_NAME: Final[dict[str, Metric]] = {m.name: m for m in METRICS}


@dataclass(frozen=True, slots=True)
class FindingCode:
    """One thing that gradwatch can find wrong.

    ``kind`` is ``contract`` (exact, from the probe: what the code does is
    wrong, whatever the data) or ``health`` (statistical, from the agent: what
    training does is unhealthy).
    """

    code: str
    kind: FindingKind
    severity: Severity
    title: str
    advice: str


def _c(code: str, severity: Severity, title: str, advice: str) -> FindingCode:
    return FindingCode(code, "contract", severity, title, advice)


def _h(code: str, severity: Severity, title: str, advice: str) -> FindingCode:
    return FindingCode(code, "health", severity, title, advice)


FINDINGS: Final[tuple[FindingCode, ...]] = (
    _c("clip-scaled-gradients", "ticket", "Gradients were clipped while the GradScaler's loss scale was still in them", "Call scaler.unscale_(optimizer) before clipping; as it is, the threshold is compared with norms that are thousands of times too large."),
    _c("clip-each-microbatch", "ticket", "Gradients were clipped after each micro-batch of one step", "Clip once, after the last backward pass and before optimizer.step(): clipping partial sums bounds each addend and not the step."),
    _c("clip-before-backward", "ticket", "A backward pass ran between the clip and the step", "Move the clip behind the last backward pass; what it added was never clipped."),
    _c("clip-after-step", "ticket", "Gradients were clipped after the optimizer step that they were meant for", "Move the clip in front of optimizer.step(); behind it, it changes nothing that is used."),
    _c("clip-missing", "ticket", "A clip threshold was declared and no clip was seen", "Clip where the loop means to, or drop max_norm from watch(); engines that clip by themselves report through run.log_clip(total_norm, max_norm)."),
    _c("clip-partial", "ticket", "The clip covered a part of the stepped parameters only", "Pass all parameters of the optimizer to the clip, or clip each part on purpose and declare it."),
    _c("clip-ineffective", "ticket", "Gradients above the threshold reached the optimizer in spite of the clip", "See which gradients were replaced or grew between clip and step: a hook, a second clip, or a norm that was not the one of these gradients."),
    _c("clip-norm-overflow", "ticket", "The norm that the clip used overflowed its dtype while the true norm is finite", "Clip in float32: keep gradients or the norm in float32; an infinite norm sets every gradient to zero."),
    _c("norm-differs-between-ranks", "ticket", "Ranks disagree about the global gradient norm", "Each rank clips by another factor and replicas drift apart: compute the norm over all shards (DTensor's clip, FSDP's clip_grad_norm_), and check that every parameter is reduced."),
    _c("decay-on-bias-or-norm", "ticket", "Weight decay falls on biases or normalisation scales", "Put biases and normalisation scales into a parameter group with weight_decay=0."),
    _c("decay-coupled", "ticket", "An adaptive optimizer gets weight decay as L2 in the gradient", "Use AdamW or decoupled_weight_decay=True: adaptive scaling divides a coupled decay away where gradients are large."),
    _c("decay-dominates-gradient", "ticket", "Coupled weight decay is larger than the clipped gradient", "Lower the decay or raise the threshold: torch adds decay inside step(), after the clip, so the clip does not bound it."),
    _c("parameters-not-optimized", "ticket", "Trainable parameters are in no optimizer", "Add them to an optimizer, or set requires_grad=False to say that they are frozen."),
    _c("gradients-missing", "ticket", "Optimized parameters never receive a gradient", "See whether they are used in the forward pass, detached, or frozen by mistake."),
    _c("gradients-not-cleared", "ticket", "Gradients were not cleared between two steps", "Call optimizer.zero_grad() once a step; old gradients are added to new ones."),
    _c("scheduler-per-microbatch", "ticket", "The learning rate moves on micro-batches or before the first optimizer step", "Call scheduler.step() once for each optimizer step, behind it."),
    _c("hyperparameters-missing", "info", "Hyperparameters that reproduction needs are unknown", "Pass them to watch(config=...): batch size, and what the finding names."),
    _h("nonfinite-gradient", "ticket", "Gradients hold NaN or infinity", "Look at the first layer named in the evidence and at its batch; log(0), division by a zero count and fp16 overflow are the usual causes."),
    _h("nonfinite-loss", "ticket", "The loss is NaN or infinite", "Look at the batch of that step; when weights are finite, the input or the loss function is the cause."),
    _h("nonfinite-weight", "ticket", "Weights hold NaN or infinity", "Nothing that this run computes is of use any more: go back to the checkpoint before, and find the step that lost them (a broken gradient that no scaler skipped, a rate too high, an overflow in low precision)."),
    _h("gradient-spike", "info", "A gradient norm stands far out of its past", "Look at the batch of that step. If clipped, training went on bounded; repeated spikes point to corrupt records."),
    _h("clip-rate-high", "ticket", "More steps are clipped than the budget allows", "Above half of the steps, look at loss scale, data and learning rate before the threshold; else compare the threshold with the p99 of unclipped norms."),
    _h("gradient-exploding", "ticket", "Gradient norms have grown to a multiple of what they were", "Clip at the p99 of the norms before, then find the cause: learning rate, sequence length, a missing normalisation, or data that changed at that step."),
    _h("saturated", "ticket", "Gradients have nearly vanished while the loss is worse than before", "The network is stuck, not done: dead ReLUs or saturated activations after a step that was too large. Go back to a checkpoint before it, and lower the learning rate or clip."),
    _h("loss-spike", "ticket", "The training loss jumped far above its past", "Look at the batches of those steps. If it does not come back, restart from the checkpoint before it and skip them."),
    _h("loss-diverging", "ticket", "The training loss is giving back what it had learned", "Go back to a checkpoint before the rise, and lower the learning rate or skip the data of those steps."),
    _h("loss-not-decreasing", "ticket", "The training loss is no lower than at the start", "See whether gradients reach the weights, whether labels fit inputs, and whether the learning rate is large enough to move anything: overfitting ten samples on purpose tells code from data."),
    _h("loss-plateau", "info", "The training loss has not been better for half of the run", "The end of a healthy training looks the same. If it is not to be the end, lower the learning rate, or look at the size of the model."),
    _h("learning-rate-too-high", "ticket", "The learning rate is too high", "Lower the learning rate, or raise it from near zero over the first few hundred steps (warmup)."),
    _h("effective-learning-rate-low", "ticket", "The clip scales the steps so far down that training stands still", "With SGD a clip that binds at every step is a learning rate: raise the threshold to about the p99 of the norms, or the rate."),
    _h("clip-never", "info", "The clip threshold is far above anything that it sees", "For a guard that acts on outliers alone, set the threshold to about the p99 of healthy norms."),
    _h("clip-needs-review", "info", "What the clip threshold was chosen for has changed", "Choose the threshold again from the norms of a run with the new settings."),
    _h("overfitting", "ticket", "The validation loss rises while the training loss falls", "Take the checkpoint at the best validation and stop there; then get more data, or raise weight decay, dropout or augmentation."),
    _h("underfitting", "info", "The model has learned little, and learns no more", "A larger model, a higher learning rate, less regularisation, or better features; or the data holds no more."),
    _h("leakage-suspected", "info", "Validation is better than it can honestly be", "See whether samples, or what identifies them, are in both parts, and whether a feature tells the label. Dropout and augmentation explain a validation loss somewhat below the training loss."),
    _h("calibration-worse", "info", "Confidence drifts away from accuracy", "Stop earlier, use label smoothing, or scale temperatures on held-out data; accuracy alone does not show it."),
    _h("generalization-gap", "ticket", "The generalization gap exceeded its budget in three validations running", "Compare decay, augmentation and data with the last good run; stop early at the best validation."),
)  # fmt: skip

FINDING: Final[dict[str, FindingCode]] = {f.code: f for f in FINDINGS}
