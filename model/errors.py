"""The one exception that users are meant to read."""


class UserError(Exception):
    """A mistake that the user can mend.

    Its message is one sentence that says what is wrong, where, and what to do next; commands print it without
    a traceback and exit with status 2.
    """
