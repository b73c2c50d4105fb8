"""The model of the demo, and the score it is judged by."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gradwatch.demo.data import FEATURES


class ChurnLSTM(nn.Module):
    """An LSTM over a customer's events; a logit of leaving from the mean of their states, and of the
    events themselves."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, hidden, batch_first=True)
        self.head = nn.Linear(hidden + FEATURES, 1)

    def forward(self, events: Tensor, lengths: Tensor) -> Tensor:
        """``events``: (batch, longest, features), ``lengths``: (batch,); returns logits (batch,)."""
        packed = pack_padded_sequence(events, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        total = torch.cat([states, events], dim=2).sum(1)  # padding is zero in both
        logits: Tensor = self.head(total / lengths.unsqueeze(1)).squeeze(-1)
        return logits


def area_under_curve(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.float64]) -> float:
    r"""Area under the ROC curve by ranks, ties sharing theirs (Mann and Whitney 1947).

    .. math:: \mathrm{AUC} = \frac{R_+ - n_+ (n_+ + 1) / 2}{n_+ n_-}

    with :math:`R_+` the sum of the ranks of the positives. NaN where one of the classes is absent.
    """
    positive = labels > 0.5
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank_of_value = np.cumsum(counts) - (counts - 1) / 2.0
    rank_sum = float(rank_of_value[inverse][positive].sum())
    return (rank_sum - n_pos * (n_pos + 1) / 2.0) / (n_pos * n_neg)


@torch.no_grad()
def predict(model: nn.Module, events: Tensor, lengths: Tensor) -> Tensor:
    """Logits in evaluation mode; the mode is put back."""
    training = model.training
    model.eval()
    try:
        return model(events, lengths)  # type: ignore[no-any-return]
    finally:
        model.train(training)
