"""The one place that says which version this is; read by packaging without importing anything."""

__version__ = "0.1.0"
