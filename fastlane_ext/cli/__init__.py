"""The ``fastlane`` command; each file of commands/ is one of its commands."""

from .program import main

__all__ = ["main"]
