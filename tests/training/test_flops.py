"""Counts of floating-point operations against torch's counter on real steps, and against slow counting by hand."""

from __future__ import annotations

import itertools
from functools import partial

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from framework.config import AdapterConfig
from framework.data import Batch
from framework.models.adapters import add_adapter
from framework.models.products import Attention, Reach, matrix_products
from framework.retention import blocks_of
from framework.selection import Selection, supervised_positions
from framework.token_selection import disable_token_selection, enable_token_selection, fixed_selection
from framework.training.flops import Flops, FlopTally, seen_pairs, utilisation
from framework.training.loss import exact_loss, unwrapped

VOCABULARY = families.VOCABULARY
SELECTIVE = [("selective", False), ("selective", True)]
POLICIES = [("all", False), ("checkpoint", False), *SELECTIVE]


def by_query_heads(query, shape):
    """The shape of keys or values with as many heads as queries, which torch 2.11's formulas ask for."""
    return (*shape[:1], query[1], *shape[2:])


def forward_formula(query, key, value, *_, out_shape=None, **__):
    return sdpa_flop_count(query, by_query_heads(query, key), by_query_heads(query, value))


def backward_formula(grad, query, key, value, *_, out_shape=None, **__):
    return sdpa_backward_flop_count(grad, query, by_query_heads(query, key), by_query_heads(query, value))


def visible_pairs(first, last):
    return int((last - first + 1).clamp(min=0).sum())


def attend_formula(query, key, value, key_scale, value_scale, first, last, *_, out_val=None, **__):
    return 2 * visible_pairs(first, last) * query.shape[1] * (query.shape[-1] + value.shape[-1])


def attend_backward_formula(
    grad, query, key, value, key_scale, value_scale, output, lse, first, last, selected_key, selected_value, positions,
    *_, out_val=None, **__,
):  # fmt: skip
    """Scores, and the gradients of shares and queries, for keys that a query sees; two more for selected ones."""
    seen = (first[..., None] <= positions[:, None]) & (positions[:, None] <= last[..., None])
    both = int((seen & (positions[:, None] >= 0)).sum())
    size, value_size = query.shape[-1], value.shape[-1]
    by_query = visible_pairs(first, last) * (2 * size + value_size)
    return 2 * query.shape[1] * (by_query + both * (size + value_size))


# Given tensors, not their shapes.
attend_formula._get_raw = attend_backward_formula._get_raw = True

# torch counts none of these on the CPU; two formulas are its own, those of the kernels on CUDA.
CPU_ATTENTION = {
    torch.ops.selectrain.attend: attend_formula,
    torch.ops.selectrain.attend_backward: attend_backward_formula,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward_formula,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_formula,
}


def padded_batch(model, padding: int = 5) -> Batch:
    inputs = families.sample_inputs(unwrapped(model), padding=padding)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    documents = torch.tensor([[7], [9]]).expand(2, 24).masked_fill(inputs["attention_mask"] == 0, -1)
    supervised = supervised_positions(inputs["labels"], causal=True)
    return Batch(inputs, documents, supervised, int(supervised.sum()))


def packed_batch() -> Batch:
    """Two rows of 24: documents of 10, 9 and 5 padding tokens; of 4 and 20."""
    ids = torch.randint(5, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[3] * 10 + [1] * 9 + [-1] * 5, [0] * 4 + [5] * 20])
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((10, 9, 5), (4, 20))])
    labels = ids.masked_fill((documents < 0) | (position_ids < 3), -100)
    inputs = {"input_ids": ids, "position_ids": position_ids, "labels": labels}
    supervised = supervised_positions(labels, causal=True)
    return Batch(inputs, documents, supervised, int(supervised.sum()))


def chosen_half(batch: Batch) -> Selection:
    """About half of the real tokens, a different number in every row."""
    noise = torch.rand(batch.documents.shape, generator=torch.Generator().manual_seed(1))
    mask = (noise < torch.tensor([[0.3], [0.6]])) & (batch.documents >= 0)
    return Selection.of_mask(mask, torch.ones(mask.shape))


def executed_and_counted(model, batch: Batch, policy: str, retain: bool, kernel: str) -> tuple[int, Flops]:
    """What torch counts while a step runs, and what the tally says of it."""
    inner = unwrapped(model)
    products = matrix_products(inner, blocks_of(inner))
    tally = FlopTally(products, policy=policy, retain_linears=retain, kernel=kernel)
    selection, fallbacks = None, {}
    if policy == "selective":
        selection = chosen_half(batch)
        fallbacks = enable_token_selection(model, retain_linears=retain).retention.fallbacks
    elif policy == "checkpoint":
        # Early stopping would end the recomputation before the last product if no later operator needs its result.
        whole = partial(checkpoint, use_reentrant=False, early_stop=False)
        inner._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=whole)

    def loss() -> torch.Tensor:
        if selection is None:
            return exact_loss(model, batch.inputs, 1)
        with fixed_selection(model, selection):
            return model(**batch.inputs, num_items_in_batch=1).loss

    loss()  # the first pass of selective blocks also tries whether they can be replayed
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        loss().backward()
    tally.add(batch, selection)
    if policy == "selective":
        disable_token_selection(model)
    return counter.get_total_flops() - rotary(counter), tally.flops(fallbacks)


def rotary(counter: FlopCounterMode) -> int:
    """Operations of the rotary angles, which transformers 5.17 takes by a matrix product and later ones do not."""
    counts = counter.get_flop_counts()
    return sum(sum(operators.values()) for name, operators in counts.items() if name.endswith("rotary_emb"))


@pytest.mark.parametrize(("policy", "retain"), POLICIES)
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt2", "opt", "olmo2", "mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "cohere"]
)
def test_executed_operations_are_those_torch_counts(family, policy, retain):
    model = families.build(family, attention="eager", dtype=torch.float32)
    executed, flops = executed_and_counted(model, padded_batch(model), policy, retain, "eager")
    assert flops.hardware == executed
    assert flops.model < executed


@pytest.mark.parametrize(("policy", "retain"), POLICIES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_packed_documents_and_fused_attention(family, kernel, policy, retain):
    model = families.build(family, attention=kernel, dtype=torch.float32)
    executed, flops = executed_and_counted(model, packed_batch(), policy, retain, kernel)
    assert flops.hardware == executed


def test_a_causal_kernel_without_a_mask_computes_a_triangle():
    model = families.build("llama", attention="sdpa", dtype=torch.float32)
    batch = padded_batch(model, padding=0)
    executed, flops = executed_and_counted(model, batch, "all", False, "sdpa")
    # torch counts the square of 24 x 24 pairs: seven products of 8 elements, in 4 heads, 2 sequences and 2 blocks.
    above_diagonal = 24 * 23 // 2
    assert executed - flops.hardware == 2 * 7 * 8 * 4 * 2 * 2 * above_diagonal


def unneeded_products(batch: Batch, policy: str, *, rank: int, adapted: int) -> int:
    """What the first block with an adapter does not compute, since nothing below it is trained.

    It is the gradient of what the projections of queries (32 x 32), keys and values (32 x 16) read, and of what the
    adapters of as many of them multiply it with. Without adapters on keys and values these have no gradient either.
    """
    selection = chosen_half(batch) if policy == "selective" else None
    rows, queries = (48, 48) if selection is None else (selection.selected_tokens, selection.positions.numel())
    count = rows * (32 * (32 + 16 + 16) + adapted * rank * 32)
    return 2 * (count if adapted == 3 else count + queries * 24 * 4 * (8 + 8))


@pytest.mark.parametrize(("policy", "retain"), POLICIES)
@pytest.mark.parametrize(("targets", "adapted"), [("all-linear", 3), (["q_proj", "down_proj"], 1)])
def test_frozen_weights_below_adapters(policy, retain, targets, adapted):
    model = families.build("llama", attention="eager", dtype=torch.float32)
    adapter = AdapterConfig(kind="lora", rank=3, alpha=6.0, target_modules=targets)
    model = add_adapter(model, adapter, task="causal_lm")
    batch = padded_batch(model)
    executed, flops = executed_and_counted(model, batch, policy, retain, "eager")
    assert flops.hardware - executed == unneeded_products(batch, policy, rank=3, adapted=adapted)


@pytest.mark.parametrize(("policy", "retain"), POLICIES)
def test_blocks_below_the_first_adapter_go_forward_only(policy, retain):
    model = families.build("llama", attention="eager", dtype=torch.float32, num_hidden_layers=3)
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    inner = unwrapped(model)
    assert [b.differentiated for b in matrix_products(inner, blocks_of(inner)).blocks] == [False, True, True]
    batch = padded_batch(model)
    executed, flops = executed_and_counted(model, batch, policy, retain, "eager")
    assert flops.hardware - executed == unneeded_products(batch, policy, rank=2, adapted=1)


def slow_model_flops(batch: Batch, mask: torch.Tensor, window: int, *, trained: bool) -> int:
    """By going through all tokens and all pairs of a tiny mistral: what the chosen gradient needs."""
    hidden, keys, inner, heads, head = 32, 16, 48, 4, 8
    matrices = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    total = 0
    for row, documents in enumerate(batch.documents.tolist()):
        for i, document in enumerate(documents):
            if document < 0:
                continue
            selected = bool(mask[row, i])
            total += 2 * matrices * (1 + selected * (2 if trained else 1))
            for j in range(max(0, i - window + 1), i + 1):
                if documents[j] == document:
                    # Scores and output; gradient of probabilities and queries; gradient of keys and values.
                    total += 2 * 2 * heads * head * (1 + selected + (selected and bool(mask[row, j])))
    labelled = torch.nn.functional.pad(batch.inputs["labels"][:, 1:] != -100, (0, 1))
    logits = 2 * hidden * VOCABULARY * int((labelled & mask).sum())
    return 2 * total + logits * (3 if trained else 2)


@pytest.mark.parametrize("policy", ["all", "checkpoint", "selective"])
@pytest.mark.parametrize("make_batch", [lambda: padded_batch(families.build("mistral")), packed_batch])
def test_model_operations_are_what_the_gradient_needs(make_batch, policy):
    batch = make_batch()
    model = families.build("mistral", attention="sdpa", dtype=torch.float32)
    selection = chosen_half(batch) if policy == "selective" else None
    tally = FlopTally(matrix_products(model, blocks_of(model)), policy=policy, retain_linears=False, kernel="sdpa")
    tally.add(batch, selection)
    mask = batch.documents >= 0 if selection is None else selection.mask(24)
    assert tally.flops().model == slow_model_flops(batch, mask, window=7, trained=True)


def test_the_formula_of_palm():
    """6 N + 12 L H Q T a token, with all pairs of a causal mask counted instead of all pairs."""
    model = families.build("llama", num_hidden_layers=3)
    batch = padded_batch(model, padding=0)
    tally = FlopTally(matrix_products(model, blocks_of(model)), policy="all", retain_linears=False, kernel="sdpa")
    tally.add(batch, None)
    head = model.lm_head.weight.numel()
    matrices = (
        sum(p.numel() for p in model.parameters() if p.dim() == 2) - head - model.model.embed_tokens.weight.numel()
    )
    layers, heads, size, tokens = 3, 4, 8, 24
    full = 2 * tokens * (6 * matrices + 12 * layers * heads * size * tokens) + 6 * head * batch.supervised_tokens
    masked = 2 * layers * 12 * heads * size * (tokens * (tokens - 1) // 2)
    assert tally.flops().model == full - masked


@pytest.mark.parametrize(
    ("causal", "window", "chunk"),
    [(True, None, None), (True, 3, None), (True, None, 4), (True, 30, None), (False, None, None), (False, 2, None)],
)
def test_pairs_against_an_explicit_mask(causal, window, chunk):
    batch = packed_batch()
    chosen = chosen_half(batch).mask(24)
    expected = [0, 0, 0]
    for row, i, j in itertools.product(range(2), range(24), range(24)):
        same = batch.documents[row, i] == batch.documents[row, j] >= 0
        near = window is None or (i - j < window if causal else abs(i - j) <= window)
        if same and near and (chunk is None or i // chunk == j // chunk) and (j <= i or not causal):
            expected[0] += 1
            expected[1] += int(chosen[row, i])
            expected[2] += int(chosen[row, i] and chosen[row, j])
    assert seen_pairs(batch.documents, chosen, Reach(causal, window, chunk)) == tuple(expected)


def test_micro_batches_add_up_until_the_reset():
    model = families.build("gemma2")
    products = matrix_products(model, blocks_of(model))
    tally = FlopTally(products, policy="selective", retain_linears=True, kernel="sdpa")
    batches = [padded_batch(model), packed_batch()]
    single = []
    for batch in batches:
        tally.reset()
        tally.add(batch, chosen_half(batch))
        single.append(tally.flops())
    tally.add(batches[0], chosen_half(batches[0]))
    assert tally.flops() == Flops(sum(f.model for f in single), sum(f.hardware for f in single))


@pytest.mark.parametrize("retain", [False, True])
def test_blocks_that_fall_back_are_counted_whole(retain):
    model = families.build("falcon", attention="eager", dtype=torch.float32)
    batch = padded_batch(model)
    executed, flops = executed_and_counted(model, batch, "selective", retain, "eager")
    # torch's early stop leaves out the last product of both blocks' recomputation, from 48 to 32 elements.
    assert flops.hardware - executed == 2 * 2 * 48 * 48 * 32


class Packed(torch.nn.Linear):
    """Stands for a quantised linear: no plain one, so that its output is not retained."""


def test_linears_that_are_not_plain_are_recomputed():
    model = families.build("llama", attention="eager", dtype=torch.float32)
    for block in model.model.layers:
        block.mlp.up_proj.__class__ = Packed
    batch = padded_batch(model)
    plain = families.build("llama", attention="eager", dtype=torch.float32)
    _, without = executed_and_counted(plain, batch, "selective", True, "eager")
    executed, flops = executed_and_counted(model, batch, "selective", True, "eager")
    assert flops.hardware == executed == without.hardware + 2 * 2 * chosen_half(batch).selected_tokens * 32 * 48


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", [Attention(4, 8, 8)] * 2),
        ("mistral", [Attention(4, 8, 8, window=7)] * 2),
        ("gemma2", [Attention(4, 8, 8, window=6), Attention(4, 8, 8)]),
        ("deepseek_v3", [Attention(4, 12, 8)] * 3),
        ("gpt_neox", [Attention(4, 8, 8)] * 2),
        ("qwen3_next", [None, Attention(4, 8, 8)]),
        ("mamba", [None, None]),
        ("bert", [Attention(4, 8, 8, causal=False)] * 2),
        ("modernbert", [Attention(4, 8, 8, causal=False), Attention(4, 8, 8, causal=False, window=4)]),
    ],
)
def test_the_attention_of_families(family, expected):
    model = families.build(family)
    assert [block.attention for block in matrix_products(model, blocks_of(model)).blocks] == expected


def test_utilisation():
    flops = Flops(model=300, hardware=400)
    assert utilisation(flops, seconds=2.0, peak=1000.0) == {
        "model_flops": 300,
        "hardware_flops": 400,
        "mfu": 0.15,
        "hfu": 0.2,
    }
    assert utilisation(flops, seconds=2.0, peak=None)["mfu"] is None
