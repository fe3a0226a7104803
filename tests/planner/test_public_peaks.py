"""Published peaks of runs of the Hugging Face Trainer, none of whose figures the closed forms have."""

from __future__ import annotations

import statistics

import pytest
from score_public_peaks import PUBLISHED, main, run_of, scores_of

from framework.planner.trainer_runs import ledger

ROW = {
    "model": "NousResearch/Llama-2-13b-hf",
    "architecture": "llama h=5120 m=13824 L=40 heads=40 kv=40 V=32000",
    "tuning": "lora",
    "kernels": "stock",
    "autocast_bf16": "no",
    "gpus": "2",
    "sequences_per_gpu": "2",
    "sequence_length": "4096",
}


@pytest.fixture(scope="module")
def scores():
    return scores_of(PUBLISHED)


def test_peaks_of_stock_kernels_are_those_measured(scores):
    errors = [abs(score.peak_error) for score in scores if score.row["kernels"] == "stock"]
    assert statistics.median(errors) <= 0.005
    assert max(errors) <= 0.03


def test_peaks_of_fused_kernels_are_those_measured(scores):
    errors = [abs(score.peak_error) for score in scores if score.row["kernels"] == "fused"]
    assert statistics.median(errors) <= 0.02


def test_what_is_held_between_steps_is_what_was_measured(scores):
    assert statistics.median(abs(score.rest_error) for score in scores) <= 0.005


MISTRAL = "mistral h=4096 m=14336 L=32 heads=32 kv=8 V=32000"
LLAMA_70B = "llama h=8192 m=28672 L=80 heads=64 kv=8 V=32000"


@pytest.mark.parametrize(
    ("architecture", "kind", "gpus", "sequences", "at_rest", "peak", "phase"),
    [
        (MISTRAL, "full stock no", 1, 8, 43468269568, 72435230720, "optimizer step"),
        (MISTRAL, "full fused yes", 1, 16, 43468006912, 77144641024, "block backward"),
        (MISTRAL, "full fused yes", 4, 16, 28985591808, 56381022208, "block backward"),
        (MISTRAL, "lora stock no", 1, 8, 14664886272, 38742912512, "loss"),
        (MISTRAL, "lora stock no", 2, 4, 7368227328, 21959827968, "block backward"),
        (MISTRAL, "lora fused yes", 4, 16, 3694026752, 56213309440, "block backward"),
        (MISTRAL, "qlora-nf4 stock yes", 1, 8, 4307422208, 37002646016, "loss"),
        (MISTRAL, "qlora-nf4 fused yes", 4, 16, 1242293248, 52942277632, "block backward"),
        (LLAMA_70B, "qlora-nf4 stock yes", 2, 2, 19266743808, 46685287936, "block backward"),
    ],
)
def test_each_kind_of_run_is_explained(architecture, kind, gpus, sequences, at_rest, peak, phase):
    tuning, kernels, autocast = kind.split()
    changes = {"architecture": architecture, "tuning": tuning, "kernels": kernels, "autocast_bf16": autocast}
    predicted = ledger(run_of(ROW | changes | {"gpus": str(gpus), "sequences_per_gpu": str(sequences)}))
    assert predicted.total("save") == pytest.approx(at_rest, rel=2e-5)
    assert predicted.peak == pytest.approx(peak, rel=5e-5)
    assert predicted.binding_phase == phase


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora-nf4"])
@pytest.mark.parametrize("kernels", ["stock", "fused"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_rows_of_other_models_have_a_peak_that_grows_with_the_batch(tuning, kernels, gpus):
    changes = {"tuning": tuning, "kernels": kernels, "gpus": str(gpus)}
    small, large = (ledger(run_of(ROW | changes | {"sequences_per_gpu": count})) for count in ("2", "32"))
    parameters = 13_015_864_320
    weights = {"full": 2 * parameters, "lora": 2 * parameters, "qlora-nf4": parameters / 2}[tuning]
    assert weights / gpus < small.total("save") < small.peak < large.peak
    # A checkpoint of every block.
    assert large.peak > 40 * 2 * 5120 * 32 * 4096


def test_the_tools_tables_say_what_was_predicted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    predicted = ledger(run_of(ROW))
    row = ROW | {"at_rest_bytes": predicted.total("save"), "peak_allocated_bytes": predicted.peak / 1.25}
    file = tmp_path / "peaks.csv"
    file.write_text(
        f"{','.join(row)}\n{','.join(str(round(v) if isinstance(v, float) else v) for v in row.values())}\n"
    )
    main(["--csv", str(file)])
    printed = capsys.readouterr().out
    assert "Llama-2-13b-hf" in printed
    assert "+25.000%" in printed
    assert f"{predicted.peak / 2**30:.3f}" in printed
    assert predicted.binding_phase in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mixtral h=64 m=64 L=2 heads=4 kv=2 V=100"}, ":2: model_type: .* of mixtral"),
        ({"architecture": "llama h=many"}, ":2: architecture: 'h=many' is not as in h=4096"),
        ({"architecture": "nosuchfamily h=64"}, "nosuchfamily"),
        ({"tuning": "gptq"}, ":2: tuning: 'gptq' is none of full, lora, qlora-nf4"),
        ({"autocast_bf16": "maybe"}, ":2: autocast_bf16: 'maybe' is neither yes nor no"),
    ],
)
def test_rows_that_no_closed_form_is_for_are_named(tmp_path, changes, message):
    file = tmp_path / "peaks.csv"
    row = ROW | changes
    file.write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    with pytest.raises(ValueError, match=message):
        scores_of(file)


def test_a_file_that_lacks_a_column_is_an_error_of_one_line(tmp_path):
    file = tmp_path / "peaks.csv"
    file.write_text("model,architecture\nx,llama\n")
    with pytest.raises(SystemExit, match="no column 'tuning'"):
        main(["--csv", str(file)])
