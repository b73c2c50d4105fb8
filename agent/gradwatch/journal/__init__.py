"""The journal: the only contract between the training process and the agent.

One attempt of one rank is one directory::

    <root>/<run>/rank-<k>/attempt-<n>/
      manifest.json   identity, columns, tensor names, hyperparameters
      steps.ring      a row a step, float64 columns
      tensors.ring    a row a step, float32 gradient norm of every tensor
      samples.ring    a row a sample, float32 sections (weight norms, histograms, ...)
      events.jsonl    validations, contract findings, metadata, finish
      lock            held by the trainer for life

The training process writes (:class:`JournalWriter`), everybody else reads
(:class:`JournalReader`). A store into a mapped page survives the death of the
process, so nothing has to be flushed. ``docs/journal.md`` is the format's
specification.
"""

from gradwatch.journal.errors import JournalError
from gradwatch.journal.layout import attempt_directory, find_attempts
from gradwatch.journal.liveness import Lock, is_locked
from gradwatch.journal.reader import Events, JournalReader, PayloadRows, StepRows
from gradwatch.journal.ring import RingGeometry
from gradwatch.journal.writer import JournalWriter

__all__ = [
    "Events",
    "JournalError",
    "JournalReader",
    "JournalWriter",
    "Lock",
    "PayloadRows",
    "RingGeometry",
    "StepRows",
    "attempt_directory",
    "find_attempts",
    "is_locked",
]
