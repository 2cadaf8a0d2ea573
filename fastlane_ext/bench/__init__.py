"""The measuring protocol behind ``fastlane bench`` and the scripts in ``benchmarks/``.

``protocol`` times contestants that take turns and measures their peak memory, ``machine`` finds the
machine's own limits, ``contestants`` builds what is compared and ``suites`` says on which shapes and
turns it all into rows.
"""

from .protocol import Race, Skipped, Timing, peak_memory, race

__all__ = ["Race", "Skipped", "Timing", "peak_memory", "race"]
