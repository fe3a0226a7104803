"""Runs of encoders and classifiers: small models of text and images, data for them, and what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from framework.config import Config
from framework.models import configured_model
from framework.training.objective import Objective
from framework.training.run_data import load_run_data

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "intermediate_size": 32, "vocab_size": 106, "max_position_embeddings": 64}
PIXELS = {**SIZES, "intermediate_size": 32, "image_size": 16, "patch_size": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Larger than usual: with narrow layers attention would otherwise be uniform and hide errors.
SPREAD = {"initializer_range": 0.2}
BERT = {"model_type": "bert", **TEXT, **NO_DROPOUT, **SPREAD}
MODELS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "electra": {**BERT, "model_type": "electra", "embedding_size": 16},
    "modernbert": {
        "model_type": "modernbert",
        **TEXT,
        **SPREAD,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "classifier_pooling": "cls",
    },
    "llama": {"model_type": "llama", **TEXT, **SPREAD, "num_key_value_heads": 1},
    "vit": {"model_type": "vit", **PIXELS, **SPREAD},
    "dinov2": {"model_type": "dinov2", **{**PIXELS, **SPREAD, "mlp_ratio": 2, "layerscale_value": 0.7}},
}
MODELS["siglip"] = {"model_type": "siglip", "vision_config": {**PIXELS, "model_type": "siglip_vision_model"}}
MODELS["modernbert-mean"] = {**MODELS["modernbert"], "classifier_pooling": "mean"}
del MODELS["dinov2"]["intermediate_size"]

SELECTIONS = {
    "exact": {"strategy": "none"},
    "supervised": {"strategy": "supervised"},
    "context": {"strategy": "supervised", "ratio": 0.5},
    "uniform": {"strategy": "uniform", "ratio": 0.4},
}
CASES = [
    ("masked_lm", "bert"),
    ("masked_lm", "electra"),
    ("masked_lm", "modernbert"),
    ("sequence_classification", "bert"),
    ("sequence_classification", "electra"),
    ("sequence_classification", "modernbert"),
    ("sequence_classification", "modernbert-mean"),
    ("sequence_classification", "llama"),
    ("image_classification", "vit"),
    ("image_classification", "dinov2"),
    ("image_classification", "siglip"),
]
LORA = {"kind": "lora", "rank": 2, "alpha": 4}
AUTO = {
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}


def write_data(directory: Path, task: str, samples: int, seed: int) -> Path:
    """Data whose class can be told: by its letters, or its colour."""
    random = np.random.default_rng(seed)
    if task == "image_classification":
        for number in range(samples):
            pixels = random.integers(0, 90, (18 + number % 5, 20, 3), dtype=np.uint8)
            pixels[..., number % 3] += 160
            path = directory / ("red", "green", "blue")[number % 3] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        return directory
    lines: list[dict[str, Any]] = []
    for number in range(samples):
        letters = "".join(random.choice(list(("abc", "mno", "xyz")[number % 3]), 3 + number % 7))
        lines.append({"text": letters})
        if task == "sequence_classification":
            lines[-1]["label"] = ("first", "middle", "last")[number % 3]
            if number % 4 == 1:
                lines[-1]["text_pair"] = "0" * (1 + number % 5)
    path = directory.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(result: Any) -> list[float]:
    return [record["loss"] for record in records(result.run_dir, "train")]


def prepared(config: Config) -> tuple[Any, Any, Any, list[Any]]:
    """Data, model, objective and first window of a config."""
    data = load_run_data(config, lambda line: None)
    loader, _ = data.loaders()
    model = configured_model(data.config, data.tokenizer)
    return data, model, Objective(model, data.config, torch.device("cpu")), loader.next_window()
