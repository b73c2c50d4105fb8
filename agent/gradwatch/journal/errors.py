"""The one exception of the journal."""


class JournalError(Exception):
    """A journal that cannot be used: the message says what, where, and what to do."""
