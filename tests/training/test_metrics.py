import json

from framework.training.metrics import EvalRecord, MetricsFile, TrainRecord

TRAIN = {
    "step": 3,
    "loss": 2.5,
    "learning_rate": 0.1,
    "grad_norm": 1.0,
    "tokens": 100,
    "supervised_tokens": 40,
    "selected_tokens": 50,
    "step_seconds": 0.5,
    "tokens_per_second": 200.0,
    "peak_memory_bytes": None,
}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_have_the_documented_keys(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(TrainRecord(**TRAIN))
        metrics.write(EvalRecord(3, 2.0, 77))
        metrics.write(TrainRecord(**TRAIN | {"peak_memory_bytes": 5}, peak_reserved_bytes=8, skipped=True))
    train, evaluation, cuda = read(path)
    unknown = ("predicted_peak_memory_bytes", "model_flops", "hardware_flops", "mfu", "hfu")
    assert train == {"kind": "train", **TRAIN, **dict.fromkeys(unknown)}
    assert evaluation == {"kind": "eval", "step": 3, "loss": 2.0, "tokens": 77}
    assert (cuda["peak_memory_bytes"], cuda["peak_reserved_bytes"], cuda["skipped"]) == (5, 8, True)


def test_numbers_that_json_cannot_say_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(TrainRecord(**TRAIN | {"loss": float("nan"), "grad_norm": float("inf")}))
    assert (read(path)[0]["loss"], read(path)[0]["grad_norm"]) == (None, None)


def test_a_second_opening_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        with MetricsFile(path) as metrics:
            metrics.write(EvalRecord(step, float(step), 10))
    assert [record["step"] for record in read(path)] == [1, 2]


def test_figures_of_an_evaluation():
    assert EvalRecord(3, 2.0, 77).figures() == {"loss": 2.0, "tokens": 77}
    assert EvalRecord(3, float("inf"), 77).figures() == {"loss": None, "tokens": 77}
