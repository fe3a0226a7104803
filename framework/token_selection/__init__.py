"""Token-selective training of a Hugging Face model in place: the Python interface.

framework.enable_token_selection(model)
model(**batch).loss.backward()          # train mode, labels given
framework.disable_token_selection(model)
"""

from framework.token_selection.enabling import disable_token_selection, enable_token_selection, fixed_selection
from framework.token_selection.state import TokenSelection
from framework.token_selection.trainers import TokenSelectionCallback

__all__ = [
    "TokenSelection",
    "TokenSelectionCallback",
    "disable_token_selection",
    "enable_token_selection",
    "fixed_selection",
]
