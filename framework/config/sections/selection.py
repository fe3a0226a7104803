"""Which tokens receive gradient, and what blocks keep for them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from framework.config.sections.base import Auto, NonEmpty, Section


class SelectionConfig(Section):
    """Which tokens receive gradient. Without this section training is exact."""

    strategy: Literal["none", "supervised", "uniform", "bernoulli", "suffix"] = "none"
    """`none`: all tokens, exact. `supervised`: every labelled token, and a share of the context up to `ratio`.
    `uniform`: a fixed count per sequence, without replacement. `bernoulli`: each token independently. `suffix`: the end
    of every document, which is biased: what comes before is never trained."""

    ratio: Annotated[float, Field(gt=0, le=1)] | Literal["labelled", "auto"] | None = None
    """Selected tokens / all tokens that are not padding; "labelled" selects the labelled tokens only. "auto": the
    planner chooses. Null: 1 for `none`, "labelled" for `supervised`; the other strategies need a number."""

    tokentune: bool = False
    """With `uniform`: always select the first and the last token, as the reference code of TokenTune does."""

    normalization: Literal["supervised", "selected"] | None = None
    """`supervised`: the weighted sum of the selected losses over the count of all supervised tokens. `selected`:
    TokenTune's mean over the selected supervised tokens. Null: `selected` for `suffix`, which has no other, and
    `supervised` for the rest."""

    correction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How much of the gradient's bias is removed that comes from taking unselected keys and values for constants: what
    a selected key and its value get from other tokens' queries is multiplied by 1 + correction * (1/p - 1), p being
    their token's probability. With 1 and `bernoulli` the mean gradient is the ordinary one, at the price of
    variance. Causal language models only."""


class RetentionConfig(Section):
    """What a block keeps for its backward pass."""

    policy: Literal["all", "checkpoint", "selective"] | Auto = "all"
    """`all`: ordinary autograd. `checkpoint`: the block's input, the rest is recomputed. `selective`: the inputs of
    the selected rows and the keys and values of all, the selected rows are replayed. "auto": the planner chooses, and
    with it whichever of the keys below is not given."""

    retain_linears: bool | Auto | Annotated[list[NonEmpty], Field(min_length=1)] = False
    """With `selective`: also keep the linear layers' outputs at selected rows, so that no product is recomputed, except
    that of LoRA's small features with `lora_B`. A list of names within a block, such as `["down_proj",
    "self_attn.o_proj"]`, keeps those alone, and `["*"]` all: the wider a layer's input, the more time its output saves
    for the memory that it takes. "auto": the planner chooses how many, in this order."""

    kv_format: Literal["model", "int8", "int4", "recompute"] = "model"
    """With `selective`: format of the retained keys and values; "model" is the type that the model computes in. int8
    changes the gradient by less than a hundredth, int4 by several. "recompute" keeps the block's input instead, and
    computes keys and values of all tokens again: fewer bytes than "model" where every head has keys of its own."""

    placement: Literal["device", "host"] | Auto = "device"
    """With `selective`: where blocks keep what their replay needs. "host": in pinned memory of the host, copied there
    beside the computation, and fetched back one block ahead of its use; gradients are the same to the bit. The device
    then holds no more than two blocks' at a time, and training is slower only where copies take longer than what they
    go on beside. "auto": the planner chooses; unlike the keys above, it is not open unless it says so."""
