"""The one error that a user is meant to read.

Library code raises `SynpipeError` with one paragraph that names the file, row or key and says what to do. The command
line prints it without a traceback and exits with 1; Dagster shows it as the failure of the asset. Any other exception
is a bug in synpipe.
"""


class SynpipeError(Exception):
    """Something in the user's files, configuration or machine stops the work; the message says what and what to do."""


class NotFound(SynpipeError):
    """What was asked for by its name or id is not there."""


def one_line(error: BaseException) -> str:
    """The message of an exception as one line, or its class name where it has no message.

    Libraries such as HDF5 and Arrow write several lines, often with indentation.
    """
    return " ".join(str(error).split()) or type(error).__name__
