"""The one exception of this room."""


class InteropError(ValueError):
    """A folder that cannot be read, or a model that cannot be written; the message names the file, field or tensor."""
