"""The expected calibration error of a validation, on whatever device its probabilities are."""

from __future__ import annotations

import torch
from torch import Tensor

from gradwatch.probe.lane import on_host

#: Bins of equal width, as in the source.
BINS = 15


def expected_calibration_error(probabilities: Tensor, targets: Tensor, bins: int = BINS) -> Tensor:
    """How far confidence is from accuracy: Σ over bins (n_b / n) · |accuracy_b − confidence_b|, 0 to 1.

    A prediction is the class of the largest probability, its confidence that
    probability; bin *b* holds the confidences in (b / bins, (b + 1) / bins].

    Args:
        probabilities: shape (samples, classes), each row summing to 1; or (samples,), the probability of class 1.
        targets: shape (samples,), the true classes.
        bins: number of bins of equal width.

    Returns:
        A float32 scalar; nothing is synchronised: where one of the two is on the host, it goes to the other's
        device, and the result is there. NaN of no samples.

    Raises:
        ValueError: for shapes that do not fit.

    Source: Guo et al. (2017), *On Calibration of Modern Neural Networks*, equation 3.
    """
    # Never from a device to the host, which would wait for it.
    device = targets.device if on_host(probabilities) else probabilities.device
    probabilities, targets = probabilities.detach().to(device).float(), targets.detach().to(device)
    if probabilities.ndim == 1:
        probabilities = torch.stack([1 - probabilities, probabilities], dim=1)
    if probabilities.ndim != 2 or targets.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities of shape (samples, classes) or (samples,) and targets of shape (samples,) are needed, got "
            f"{tuple(probabilities.shape)} and {tuple(targets.shape)}"
        )
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == targets).float()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    # Within a bin n_b · |accuracy − confidence| is the size of the sum of differences.
    sums = torch.zeros(bins, device=confidence.device).index_add_(0, which, right - confidence)
    return sums.abs().sum() / len(confidence) if len(confidence) else sums.sum() * float("nan")
