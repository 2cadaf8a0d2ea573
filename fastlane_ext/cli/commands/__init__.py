"""The commands of ``fastlane``, one in each file: a function computes a JSON-able result, another renders it."""
