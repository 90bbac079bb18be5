"""effjax: efficient deep learning in JAX, as parts that compose."""

__version__ = "0.1.0"
