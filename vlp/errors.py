"""Errors that a user can fix; the programs print their message on one line, without a traceback."""


class ArgumentError(ValueError):
    """A wrong option; the message names the value, what was expected and what to do."""


class ResumeError(ValueError):
    """A state that a run cannot be resumed from."""


class BadDataError(RuntimeError):
    """More rows are bad than the run allows."""


class UnsupportedModelError(ValueError):
    """A model that cannot be loaded, or does not support the task; the message says what to do."""
