"""The error of a training row that cannot be used."""


class BadRow(ValueError):
    """A row that cannot be trained on; the message is the reason, without the place."""
