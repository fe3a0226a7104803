"""The retrieval tasks: what the data asks, how answers are counted, what is trained and reported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bench_quality import main, parse
from quality_arms import ORDINARY, Training
from quality_retrieval import (
    BEGIN,
    FILLER,
    KEYS,
    PAD,
    PAIRS,
    QUESTIONS,
    VALUES,
    VOCABULARY,
    Documents,
    RetrievalSizes,
    answers,
    draw,
    joined,
    length,
)
from quality_skill import ARMS, SkillBench
from torch import nn


class Oracle(nn.Module):
    """Looks up the value behind the first place of the last token, so that it knows every answer."""

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        for row, tokens in enumerate(ids.tolist()):
            for place, token in enumerate(tokens):
                logits[row, place, tokens[tokens.index(token) + 1] if token in KEYS["same"] else PAD] = 20.0
        return type("Output", (), {"logits": logits})


class Guesser(nn.Module):
    """Gives random logits, the same for the same tokens."""

    def forward(self, ids):
        table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
        return type("Output", (), {"logits": table[ids]})


@pytest.mark.parametrize("keys", list(KEYS))
@pytest.mark.parametrize("gap", [0, 5, 40])
def test_there_is_one_right_answer_and_it_is_in_the_prompt_at_the_gap(gap, keys):
    documents = draw(gap, 50, seed=0, keys=keys)
    assert documents.ids.shape == documents.labelled.shape == (50, length(gap))
    first = 1 + 2 * PAIRS + gap
    for ids, labelled in zip(documents.ids.tolist(), documents.labelled.tolist(), strict=True):
        prompt, filler, questions = ids[1 : 1 + 2 * PAIRS], ids[1 + 2 * PAIRS : first], ids[first:]
        assert ids[0] == BEGIN and set(filler) <= set(FILLER) and len(filler) == gap
        stated = dict(zip(prompt[::2], prompt[1::2], strict=True))
        assert len(stated) == PAIRS and set(stated) <= set(KEYS[keys]) and set(stated.values()) <= set(VALUES)
        asked = dict(zip(questions[::2], questions[1::2], strict=True))
        assert len(asked) == QUESTIONS and all(stated[key] == value for key, value in asked.items())
        assert [place for place, label in enumerate(labelled) if label] == [first + 1, first + 3]


def test_documents_are_drawn_anew_and_the_same_again():
    ids = draw(8, 20, seed=0).ids
    assert (draw(8, 20, seed=0).ids == ids).all()
    assert len({tuple(row) for row in np.concatenate([ids, draw(8, 20, seed=1).ids]).tolist()}) == 40


def test_documents_are_joined_as_they_are():
    parts = [draw(0, 2, seed=0), draw(3, 1, seed=0)]
    dataset = joined(parts)
    assert dataset.lengths.tolist() == [length(0), length(0), length(3)]
    assert dataset[2].input_ids.tolist() == parts[1].ids[0].tolist()
    labels = dataset[2].labels
    assert np.flatnonzero(labels != -100).tolist() == np.flatnonzero(parts[1].labelled[0]).tolist()
    assert dataset.report.labelled_share == 3 * QUESTIONS / (2 * length(0) + length(3))


def test_a_perfect_model_is_always_right():
    accuracy, loss = answers(Oracle(), draw(6, 70, seed=0))
    assert accuracy == 1.0 and loss == pytest.approx(0.0, abs=1e-6)


def test_right_answers_are_counted_as_by_hand():
    documents, model = draw(4, 70, seed=0), Guesser()
    right, losses = 0, []
    for ids, labelled in zip(documents.ids.tolist(), documents.labelled.tolist(), strict=True):
        for place, label in enumerate(labelled):
            if label:
                logits = model(torch.tensor([ids[:place]])).logits[0, -1]
                right += max(range(VOCABULARY), key=logits.tolist().__getitem__) == ids[place]
                losses.append(float(-logits.log_softmax(-1)[ids[place]]))
    accuracy, loss = answers(model, documents)
    assert accuracy == right / 140 and loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_ordinary_arm_solves_a_trivial_task():
    # One pair, as stated: its value is the only one in the document.
    whole = draw(2, 400, seed=0)
    kept = np.r_[0:3, 1 + 2 * PAIRS : 3 + 2 * PAIRS]
    ids = np.concatenate([whole.ids[:, kept], whole.ids[:, 1:3]], axis=1)
    labelled = np.zeros(ids.shape, dtype=bool)
    labelled[:, -1] = True
    trivial = Documents(ids, labelled)
    sizes = RetrievalSizes(64, 2, VOCABULARY, batch=16, sequence=14, pad_token_id=PAD)
    training = Training(sizes.model(0), ORDINARY, sizes, joined([trivial]), seed=0)
    assert answers(training.model, trivial)[0] < 0.5
    list(training.run(60, 5e-3, kind="constant", warmup=5))
    assert answers(training.model, trivial)[0] > 0.95


SIZE = "--hidden 32 --depth 1 --batch 2 --sequence 64 --documents 30 --ordinary-steps 2 --rounds 1 --threads 1"
RATES = "--rates 1e-3 --most-rates 1"


@pytest.mark.parametrize(("task", "kinds"), [("retrieval", 2), ("transfer", 3)])
def test_every_arm_is_scored_after_equal_time_and_equal_steps(tmp_path, capsys, task, kinds):
    arguments = f"--task {task} --output {tmp_path} --gaps 2 6 --start-gap 1 --start-steps 1 {SIZE} {RATES} --seeds 0"
    main(arguments.split())
    results = json.loads((tmp_path / f"{task}.json").read_text())
    assert [cell["arm"] for cell in results["cells"].values()] == [arm.name for arm in ARMS]
    for cell in results["cells"].values():
        steps = [step for step, _ in cell["curve"]]
        assert {cell["steps"], 2} <= set(steps) and steps[-1] == max(cell["steps"], 2)
        assert len(cell["equal_time"]) == len(cell["equal_steps"]) == kinds
        assert dict(cell["curve"])[2] == cell["equal_steps"]
    table = capsys.readouterr().out.splitlines()[-len(ARMS) - 4 :]
    assert table[0].count("gap 6") == 2
    assert "any one of the prompt's values is right in 0.25 or more" in table[-1]
    picture = tmp_path / "quality.png"
    main(["--output", str(tmp_path), "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("keys", "known"), [("same", 4), ("half", 2), ("new", 0)])
def test_the_transfer_goes_on_with_other_keys_than_its_start(tmp_path, keys, known):
    bench = SkillBench(parse(f"--task transfer --output {tmp_path} --keys {keys} {SIZE}".split()), "transfer")
    trained = set(np.unique(bench.train.input_ids))
    assert set(KEYS[keys]) <= trained and len(set(KEYS["same"]) & trained) == known
    old = bench.reported["start's, gap 8"].ids
    assert set(KEYS["same"]) <= set(np.unique(old)) and old.shape[1] == length(8)


def test_arms_are_chosen_by_name(tmp_path):
    line = f"--task retrieval --output {tmp_path} {SIZE} --arms".split()
    assert [arm.name for arm in SkillBench(parse([*line, ARMS[1].name]), "retrieval").arms] == [
        "ordinary",
        ARMS[1].name,
    ]
    with pytest.raises(SystemExit, match=r"--arms: no \{'all'\} among"):
        SkillBench(parse([*line, "all"]), "retrieval")
