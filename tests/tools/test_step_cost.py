"""What bench_step measures, against closed forms of kept bytes and the ideal work."""

from __future__ import annotations

import json

import bench_step
import pytest
import torch
from bench_step import build_model, draw_batch, measure
from step_cost import ALL, CHECKPOINT, Arm, Case, default_arms

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
BATCH, SEQUENCE, RATIO = 2, 32, 0.25
HIDDEN, KEYS, WIDTH, HEADS = 32, 16, 48, 2  # keys: kv heads x head size
TOKENS = BATCH * SEQUENCE
SELECTED = int(RATIO * TOKENS)
CPU = torch.device("cpu")


def kept_per_block(arm, size=4):
    """The table of bytes that a block keeps, for weights of `size` bytes."""
    if arm == CHECKPOINT:
        return size * HIDDEN * TOKENS
    keys_and_values = 2 * KEYS * TOKENS * size if arm.kv_format == "model" else 2 * TOKENS * (KEYS + 4 * HEADS)
    kept = size * HIDDEN * SELECTED + keys_and_values
    if arm.retain_linears:
        linears, attention = 3 * HIDDEN + 2 * KEYS + 2 * WIDTH, HIDDEN
        kept += size * SELECTED * (linears + attention) + 4 * CONFIG["num_attention_heads"] * SELECTED
    return kept


@pytest.fixture(scope="module")
def rows():
    measured = measure(
        CONFIG,
        depths=[1, 3],
        batch=BATCH,
        sequence=SEQUENCE,
        arms=default_arms([RATIO]),
        repeats=2,
        dtype=torch.float32,
    )
    return {(row.depth, row.arm): row for row in measured}


def test_rows_come_by_depth_in_the_order_of_the_arms(rows):
    arms = default_arms([RATIO])
    assert [*rows] == [(depth, arm) for depth in (1, 3) for arm in arms]
    assert [arm.policy for arm in arms] == ["all", "checkpoint", *["selective"] * 4]
    assert len({arm.name for arm in arms}) == 6


@pytest.mark.parametrize("arm", default_arms([RATIO])[1:], ids=lambda arm: arm.name)
def test_kept_bytes_per_block_are_the_closed_form(rows, arm):
    row = rows[3, arm]
    assert row.block_kept_bytes == kept_per_block(arm)
    assert row.block_kept_ratio == kept_per_block(arm) / kept_per_block(CHECKPOINT)
    assert row.kept_bytes == row.outside_kept_bytes + 3 * kept_per_block(arm)
    assert rows[1, arm].outside_kept_bytes == row.outside_kept_bytes


def test_ordinary_training_keeps_most_and_baselines_are_one(rows):
    for depth in (1, 3):
        assert max(row.kept_bytes for (at, _), row in rows.items() if at == depth) == rows[depth, ALL].kept_bytes
        assert rows[depth, ALL].time_ratio == rows[depth, ALL].peak_ratio == rows[depth, ALL].ideal_time_ratio == 1
        assert rows[depth, CHECKPOINT].kept_ratio == rows[depth, CHECKPOINT].block_kept_ratio == 1
    # A peak holds at least what is kept, and all gradients in the end.
    parameters = sum(
        parameter.numel() for parameter in build_model(CONFIG, depth=3, dtype=torch.float32, device=CPU).parameters()
    )
    for (depth, _), row in rows.items():
        assert row.peak_bytes >= max(row.kept_bytes, 4 * parameters if depth == 3 else 0)
        assert row.seconds > 0


def test_bfloat16_halves_what_is_kept_as_it_is():
    arms = [CHECKPOINT, Arm("selective", RATIO, True, "model"), Arm("selective", RATIO, False, "int8")]
    measured = measure(
        CONFIG, depths=[1, 2], batch=BATCH, sequence=SEQUENCE, arms=arms, repeats=1, dtype=torch.bfloat16
    )
    assert [row.block_kept_bytes for row in measured[3:]] == [kept_per_block(arm, size=2) for arm in arms]


@pytest.mark.parametrize(
    ("arm", "full", "adapter"),
    [
        (ALL, 3, 2),
        (CHECKPOINT, 4, 3),
        (Arm("selective", 0.25), 1.75, 1.5),
        (Arm("selective", 0.25, retain_linears=True), 1.5, 1.25),
    ],
)
def test_ideal_units(arm, full, adapter):
    assert arm.ideal_units(adapter=False) == full
    assert arm.ideal_units(adapter=True) == adapter


def test_a_step_changes_no_weight_and_leaves_no_gradient():
    model = build_model(CONFIG, depth=1, dtype=torch.float32, device=CPU)
    before = [parameter.clone() for parameter in model.parameters()]
    inputs, selections = draw_batch(
        batch=BATCH, sequence=SEQUENCE, vocabulary=64, ratios=[RATIO], answers=False, device=CPU
    )
    arms = [ALL, Arm("selective", RATIO, True)]
    case = Case(model, inputs, selections, arms)
    for arm in arms:
        case.step(arm)
        assert {id(p) for p in case.models[arm].parameters()} == {id(p) for p in model.parameters()}
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert all(parameter.grad is None for parameter in model.parameters())


def test_selecting_everything_gives_the_exact_loss():
    model = build_model(CONFIG, depth=2, dtype=torch.float32, device=CPU)
    whole = Arm("selective", 1.0, True)
    drawn = draw_batch(batch=BATCH, sequence=SEQUENCE, vocabulary=64, ratios=[1.0], answers=False, device=CPU)
    case = Case(model, *drawn, [ALL, whole])
    torch.testing.assert_close(case.loss(whole), case.loss(ALL))


def test_answers_are_labelled_at_the_end_and_selected_one_earlier():
    inputs, selections = draw_batch(batch=2, sequence=16, vocabulary=64, ratios=[0.25, 0.5], answers=True, device=CPU)
    labelled = (inputs["labels"] != -100).nonzero()[:, 1].view(2, -1)
    assert labelled.tolist() == [[12, 13, 14, 15]] * 2
    assert selections[0.25].positions.tolist() == [[11, 12, 13, 14]] * 2
    assert selections[0.5].positions.tolist() == [[7, 8, 9, 10, 11, 12, 13, 14]] * 2


def test_command_with_an_adapter_writes_its_rows(tmp_path, capsys):
    model, output = tmp_path / "config.json", tmp_path / "rows.json"
    model.write_text(json.dumps({**CONFIG, "num_hidden_layers": 99}))
    arguments = f"--model {model} --json {output} --depths 2 1 --batch 1 --sequence 16 --repeats 1 --adapter 2"
    threads = torch.get_num_threads()
    bench_step.main(f"{arguments} --ratios 0.5 --kv-formats int8 --answers".split())
    assert torch.get_num_threads() == threads
    written = json.loads(output.read_text())
    assert [(row["depth"], row["arm"]["policy"]) for row in written] == [
        (depth, policy) for depth in (1, 2) for policy in ("all", "checkpoint", "selective", "selective")
    ]
    assert [row["ideal_time_ratio"] for row in written[:4]] == [1, 1.5, 1, 0.75]
    assert "LoRA rank 2" in capsys.readouterr().out


@pytest.mark.parametrize("sequence", [32, 64])
def test_counted_operations_are_those_of_matrices_attention_and_head(sequence):
    """Multiply-adds: matrices by rows, attention by pairs of a query and a key that it sees, the head by labels."""
    arms = [ALL, CHECKPOINT, Arm("selective", RATIO), Arm("selective", RATIO, True)]
    model = build_model(CONFIG, depth=2, dtype=torch.float32, device=CPU)
    drawn = draw_batch(batch=BATCH, sequence=sequence, vocabulary=64, ratios=[RATIO], answers=False, device=CPU)
    case = Case(model, *drawn, arms)
    tokens, pairs = BATCH * sequence, BATCH * sequence * (sequence + 1) // 2
    chosen = drawn[1][RATIO].mask(sequence)
    selected, labels = int(chosen.sum()), int(chosen[:, :-1].sum())
    place = torch.arange(sequence)
    sees = (place[:, None] >= place)[None] & chosen[:, :, None]
    queries, both = int(sees.sum()), int((sees & chosen[:, None]).sum())
    block, pair, score, head = HIDDEN * (2 * HIDDEN + 2 * KEYS + 3 * WIDTH), 2 * HIDDEN, HIDDEN, HIDDEN * 64
    counted = {
        ALL: 3 * block * tokens + (3 * pair + score) * pairs,
        CHECKPOINT: 4 * block * tokens + (4 * pair + score) * pairs,
        arms[2]: block * (tokens + 3 * selected) + pair * (pairs + 2 * queries + both) + score * queries,
        arms[3]: block * (tokens + 2 * selected) + pair * (pairs + queries + both) + score * queries,
    }
    for arm, blocks in counted.items():
        rows = labels if arm.policy == "selective" else BATCH * (sequence - 1)
        assert case.operations(arm) == 2 * (2 * blocks + 3 * head * rows), arm.name
