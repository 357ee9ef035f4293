"""The one error type of the project: an input that cannot be handled exactly."""


class VLBridgeError(ValueError):
    """A configuration, checkpoint, batch or layout that is wrong or not proved.

    Its message names what is wrong, where, what was expected, what was found and what to do.
    """


class UsageError(VLBridgeError):
    """An argument whose value is wrong whatever the input, such as no workers. `vlbridge` exits with 2 for it."""
