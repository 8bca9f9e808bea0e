"""The errors of all data sets for missing or unfit data."""

IGNORED = -1
"""The label of an evaluation sample that could not be read: do not count this sample."""

NO_EVENT = "it holds no event"
"""The message for an empty recording."""


class DataError(ValueError):
    """The data is missing or unfit; the message is one paragraph that says what was expected and what to do."""


class UnreadableError(DataError):
    """A sample cannot be read or does not fit; the message names its file."""


class LeftOutWarning(UserWarning):
    """A sample cannot be read and is left out; each process says it of the samples that it has met."""
