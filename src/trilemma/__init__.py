"""Can collaborative learning be private, robust and scalable? Measured on your own images and model."""

__version__ = "0.1.0"
