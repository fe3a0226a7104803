"""What an engine is told of during a pass, when it allocates and frees by itself. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

FETCH = "fetch"
RELEASE = "release"
GRADIENT = "gradient"
END_OF_PASS = "end"

NOWHERE = "-"


@dataclass(frozen=True)
class Mark:
    """A moment between two stretches of a part.

    Attributes:
        kind: a module is entered (`fetch`) or left (`release`) in either direction, a parameter has its gradient
            (`gradient`), or a micro-batch's backward pass has ended (`end`).
        name: of the module or parameter, within its block if it is in one; empty for the model or the block itself.
        offset: of its block's index from that of the part's block; None outside of blocks.
    """

    kind: str
    name: str
    offset: int | None

    def __str__(self) -> str:
        return " ".join((self.kind, NOWHERE if self.offset is None else str(self.offset), self.name)).rstrip()

    @classmethod
    def parse(cls, text: str) -> Mark:
        """The mark that `str` gave as text."""
        kind, offset, name = f"{text}  ".split(" ", 2)
        return cls(kind, name.strip(), None if offset == NOWHERE else int(offset))
