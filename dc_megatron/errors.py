"""The one exception type for what a user can put right."""


class UserError(Exception):
    """Bad input from outside: the message says what was wrong, which value, where it came from and what to do.

    Programs print the message after ``error: `` and exit with status 2; nothing else is caught for the user.
    """
