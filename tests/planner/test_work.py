"""Closed forms against `FlopTally` on batches, and coefficients against what operators read and write."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from timed_jobs import attentive, choose, job
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from framework.data import Batch
from framework.models.products import Reach, matrix_products
from framework.planner.choice import Choice
from framework.planner.pairs import Pairs
from framework.planner.timing import STOCHASTIC_BYTES
from framework.planner.work import FULL, HALF, Job, WorkModel
from framework.retention import blocks_of
from framework.selection import select
from framework.training.flops import FlopTally, seen_pairs
from framework.training.fused_loss import Gradients, in_chunks
from framework.training.loss import unwrapped
from framework.training.optimizer import StochasticAdamW

TOKENS = 24
POLICIES = [("all", False), ("checkpoint", False), ("selective", False), ("selective", True), ("selective", ("up",))]


def full_batch(rows: int, document_tokens: int | None, labelled_share: float) -> Batch:
    """Rows without padding, with the labelled tokens at the end of each document."""
    length = document_tokens or TOKENS
    starts = [*range(0, TOKENS, length), TOKENS]
    sizes = [stop - start for start, stop in itertools.pairwise(starts)]
    documents = torch.cat([torch.full((size,), index) for index, size in enumerate(sizes * rows)]).view(rows, TOKENS)
    marks = [[0] * (size - round(labelled_share * size)) + [1] * round(labelled_share * size) for size in sizes]
    supervised = torch.tensor([*itertools.chain(*marks)]).bool().expand(rows, TOKENS)
    inputs = {"input_ids": torch.zeros(rows, TOKENS, dtype=torch.int64)}
    if document_tokens is None:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return Batch(inputs, documents, supervised, int(supervised.sum()))


def tallied(of: Job, choice: Choice, batch: Batch) -> int:
    tally = FlopTally(of.products, policy=choice.policy, retain_linears=choice.retain_linears, kernel=of.kernel)
    selection = None
    if choice.policy == "selective":
        selection = select(
            strategy="supervised" if choice.strategy == "none" else choice.strategy,
            ratio=choice.ratio,
            supervised=batch.supervised,
            documents=batch.documents,
            seed=0,
        )
    tally.add(batch, selection)
    return tally.flops(of.recomputed_whole).hardware


@pytest.mark.parametrize(("policy", "retain"), POLICIES)
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("document_tokens", [None, 10])
def test_operations_are_those_of_the_tally(policy, retain, kernel, document_tokens):
    made = job(
        products=attentive(),
        kernel=kernel,
        sequence_length=TOKENS,
        document_tokens=document_tokens,
        labelled_share=0.5,
        hidden_size=64,
    )
    batch = full_batch(3, document_tokens, 0.5)
    strategies = [("none", 1.0), ("supervised", 0.5)] if policy == "selective" else [("none", 1.0)]
    for strategy, ratio in strategies:
        choice = choose(policy=policy, retain_linears=retain, strategy=strategy, ratio=ratio, micro_batch_size=3)
        assert WorkModel(made).flops(choice) == tallied(made, choice, batch)


@pytest.mark.parametrize("retain", [False, True, ("down",)])
def test_blocks_that_fall_back_are_recomputed_whole(retain):
    names = frozenset({"b3", "b7"})
    made = job(products=attentive(), sequence_length=TOKENS, hidden_size=64, recomputed_whole=names)
    choice = choose(policy="selective", retain_linears=retain, strategy="supervised", ratio=0.25, micro_batch_size=2)
    expected = tallied(made, choice, full_batch(2, None, 0.25))
    assert WorkModel(made).flops(choice) == expected
    assert WorkModel(replace(made, recomputed_whole=frozenset())).flops(choice) < expected


@pytest.mark.parametrize("strategy", ["supervised", "uniform", "suffix"])
@pytest.mark.parametrize(("ratio", "labelled"), [(0.75, 0.25), (0.125, 0.25), (0.5, 1.0)])
def test_selected_context_is_counted(strategy, ratio, labelled):
    made = job(products=attentive(), kernel="sdpa", sequence_length=TOKENS, labelled_share=labelled, hidden_size=64)
    choice = choose(policy="selective", strategy=strategy, ratio=ratio, micro_batch_size=2)
    expected = tallied(made, choice, full_batch(2, None, labelled))
    # Which of the labelled tokens a uniform selection meets is chance, as are the pairs of selected tokens; the closed
    # form has the mean.
    pairs = 0.005 * expected if strategy != "suffix" else 0
    chance = 2 * 3 * made.products.head.forward * TOKENS * 2 * labelled if strategy == "uniform" and labelled < 1 else 0
    assert abs(WorkModel(made).flops(choice) - expected) <= chance + pairs


@pytest.mark.parametrize("document_tokens", [None, 8])
def test_the_queries_of_a_suffix_are_the_last(document_tokens):
    made = job(
        products=attentive(),
        kernel="flash_attention_2",
        sequence_length=TOKENS,
        document_tokens=document_tokens,
        labelled_share=0.25,
        hidden_size=64,
    )
    choice = choose(policy="selective", strategy="suffix", ratio=0.5, micro_batch_size=2)
    assert WorkModel(made).flops(choice) == tallied(made, choice, full_batch(2, document_tokens, 0.25))


def test_a_share_that_is_no_whole_number_of_tokens_is_off_by_half_a_token_a_document():
    made = job(products=attentive(), kernel="eager", sequence_length=TOKENS, labelled_share=0.25, hidden_size=64)
    differences = []
    for hundredth in range(25, 100):
        choice = choose(policy="selective", strategy="supervised", ratio=hundredth / 100)
        differences.append(WorkModel(made).flops(choice) - tallied(made, choice, full_batch(1, None, 0.25)))
    one = choose(policy="selective", strategy="supervised", ratio=0.25 + 1 / TOKENS)
    none = choose(policy="selective", strategy="supervised", ratio=0.25)
    of_a_token = WorkModel(made).flops(one) - WorkModel(made).flops(none)
    assert max(map(abs, differences)) <= of_a_token / 2 * (1 + 1e-9)
    assert min(map(abs, differences)) == 0 < max(map(abs, differences))


REACHES = [
    Reach(),
    Reach(window=3),
    Reach(chunk=7),
    Reach(window=3, chunk=7),
    Reach(causal=False),
    Reach(causal=False, window=2),
]


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("document_tokens", [None, 4, 12])
def test_pairs_are_those_that_the_mask_leaves(reach, document_tokens):
    batch = full_batch(1, document_tokens, 0.25)
    seen, labelled, among = seen_pairs(batch.documents, batch.supervised, reach)
    found = Pairs.of(
        reach, kernel="flash_attention_2", tokens=TOKENS, document_tokens=document_tokens, labelled_share=0.25
    )
    assert found == (seen, seen, labelled, among)


class Moved(TorchDispatchMode):
    """Bytes that operators read and write, but for products, views and allocations. Those with adapters count."""

    LEFT_OUT = ("mm", "addmm", "bmm", "detach", "_unsafe_view", "lift_fresh")
    RANK = 2

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        attention = name.startswith("_scaled_dot_product")
        thin = name == "mm" and self.RANK in (*args[0].shape, *args[1].shape)
        if thin or not (function.is_view or attention or name in self.LEFT_OUT or name.startswith("empty")):
            tensors = (leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor))
            # What is expanded is read once.
            self.bytes[name] += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
        return output

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


PRECISIONS = {"pure_bf16": torch.bfloat16, "fp32_master": torch.float32, "fp32": torch.float32}
SEQUENCE = 256


def small_llama(precision: str, attention: str, blocks: int, adapter: bool):
    config = AutoConfig.for_model(
        "llama",
        hidden_size=128,
        intermediate_size=448,
        num_attention_heads=4,
        num_key_value_heads=1,
        num_hidden_layers=blocks,
        vocab_size=64,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(PRECISIONS[precision])
    if not adapter:
        return model
    lora = LoraConfig(r=Moved.RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    return adapted


def moved_by(model, precision: str) -> tuple[int, int]:
    """Of the forward and the backward pass over one sequence."""
    ids = torch.zeros(1, SEQUENCE, dtype=torch.int64)
    with Moved() as forward, torch.autocast("cpu", torch.bfloat16, enabled=precision == "fp32_master"):
        logits = model(input_ids=ids, use_cache=False).logits
    with Moved() as backward:
        logits.sum().backward()
    return forward.total, backward.total


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("attention", "adapter"), [("sdpa", False), ("sdpa", True), ("eager", False)])
def test_bytes_of_a_block_are_what_its_operators_move(precision, attention, adapter):
    counted, predicted = [], []
    for blocks in (1, 2):
        model = small_llama(precision, attention, blocks, adapter)
        inner = unwrapped(model)
        sizes = [p.numel() for p in model.parameters() if p.requires_grad]
        made = job(
            products=matrix_products(inner, blocks_of(inner)),
            parameters=sum(p.numel() for p in model.parameters()),
            trainable=sum(sizes),
            outside=2 * 64 * 128 + 128,
            hidden_size=128,
            precision=precision,
            sequence_length=SEQUENCE,
            kernel=attention,
            adapter_rank=Moved.RANK if adapter else None,
        )
        counted.append(moved_by(model, precision))
        work = WorkModel(made)
        predicted.append((work.forward(choose()).moved, work.backward(choose()).moved))
    # The difference of two depths is one block.
    for two, one, expected_two, expected_one in zip(*reversed(counted), *reversed(predicted), strict=True):
        assert expected_two - expected_one == pytest.approx(two - one, rel=0.05)


@pytest.mark.parametrize(("dtype", "traffic"), [(torch.bfloat16, HALF), (torch.float32, FULL)])
def test_bytes_of_the_loss(dtype, traffic):
    rows, matrix = torch.zeros(1024, 3, dtype=dtype), torch.zeros(1024, 3, dtype=dtype)
    targets, nothing = torch.zeros(1024, dtype=torch.int64), Gradients(None, None, None)
    with Moved() as moved:
        in_chunks(rows, matrix, None, targets, torch.ones(1024), lambda raw: raw, nothing)
    # One element of a row is read or written, or none; copies do not read what they write, and in float32 are none.
    for name in ("gather", "scatter_add_", "new_empty", "copy_"):
        del moved.bytes[name]
    copies = 0 if dtype is torch.float32 else 2 * (2 + 4)
    assert moved.total / 1024**2 + copies == pytest.approx(traffic.logit, rel=0.02)


def test_bytes_of_a_stochastic_update():
    weight = torch.nn.Parameter(torch.zeros(256, 256, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([weight], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, seed=0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with Moved() as step:
        optimizer.step()
    assert step.total / weight.numel() == pytest.approx(STOCHASTIC_BYTES, rel=0.01)


def test_quantised_matrices_are_unpacked_for_every_product():
    plain, packed = job(), job(precision="fp32_master", quantized=4_000_000, quantized_bytes=2_000_000)
    half = job(precision="fp32_master")
    once = 2_000_000 + 2 * 4_000_000
    sharded = {"engine": "fsdp", "ranks": 2}
    for policy, retain, times in [
        ("all", False, 0),
        ("checkpoint", False, 1),
        ("selective", True, 0),
        # Of a block's million weights it has 600,000.
        ("selective", ("down",), 0.4),
    ]:
        choice = choose(policy=policy, retain_linears=retain, **sharded)
        works = [(WorkModel(made).forward(choice), WorkModel(made).backward(choice)) for made in (packed, half)]
        assert [works[0][i].moved - works[1][i].moved for i in (0, 1)] == [once, once]
        again = [WorkModel(made).recomputation(choice).moved for made in (packed, half)]
        assert again[0] - again[1] == pytest.approx(times * once)
    assert WorkModel(plain).forward(choose()).moved == 4 * 1000 * 1000 * 202 + 250 * 500 * 32
