"""Defines the errors that users read.

Library code raises `SynpipeError` with one paragraph that names the file, row or key and says what to do. The command
line prints this paragraph without a traceback and exits with 1; Dagster shows it as the failure of the asset. Any other
exception is a bug in synpipe.
"""


class SynpipeError(Exception):
    """The user's files, configuration or machine stop the work. The message says what is wrong and what to do."""


class NotFound(SynpipeError):
    """There is nothing with the name or id that was asked for."""


def one_line(error: BaseException) -> str:
    """The message of an exception in one line, or the name of its class if it has no message.

    Libraries such as HDF5 and Arrow write messages of several lines, often with indentation.
    """
    return " ".join(str(error).split()) or type(error).__name__
