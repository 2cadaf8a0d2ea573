"""Names that pickles of fused models look up here, though plans are in fusion/plan.py now.

Only ``pickle`` reads this file; `fused_classes` serves pickles too. Pickles of the first versions hold whole plans with
steps and children; later pickles call ``unread``.
"""

from .fusion.plan import Add, Call, Child, Fused, Linear, Plan, unread

__all__ = ["Add", "Call", "Child", "Fused", "Linear", "Plan", "unread"]
