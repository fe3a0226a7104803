"""A fixed sample of the planner's scores: real steps in one process and in two, of models without laws of their own."""

from __future__ import annotations

import pytest
from check_planner import LIMITS, Scored, document, draw, quantile, score, summary
from planner_cases import ON_HOST, random_cases
from recorded_here import recorded_here
from several_ranks import run_script_on_ranks


@pytest.mark.slow
@pytest.mark.multiprocess
def test_predicted_peaks_are_those_of_real_steps(tmp_path):
    drawn = random_cases(9, seed=1)
    cases = [drawn[3], drawn[8], ON_HOST[1]]
    assert [(case.family, case.engine, case.ranks, case.optimizer) for case in cases] == [
        ("mistral", "single", 1, "pure_bf16"),
        ("gpt2", "ZeRO 2", 2, "pure_bf16"),
        ("qwen3", "FSDP2", 2, "pure_bf16"),
    ]
    with recorded_here():
        scored = score(cases, start=run_script_on_ranks(tmp_path), say=lambda line: None)
    for each in scored:
        assert each.predicted is not None, each.reason
        assert abs(each.error) <= LIMITS[each.case.engine == "single"][0]


def test_what_is_written(tmp_path):
    first, second, third, *_ = random_cases(9, seed=1)
    scored = [Scored(first, 1000, 1004), Scored(second, 2000, 2000), Scored(third, 1000, None, "no law")]
    assert [row[:2] for row in summary(scored)] == [("one process", 1), ("several", 1)]
    assert [row[5] for row in summary(scored)] == [True, True]
    assert [row[5] for row in summary([Scored(first, 1000, 1006), scored[1]])] == [False, True]
    text = document(scored, "python tools/check_planner.py")
    assert "| one process | 1 | 0.400% | 0.400% | 0.400% |" in text and "| no law |" in text
    draw(scored, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (20, 18), (40, 37), (66, 62)])
def test_the_95th_percentile_is_a_value_that_so_many_are_not_above(count, expected):
    assert quantile([*range(count)][::-1], 0.95) == expected
