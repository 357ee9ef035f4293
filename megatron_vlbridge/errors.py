"""The error type of the project: an input that cannot be handled exactly."""


class VLBridgeError(ValueError):
    """A configuration, checkpoint, batch or layout that is invalid or not verified.

    Its message states what is wrong, where, what was expected, what was found and what to do.
    """


class UsageError(VLBridgeError):
    """An argument whose value is invalid for any input, such as zero workers. `vlbridge` then exits with 2."""
