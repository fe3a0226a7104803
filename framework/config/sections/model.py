"""The model, its adapter, and where it comes from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from framework.config.adapters import ADAPTER_METHODS
from framework.config.sections.base import Count, NonEmpty, Paths, Section


class AdapterConfig(Section):
    """An adapter of PEFT: the weights of the model are frozen, and what the method adds to them is trained."""

    kind: Annotated[str, Field(json_schema_extra={"enum": [*ADAPTER_METHODS]})]
    """The method, by PEFT's name in lower case; "dora" is LoRA with separate magnitudes."""

    rank: Count | None = None
    """Inner dimension of the method's matrices; for methods that have one, which need it."""

    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the method's update, in most as alpha / rank; for methods that have one, which need it."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of the method's own dropout (of an input of LoRA's matrices); 0 for methods that have none."""

    target_modules: Paths | None = None
    """Modules that get an adapter: "all-linear" (all but the head), a regular expression over full module names, or a
    list of module names. Null: what suits the method, "all-linear" for most, the norms for `ln_tuning`, the layers of
    its paper for `ia3` in families that PEFT knows, the token embedding for `trainable_tokens`."""

    modules_to_save: list[NonEmpty] = []
    """Names of modules that are trained in full and saved with the adapter, such as a classification head."""

    options: dict[str, Any] = {}
    """Further options of the method by the names of its PEFT config, such as {"use_rslora": true}."""


class ModelConfig(Section):
    """The model and how its weights are held."""

    path: NonEmpty | None = None
    """A local directory or a hub name, with weights. Without it, `from_config` alone gives random weights."""

    from_config: dict[str, Any] | None = None
    """A Hugging Face config as an object, with `model_type`. Alone: random initialisation. Together with `path`: the
    architecture, so that checking a run needs no weights, which come from `path` when training."""

    task: Literal["causal_lm", "masked_lm", "sequence_classification", "image_classification"] = "causal_lm"
    """The head on the model. The classifiers give one class to a text (or a pair of texts) or to an image."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights. Null: what `optimizer.precision` implies."""

    tokenizer: NonEmpty | None = None
    """A local directory or a hub name. Null: `path`. Images need none: their processor comes from `path`, or resizes to
    the model's `image_size` and normalises to -1 … 1 where there is no `path`."""

    revision: NonEmpty | None = None
    """Branch, tag or commit of `path` on the hub, for config, weights, tokenizer and code. Null: the main branch."""

    offline: bool = False
    """Never ask the network: model and tokenizer are local directories or in the hub's cache."""

    trust_remote_code: bool = False
    """Run the Python files that come with the model or the tokenizer, where its config names them (`auto_map`)."""

    added_tokens: list[NonEmpty] = []
    """Tokens that the tokenizer gets besides its own, each one token wherever it stands in a text. Their embeddings
    start as the mean of the others. With an adapter only their rows are trained, or the whole embedding where
    `adapter.modules_to_save` names it."""

    pad_vocabulary_to: Count | None = None
    """With `added_tokens`: round the number of rows of the embedding up to a multiple of this."""

    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel: torch's scaled dot product attention, or plain matrix products."""

    adapter: AdapterConfig | None = None
    """Null: all weights are trained."""

    quantization: Literal["nf4"] | None = None
    """`nf4`: with an adapter, hold the frozen linear layers of the blocks in 4 bits (QLoRA's NormalFloat, with its
    double quantisation). Null: weights are not quantised."""
