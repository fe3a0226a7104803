"""Which tokens receive gradient: strategies, inclusion probabilities and seeding.

Nothing here knows a model or a device: a strategy sees which positions carry a label and which document each
token belongs to, and answers with a `Selection`.
"""

from framework.selection.selection import Selection
from framework.selection.strategies import STRATEGIES, check_options, normalization_of, select, selects_runs
from framework.selection.supervision import IGNORED, documents_of, pooled_positions, supervised_positions

__all__ = [
    "IGNORED",
    "STRATEGIES",
    "Selection",
    "check_options",
    "documents_of",
    "normalization_of",
    "pooled_positions",
    "select",
    "selects_runs",
    "supervised_positions",
]
