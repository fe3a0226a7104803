"""What a block keeps for its backward pass, in which format; the record pass and the replay."""

from framework.retention.blocks import blocks_of
from framework.retention.formats import KV_FORMATS
from framework.retention.head import head_in_chunks, head_reads, head_rows
from framework.retention.selective import SelectiveRetention, apply_checkpointing

__all__ = [
    "KV_FORMATS",
    "SelectiveRetention",
    "apply_checkpointing",
    "blocks_of",
    "head_in_chunks",
    "head_reads",
    "head_rows",
]
