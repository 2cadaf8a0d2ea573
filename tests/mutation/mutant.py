"""The definition of a mutant."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """MUTANT in `broken` is true while this mutant is chosen; the code then has the fault that the name describes."""

    name: str
    file: str
    text: str  # stands in the file once
    broken: str
    near: str  # the test file that is tried first
    path: str = "fused"  # FASTLANE_PATH
    kernel_sets: tuple[str, ...] = ()  # those whose results it changes, if not all
    shows_in_sweep: bool = True  # the sweep looks at what it changes, if it is one of the kernels

    def switch(self, number: int) -> str:
        """The expression that is true while mutant ``number`` is chosen."""
        if self.file.endswith(".py"):
            return f"(_mutant.NUMBER == {number})"
        return f"(fastlane_mutant == {number})"
