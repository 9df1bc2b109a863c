"""The one exception for mistakes that a user can make and mend."""


class UserError(ValueError):
    """A sentence that names the culprit, what was found, what is expected and the remedy.

    Commands print it without a traceback and exit with status 1.
    """
