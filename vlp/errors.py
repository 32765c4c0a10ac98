"""Errors that a user can fix; programs print their message on one line, without a traceback."""


class ArgumentError(ValueError):
    """A wrong option; the message names the value, what was expected and what to do."""


class ResumeError(ValueError):
    """A state that cannot be gone on from."""


class BadDataError(RuntimeError):
    """More rows are bad than the run allows."""
