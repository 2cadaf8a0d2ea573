"""The promises that ``fastlane check`` measures, as JSON-able rows: a process for each instruction set."""

from . import gelu, layers, process, published, rows

__all__ = ["gelu", "layers", "process", "published", "rows"]
