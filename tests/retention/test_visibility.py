"""The interval of keys that each query sees against the mask that transformers would fill."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from framework.retention import visibility
from framework.retention.visibility import Visibility

TOKENS = 23
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 11 + [2] * 7, [0] * 20 + [1] * 3])
RIGHT_PADDING = torch.arange(TOKENS) < torch.tensor([[TOKENS], [14]])
LEFT_PADDING = torch.arange(TOKENS) >= torch.tensor([[0], [6]])

MASKS = {
    "causal": (causal_mask_function, None),
    "window": (sliding_window_causal_mask_function(6), None),
    "chunks": (chunked_causal_mask_function(7, torch.zeros(2, dtype=torch.int64)), None),
    "packed": (and_masks(causal_mask_function, packed_sequence_mask_function(DOCUMENTS)), None),
    "right padding": (causal_mask_function, RIGHT_PADDING),
    "left padding": (causal_mask_function, LEFT_PADDING),
    "bidirectional": (bidirectional_mask_function, RIGHT_PADDING),
}


def described(function, padding):
    arguments = {
        "batch_size": 2,
        "q_length": TOKENS,
        "kv_length": TOKENS,
        "mask_function": function,
        "attention_mask": padding,
        "allow_is_causal_skip": False,
        "device": torch.device("cpu"),
    }
    return Visibility("sdpa", arguments), sdpa_mask(**arguments)[:, 0]


@pytest.mark.parametrize("elements", [visibility.ELEMENTS, 5 * TOKENS])
@pytest.mark.parametrize("name", MASKS)
def test_intervals_are_those_of_the_mask(monkeypatch, name, elements):
    monkeypatch.setattr(visibility, "ELEMENTS", elements)
    found, mask = described(*MASKS[name])
    ranges = found.ranges
    key = torch.arange(TOKENS)
    seen = (ranges.first[..., None] <= key) & (key <= ranges.last[..., None])
    assert torch.equal(seen.expand(2, -1, -1), mask)
    assert torch.equal(found.native[:, 0], mask)


@pytest.mark.parametrize(
    ("name", "causal"),
    [("causal", True), ("right padding", True), ("left padding", False), ("window", False), ("packed", False)],
)
def test_what_a_causal_kernel_does_by_itself(name, causal):
    """Padding behind real tokens is seen by none of them: what its own rows see is of no matter."""
    assert described(*MASKS[name])[0].ranges.causal == causal


def test_two_way_attention_without_padding_is_everything():
    ranges = described(bidirectional_mask_function, None)[0].ranges
    assert ranges.everything and not ranges.causal


def test_a_mask_with_gaps_is_no_interval():
    every_other = or_masks(lambda batch, head, query, key: (query - key) % 2 == 0, lambda *places: places[2] < 0)
    assert described(every_other, None)[0].ranges is None
