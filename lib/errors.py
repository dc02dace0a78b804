"""The ways a command can end badly, and the exit status of each."""

import errno


class RetraceError(Exception):
    """Something went wrong while doing what was asked (exit status 1)."""


class RequestError(RetraceError):
    """What was asked for cannot be done as asked (exit status 2): what, where, and what to do."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (exit status 143)."""


_NOT_THE_REQUEST = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE}


def exit_status(failure: BaseException) -> int:
    """The one of a command that ends by this; a reader who has enough ends it well."""
    if isinstance(failure, BrokenPipeError):
        return 0
    if isinstance(failure, KeyboardInterrupt):
        return 143 if isinstance(failure, Terminated) else 130
    if isinstance(failure, OSError):
        return 2 if failure.filename and failure.errno not in _NOT_THE_REQUEST else 1
    return 2 if isinstance(failure, RequestError) else 1
