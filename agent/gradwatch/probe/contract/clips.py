"""Is the clip where it has an effect, and of what it should be?

Where several codes have one cause, the specific one alone is reported: what is
clipped in the wrong place is not also called ineffective.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from gradwatch.probe.contract.report import Report
from gradwatch.probe.lane import Values, gather, on_host
from gradwatch.probe.norms import is_sharded, local

if TYPE_CHECKING:
    from gradwatch.probe.attempted import Clip
    from gradwatch.probe.optimizer import OptimizerProbe
    from gradwatch.probe.session import Session

#: How far above the threshold a clip's own rounding can leave the norm: five numbers are rounded one after the
#: other (norm, total, reciprocal, coefficient, gradient), each by up to 2⁻⁸ in bfloat16 and 2⁻¹¹ in float16.
#: Honest bfloat16 clips of whole models exceed it in half of the cases, by up to 0.6 %; of two elements, by 1.0 %.
TOLERANCE: Final = {torch.bfloat16: 5 * 2.0**-8, torch.float16: 5 * 2.0**-11}
_TOLERANCE_WIDE: Final = 1e-3
#: Half a step between the smallest numbers of float16, to which tiny gradients and coefficients are rounded.
_ROUNDED_FLOAT16: Final = 2.0**-25
#: Sampled steps in a row with an effective clip, after which its effect is no longer measured: some 3,000 steps.
TRUSTED_SAMPLES: Final = 36
#: Attempted steps after which a declared threshold without a clip is a finding.
MISSING_AFTER: Final = 20
#: A norm this far from the truth is coarse beyond what its dtype explains away (bfloat16 rounds to 0.4 %).
COARSE: Final = 0.02


class ClipChecks:
    """The clip contract of one optimizer."""

    def __init__(self, session: Session, report: Report) -> None:
        self._session, self._report = session, report
        self._declared = session.writer.manifest.max_norm
        self._without = 0
        self._clip_seen = self._own_said = False
        self._former_clipped = True
        self._behind = 0
        #: Samples in a row in which the clip was measured and found effective.
        self._effective = 0

    def regrouped(self) -> None:
        """The optimizer holds other parameters now: what was trusted is measured again."""
        self._effective = 0

    def before_step(self, probe: OptimizerProbe) -> None:
        """Gradients are as the optimizer will use them: judge every clip of this attempted step."""
        attempted = probe.attempted
        clips = attempted.clips
        if len(clips) == 1 and clips[0].plain and clips[0].backwards == attempted.backwards:
            # The common loop: one clip of everything, behind the last backward pass.
            self._clip_seen = self._former_clipped = True
            if probe.sampled:
                self._check_effect(probe, clips)
            return
        bounded = [clip for clip in clips if clip.max_norm < math.inf]
        if not bounded:
            self._no_clip(probe)
            return
        self._clip_seen = True
        if not self._own_said and any(clip.own_total for clip in bounded):
            self._own_said = True
            reason = "the loop clips by a norm that it came to by itself: its worth and its effect are not judged"
            self._session.event("metadata", values={f"unchecked.clip-norm.{probe.name}": reason})
        former, self._former_clipped = self._former_clipped, True
        judged = self._check_scale(probe, bounded) or self._check_place(probe, bounded, former)
        if not judged and probe.sampled:
            effective = [clip for clip in attempted.effective_clips() if clip.max_norm < math.inf]
            self._check_parts(probe, effective)
            self._check_effect(probe, effective)

    def landed(self, step: int, norm_type: float, used: float, true: float) -> None:
        """The norms of a clipped step are on the host: is the one that training used the true one?"""
        if norm_type != 2.0 or not math.isfinite(true) or math.isnan(used):
            return
        if math.isinf(used) or (true > 0 and abs(used / true - 1) > COARSE):
            how = "overflowed to infinity" if math.isinf(used) else f"is {used / true - 1:+.1%} off"
            self._report.violation(
                "clip-norm-overflow",
                step,
                f"the norm that the clip used {how}; the true gradient norm is {true:.6g}",
                {"used": used, "true": true},
            )

    # -- one question each

    def _no_clip(self, probe: OptimizerProbe) -> None:
        self._former_clipped = False
        if self._declared is None or self._clip_seen or probe.attempted.flags & 8 or self._session.traced:
            return
        self._without += 1
        if self._without >= MISSING_AFTER and self._report.count("clip-after-step") == 0:
            self._report.violation(
                "clip-missing",
                probe.step,
                f"max_norm={self._declared:g} was declared and no clip was seen in {self._without} attempted steps",
                {"max_norm": self._declared, "attempted_steps": self._without},
            )

    def _check_scale(self, probe: OptimizerProbe, clips: list[Clip]) -> bool:
        scaled = [clip for clip in clips if clip.scale is not None]
        if not scaled:
            return False
        scale = scaled[0].scale
        value = math.nan if isinstance(scale, Tensor) and not on_host(scale) else float(scale or 0.0)
        if value == 1.0:
            return False
        of = f"the loss scale {value:g}" if math.isfinite(value) else "the loss scale"
        self._report.violation(
            "clip-scaled-gradients",
            probe.step,
            f"gradients were clipped at {scaled[0].max_norm:g} with {of} still in them",
            {"max_norm": scaled[0].max_norm, "scale": value, "optimizer": probe.name},
        )
        return True

    def _check_place(self, probe: OptimizerProbe, clips: list[Clip], former_clipped: bool) -> bool:
        """Clips before the last backward pass. Only clips that cover the watched parameter tell of it.

        ``former_clipped``: whether the former attempt seemed to be clipped where it should be, as every
        attempt does whose backward passes were not seen yet.
        """
        backwards = probe.attempted.backwards
        telling = [clip for clip in clips if clip.watched]
        early = [clip for clip in telling if clip.backwards < backwards]
        if not early:
            self._behind = 0
            return False
        evidence = {"optimizer": probe.name, "max_norm": early[-1].max_norm, "backward_passes": backwards}
        if all(clip.backwards == 0 for clip in telling):
            # It ran on the gradients of the former step, behind that step.
            if not former_clipped or self._behind:
                self._behind += 1
                if self._behind >= 2:
                    self._report.violation(
                        "clip-after-step",
                        probe.step,
                        f"gradients were clipped at {early[-1].max_norm:g} behind optimizer.step(), "
                        "where they are no longer used",
                        evidence,
                    )
            self._former_clipped = False
            return True
        places = {clip.backwards for clip in telling if clip.backwards > 0}
        if telling[-1].backwards < backwards:
            self._report.violation(
                "clip-before-backward",
                probe.step,
                f"a backward pass ran between the clip at {telling[-1].max_norm:g} and the step",
                evidence,
            )
            return True
        if len(places) > 1:
            self._report.violation(
                "clip-each-microbatch",
                probe.step,
                f"gradients were clipped after each of {len(places)} backward passes of one step",
                {**evidence, "clips": len(places)},
            )
            return True
        return False

    def _check_parts(self, probe: OptimizerProbe, clips: list[Clip]) -> None:
        if not clips or any(clip.whole for clip in clips):
            return
        covered = {int(c) for clip in clips for c in clip.columns}
        names = [
            name
            for name, parameter, column in probe.holds.named()
            if parameter.grad is not None and column >= 0 and column not in covered
        ]
        if names:
            self._report.violation(
                "clip-partial",
                probe.step,
                f"the clip left out {len(names)} stepped tensors that have gradients, such as {names[0]}",
                {"optimizer": probe.name, "left_out": names[:20], "count_left_out": len(names)},
            )

    def _check_effect(self, probe: OptimizerProbe, clips: list[Clip]) -> None:
        """Measure the norm behind the clip, at a sampled step, and compare when it is on the host.

        Not before the clip's place among the backward passes can be seen: what a
        wrong place does to the norm has a code of its own.
        """
        if probe.searching or self._effective >= TRUSTED_SAMPLES:
            return
        self._effective += 1
        for clip in clips:
            grads = _gradients_of(probe, clip)
            total = clip.total
            if not grads or clip.logged or clip.own_total or any(is_sharded(g) for g in grads):
                continue
            if not isinstance(total, Tensor):
                continue
            tolerance = max(TOLERANCE.get(g.dtype, _TOLERANCE_WIDE) for g in grads)
            small = sum(g.numel() for g in grads if g.dtype is torch.float16)
            coarse = total.dtype is torch.float16
            norms = [torch.linalg.vector_norm(local(g).float(), clip.norm_type) for g in grads]
            after = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), clip.norm_type)
            step, bound = probe.step, clip.max_norm
            slack = bound * tolerance + math.sqrt(small) * _ROUNDED_FLOAT16 + 1e-12

            def judge(
                values: Values, step: int = step, bound: float = bound, slack: float = slack, coarse: bool = coarse
            ) -> None:
                norm, used = float(values[0]), float(values[1])
                if coarse:  # the coefficient bound / used was a float16
                    slack += used * _ROUNDED_FLOAT16
                if norm > bound + slack:
                    self._effective = 0
                    self._report.violation(
                        "clip-ineffective",
                        step,
                        f"the gradient norm at the step was {norm:.6g}, above the clip's threshold {bound:g}",
                        {"norm_after_clip": norm, "max_norm": bound, "optimizer": probe.name},
                    )

            both = gather([after, total.to(after.device, non_blocking=True)])
            if on_host(both):
                judge(both.numpy())
            else:
                self._session.lane.send(both, judge)


def _gradients_of(probe: OptimizerProbe, clip: Clip) -> list[Tensor]:
    """The present gradients of the parameters that a clip covered."""
    covered = set(clip.columns.tolist())
    return [p.grad for _, p, column in probe.holds.named() if column in covered and p.grad is not None]
