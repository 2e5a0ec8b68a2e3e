"""The error of a model that cannot be edited."""


class UnsupportedModelError(ValueError):
    """A model, or one of its layers, that cannot be edited; the message gives the reason and a remedy."""
