"""The measuring protocol behind ``fastlane bench`` and the scripts in ``benchmarks/``.

``protocol`` times contestants that take turns and measures their peak memory. ``machine`` measures the machine's own
limits. ``contestants`` and ``model_contestants`` build the contestants. ``cases`` has the kinds of cases on which they
meet. ``suites`` lists the cases and makes rows of the results.
"""

from .protocol import Race, Skipped, Timing, peak_memory, race

__all__ = ["Race", "Skipped", "Timing", "peak_memory", "race"]
