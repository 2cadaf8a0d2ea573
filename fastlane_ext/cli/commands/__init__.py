"""The commands of ``fastlane``, one a file: a function that computes a JSON-able result, one that renders it."""
