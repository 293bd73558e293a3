"""Errors that are the user's to mend: one sentence on the command line, never a traceback."""


class UserError(Exception):
    """One clear sentence that quotes the offending value and place. Command lines print it and exit with 1."""
