"""The ledger of a step of Hugging Face's Trainer with gradient checkpointing, in closed form.

These are the runs of which measured peaks are published; this framework's own steps are recorded instead (`recording`).
Bytes are those that the Trainer reports (`skip_memory_metrics=False`), which are the allocator's. Sizes follow from the
code of the libraries pinned beside the published figures (fms-acceleration, scripts/benchmarks): torch 2.4.1, peft
0.13.2, bitsandbytes 0.43.3, accelerate 1.0.1, flash-attn 2.6.3, trl 0.11.4, transformers 4.45.2. Runs with stock
kernels show what transformers 4.48 does: the caller holds the logits, keys are not repeated, there is one rotary
embedding. Assumptions:

- Checkpoints are reentrant, the Trainer's default: a block keeps its input and is run again in the backward pass.
- AdamW is torch's `foreach` form, which needs one more copy of the trained weights in its step.
- LoRA is on q, k, v and o, in float32, with dropout before it.
- Several GPUs share everything by FSDP (the first version, `FULL_SHARD`), a block a unit, the rest in the root, which
  stays gathered from the forward pass to the end of the backward pass. Nothing is gathered ahead: a block that was run
  without gradients is not marked for it (`_needs_pre_backward_unshard`).
- Under autocast FSDP holds trained weights in float32 and gathers them in 16 bits; otherwise all weights have 16 bits.
- Fused kernels are those of fms-acceleration: Liger's fused head and loss, unsloth's norm, rotary embedding and, with
  quantised weights, LoRA.

Read off the published figures, and only then explained by code: under FSDP, shards of gradients outlive the step, and
inputs of frozen blocks with their gradients the block; every GPU has all of the fused adapters, whose weights are not
reported.

"Between steps" is the ledger's phase `save`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from framework.planner.assumptions import WORKSPACES, workspace_bytes
from framework.planner.cuda import MASK_BYTES, STATISTIC_BYTES, block_bytes, rounded
from framework.planner.ledger import Ledger, Term, during, everywhere
from framework.planner.shapes import Shapes

Tuning = Literal["full", "lora", "qlora-nf4"]

BATCH_BYTES = 24
"""Of a token: ids, labels and attention mask in int64. They outlive the step."""

NF4_BLOCK, NF4_GROUP = 64, 256
"""Elements with a common magnitude, and magnitudes with a common scale (bitsandbytes' defaults)."""

NF4_SMALL = 2
"""Tensors of a few bytes that each quantised matrix has: the mean of its magnitudes, and the 16 values of NF4."""

_HALF, _SINGLE, _INTEGER = 2, 4, 8
_STATES = 2
_BETWEEN, _STEP, _LOSS, _BACKWARD = "save", "optimizer step", "loss", "block backward"


@dataclass(frozen=True)
class TrainerRun:
    """A run whose ledger `ledger` gives.

    Attributes:
        shapes: of the model.
        tuning: all weights, LoRA, or LoRA on weights in NF4 with double quantisation.
        fused: kernels are fused.
        autocast: matrix products have 16 bits by autocast, not by the weights' dtype alone.
        gpus: that share the model.
        sequences: a GPU has in a step.
        length: tokens of a sequence.
        rank: of LoRA.
        targets: layers that have it.
        device: architecture of the GPUs, as `Device.architecture`.
    """

    shapes: Shapes
    tuning: Tuning
    fused: bool
    autocast: bool
    gpus: int
    sequences: int
    length: int
    rank: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    device: str = "8.0"

    @property
    def tokens(self) -> int:
        """Of a GPU in a step."""
        return self.sequences * self.length

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.shapes.queries // self.shapes.heads

    @property
    def sharded(self) -> bool:
        """Several GPUs share the model."""
        return self.gpus > 1

    @property
    def trained(self) -> int:
        """Elements that AdamW has states of.

        Unsloth's norm gives its weight no gradient, which FSDP does not notice: it flattens a unit's weights to one.
        """
        shapes = self.shapes
        if self.tuning != "full":
            return self.adapters
        ignored = shapes.blocks * shapes.norms + shapes.hidden if self.fused and not self.sharded else 0
        return shapes.parameters - ignored

    @property
    def adapters(self) -> int:
        """Elements of all adapters."""
        return self.shapes.blocks * self.shapes.adapter(self.rank, self.targets)

    @property
    def trained_bytes(self) -> int:
        """Of an element of a trained weight, its gradient, and each state of AdamW."""
        in_single = self.tuning != "full" or (self.sharded and self.autocast)
        return _SINGLE if in_single else _HALF

    @property
    def parts(self) -> int:
        """In how many parts trained weights are shared out: FSDP is told to leave alone what fused LoRA reads."""
        return 1 if self.fused_adapters else self.gpus

    @property
    def fused_adapters(self) -> bool:
        """LoRA is fused with the product of quantised weights."""
        return self.fused and self.tuning == "qlora-nf4"

    @property
    def wide_norms(self) -> bool:
        """Norms, and with them all hidden rows but the embedding's, are in float32.

        So trl prepares quantised models that are not sharded (`peft_module_casting_to_bf16`).
        """
        return self.tuning == "qlora-nf4" and not (self.fused or self.sharded)

    @property
    def hidden_bytes(self) -> int:
        """Of a token's hidden row."""
        return (_SINGLE if self.wide_norms else _HALF) * self.shapes.hidden


def ledger(run: TrainerRun) -> Ledger:
    """What a GPU of a run holds; `total("save")` is what it holds between steps, `peak` the most."""
    return Ledger((*_held(run), *_optimizer_step(run), *_loss(run), *_block_backward(run)))


def _held(run: TrainerRun) -> list[Term]:
    """What is there all the time."""
    shapes, size = run.shapes, run.trained_bytes
    state = _STATES * size * run.trained / run.parts
    terms = [
        everywhere("optimizer state", state),
        everywhere("batch", BATCH_BYTES * run.tokens),
        everywhere("cuBLAS workspaces", WORKSPACES * workspace_bytes(run.device)[0]),
        # A module of the rotary embedding has a tensor of them: each block's in 4.45, one for all later.
        everywhere("rotary frequencies", rounded(_SINGLE * run.head // 2) * (shapes.blocks if run.fused else 1)),
    ]
    if run.tuning == "full":
        return [everywhere("weights", size * shapes.parameters / run.gpus), *terms]
    plain = shapes.parameters
    if run.tuning == "qlora-nf4":
        plain -= shapes.blocks * shapes.matrix_elements
        terms.append(everywhere("weights in 4 bits", shapes.blocks * shapes.matrix_elements / 2 / run.gpus))
        # FSDP shares out the codes, not what bitsandbytes keeps beside them.
        terms.append(everywhere("magnitudes of 4-bit weights", shapes.blocks * _magnitudes(shapes)))
    if run.wide_norms:
        extra = (_SINGLE - _HALF) * (shapes.blocks * shapes.norms + shapes.hidden)
        terms.append(everywhere("norms in float32", extra))
    if not (run.fused_adapters and run.sharded):
        # Otherwise they come to the device between the moments that the Trainer looks at, so it does not report them.
        terms.append(everywhere("adapters", _SINGLE * run.adapters / run.gpus))
    return [everywhere("frozen weights", _HALF * plain / run.gpus), *terms]


def _magnitudes(shapes: Shapes) -> int:
    """Bytes of a block's magnitudes, double-quantised, with their small tensors."""
    total = 0
    for rows, columns in shapes.matrices.values():
        magnitudes = ceil(rows * columns / NF4_BLOCK)
        total += magnitudes + _SINGLE * ceil(magnitudes / NF4_GROUP) + NF4_SMALL * rounded(1)
    return total


def _optimizer_step(run: TrainerRun) -> list[Term]:
    """AdamW's step, after which FSDP holds on to the gradients until the next forward pass."""
    size = run.trained_bytes * run.trained / run.parts
    phases = (_STEP, _BETWEEN) if run.sharded and not run.fused_adapters else (_STEP,)
    return [during("gradients", size, phases), during("copies of AdamW's foreach step", size, (_STEP,))]


def _loss(run: TrainerRun) -> list[Term]:
    """The end of the forward pass, at the head's largest moment."""
    shapes, tokens, row = run.shapes, run.tokens, run.hidden_bytes
    trains_head = run.tuning == "full"
    terms: dict[str, float] = {"block inputs": _checkpoints(run, shapes.blocks)}
    if run.fused:
        # A chunk's logits, 16 bits wide, of the one before too, with their gradient, and in float32.
        rows = _liger_rows(run)
        copies = _HALF + _SINGLE if rows >= tokens else 2 * _HALF + _SINGLE
        terms["logits"] = copies * rows * shapes.vocabulary
        # What the norm keeps, its result, the rows that predict something, and their gradient.
        terms["head's input"] = tokens * (4 * row + _SINGLE)
        if trains_head:
            terms["head's gradient"] = _HALF * shapes.head
    else:
        # Transformers 4.46 to 4.49: the caller holds them in 16 bits while `ForCausalLMLoss` has them in float32,
        # those that predict something again, and their log-softmax.
        shifted = block_bytes(_SINGLE * run.sequences * (run.length - 1) * shapes.vocabulary)
        terms["logits"] = tokens * shapes.vocabulary * (_HALF + _SINGLE) + 2 * shifted
        # The last norm's input in float32 and its result; where its weight is trained, its quotient too.
        kept = _SINGLE * shapes.hidden + row + (_HALF * shapes.hidden if trains_head else 0)
        terms["head's input"] = tokens * (kept + _INTEGER + _SINGLE)
        if run.autocast and not run.sharded and not trains_head:
            terms["autocast's copies of adapters"] = _HALF * run.adapters
    if run.sharded:
        terms["gathered root"] = _HALF * shapes.outside
    return _terms(terms, run, _LOSS)


def _liger_rows(run: TrainerRun) -> int:
    """Tokens of a chunk of Liger's fused head (`fused_linear_cross_entropy_forward`)."""
    predicted = run.sequences * (run.length - 1)
    chunks = ceil(run.shapes.vocabulary / run.shapes.hidden)
    return 1 << (ceil(predicted / chunks) - 1).bit_length()


def _block_backward(run: TrainerRun) -> list[Term]:
    """The moment of the backward pass at which most is held: in the last block, in the first, or at the embedding."""
    moments = [_block_moment(run, done) for done in (0, run.shapes.blocks - 1)]
    if run.tuning == "full" and run.sharded:
        moments.append(_root_moment(run))
    return _terms(max(moments, key=lambda moment: sum(moment.values())), run, _BACKWARD)


def _block_moment(run: TrainerRun, done: int) -> dict[str, float]:
    """The backward pass of the MLP of a block, run again, when `done` blocks after it are through.

    The gradients of the product in a gated MLP and of its two factors are there together.
    """
    shapes, tokens = run.shapes, run.tokens
    down = shapes.matrices["down_proj"]
    widest = tokens * _HALF * 3 * shapes.mlp
    if run.tuning == "qlora-nf4":
        # Before that, in place of the factors' gradients, there is the last matrix in 16 bits.
        widest = max(widest, tokens * _HALF * shapes.mlp + _HALF * down[0] * down[1])
    terms: dict[str, float] = {
        "kept by the block": tokens * _kept_by_block(run),
        "block's result and its gradient": 2 * tokens * run.hidden_bytes,
        "gradients in the block": widest,
    }
    if run.sharded and run.tuning != "full":
        # FSDP hooks the inputs of frozen units (`_register_post_backward_reshard_only_hook`), and thereby holds them,
        # and their gradients, to the end of the backward pass. The last one is this block's result's.
        terms["block inputs"] = _checkpoints(run, shapes.blocks)
        terms["inputs' gradients, held by FSDP's hooks"] = max(0, done - 1) * tokens * run.hidden_bytes
    else:
        terms["block inputs"] = _checkpoints(run, shapes.blocks - done)
    if run.tuning == "full":
        terms["gradients so far"] = done * run.trained_bytes * shapes.block / run.gpus
        terms["head's gradient"] = _HALF * shapes.head
        terms["gradient of the MLP's last matrix"] = _HALF * down[0] * down[1]
    else:
        terms["gradients so far"] = done * run.trained_bytes * run.adapters / shapes.blocks / run.parts
        if run.autocast and not run.sharded and not run.fused_adapters:
            terms["autocast's copies of adapters"] = _HALF * run.adapters / shapes.blocks
    if run.sharded:
        in_nf4 = run.tuning == "qlora-nf4"
        terms["gathered root"] = _HALF * shapes.outside
        matrices = shapes.matrix_elements / 2 if in_nf4 else _HALF * shapes.matrix_elements
        terms["gathered block"] = matrices + _HALF * (shapes.norms + shapes.rest)
    return terms


def _root_moment(run: TrainerRun) -> dict[str, float]:
    """The end of the backward pass, when FSDP puts the gradients of the root's weights together."""
    shapes = run.shapes
    return {
        "gradients so far": shapes.blocks * run.trained_bytes * shapes.block / run.gpus,
        "gathered root": _HALF * shapes.outside,
        "root's gradients, one by one and together": 2 * _HALF * shapes.outside,
        "embedding's gradient": run.tokens * run.hidden_bytes,
    }


def _checkpoints(run: TrainerRun, count: int) -> int:
    """Bytes of the inputs of the first blocks; the embedding's rows have 16 bits."""
    return run.tokens * (_HALF * run.shapes.hidden + (count - 1) * run.hidden_bytes)


def _kept_by_block(run: TrainerRun) -> int:
    """Bytes of a token that a block which is run again keeps besides its input, as its MLP's backward pass begins."""
    return _kept_by_norms(run) + _kept_by_attention(run) + _kept_by_adapters(run) + 3 * _HALF * run.shapes.mlp


def _kept_by_norms(run: TrainerRun) -> int:
    """What two norms keep, and their results where these are kept."""
    hidden = run.shapes.hidden
    scales = 2 * _SINGLE
    results = 2 * _HALF * hidden if run.tuning == "full" else 0
    if run.fused:
        # The second one's input; the first one's is the block's. Fused LoRA keeps the row that it gets.
        return scales + _HALF * hidden + results + (_HALF * hidden if run.fused_adapters else 0)
    if run.wide_norms:
        return scales + _SINGLE * hidden
    # Both inputs again, in float32; quotients, where there is a gradient of the weight.
    return scales + 2 * _SINGLE * hidden + 2 * results


def _kept_by_attention(run: TrainerRun) -> int:
    """Queries, keys, values and results, as flash attention keeps them."""
    shapes = run.shapes
    # Until transformers 4.48 Mistral repeated keys and values for all heads (`MistralFlashAttention2`).
    repeated = run.fused and shapes.family == "mistral"
    keys = shapes.queries if repeated else shapes.keys
    return _HALF * (2 * shapes.queries + 2 * keys) + STATISTIC_BYTES * shapes.heads


def _kept_by_adapters(run: TrainerRun) -> int:
    """Inputs of LoRA after dropout, with the mask, and what its first matrix makes of them."""
    if run.tuning == "full":
        return 0
    width = sum(run.shapes.matrices[target][0] for target in run.targets)
    if run.fused_adapters:
        return _HALF * width
    size = _HALF if run.autocast else _SINGLE
    return width * (MASK_BYTES + size) + len(run.targets) * run.rank * size


def _terms(sizes: dict[str, float], run: TrainerRun, phase: str) -> list[Term]:
    """Terms of a phase, with what the rotary embedding has made for it: cosines and sines, and their positions."""
    rotary = run.length * (2 * _HALF * run.head + _INTEGER)
    return [during(name, size, (phase,)) for name, size in (sizes | {"rotary embedding": rotary}).items()]
