"""Make trained vision models faster with parameter-free layers."""

__version__ = "0.1.0"
