"""Errors that a user can mend: the command line prints them as one line, without a traceback."""


class UserError(ValueError):
    """What was given, what is legal and what to do, in one line."""


class Missing(UserError):
    """A file, model, extra or network that is not there."""


class Corrupt(UserError):
    """Something exists but is damaged or is not what it claims to be."""


class GateFailed(UserError):
    """A measured quality gate was not passed; the command line exits with 1."""
