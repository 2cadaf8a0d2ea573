"""What a mutant is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In `broken`, MUTANT is true while this mutant is the chosen one; then the code does what the name says."""

    name: str
    file: str
    text: str  # stands in the file once
    broken: str
    near: str  # the test file that is tried first
    path: str = "fused"  # FASTLANE_PATH

    def switch(self, number: int) -> str:
        """The expression that is true while mutant ``number`` is the chosen one."""
        if self.file.endswith(".py"):
            return f'(__import__("os").environ.get("FASTLANE_MUTANT") == "{number}")'
        return f"(fastlane_mutant == {number})"
