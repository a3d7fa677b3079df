"""The one exception that bad input raises, before anything is spent on it."""


class TransferError(ValueError):
    """Bad input. The message names the offending value, lists what is valid and gives the fix."""
