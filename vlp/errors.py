"""Errors that a user can fix. The programs print the message on one line, without a traceback."""


class ArgumentError(ValueError):
    """An invalid option; the message gives the value, what was expected and how to fix it."""


class ResumeError(ValueError):
    """A state that a run cannot be resumed from."""


class BadDataError(RuntimeError):
    """The data has more bad rows than the run allows."""


class UnsupportedModelError(ValueError):
    """A model that cannot be loaded or does not support the task; the message says how to fix it."""
