"""The one kind of error that a user can cause: it says where, what was found, what was expected and what to do."""


class UserError(Exception):
    """A mistake in the input, not in the program: shown as its message alone, never as a traceback.

    The message names the file, row or key, what was found, what was expected, and what to do.
    """
