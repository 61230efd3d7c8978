"""The version of the package, its one written place."""

__version__ = "0.1.0"
