"""The two ways a command can end badly, and the exit status of each."""


class RetraceError(Exception):
    """Something went wrong while doing what was asked (exit status 1)."""


class RequestError(RetraceError):
    """What was asked for cannot be done as asked (exit status 2): what, where, and what to do."""
