"""What a block keeps for its backward pass, in which format; the record pass and the replay."""

from framework.retention.blocks import blocks_of
from framework.retention.compiled import compile_blocks
from framework.retention.formats import KV_FORMATS
from framework.retention.head import forward_in_place, head_in_chunks, head_reads, head_rows
from framework.retention.output_layer import OutputLayer, output_layer_of
from framework.retention.selective import SelectiveRetention, apply_checkpointing

__all__ = [
    "KV_FORMATS",
    "OutputLayer",
    "SelectiveRetention",
    "apply_checkpointing",
    "blocks_of",
    "compile_blocks",
    "forward_in_place",
    "head_in_chunks",
    "head_reads",
    "head_rows",
    "output_layer_of",
]
