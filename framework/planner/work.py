"""What the passes of one micro-batch compute and move on one rank, in closed form. Must not import torch.

Operations are those that `framework.training.flops.FlopTally` counts as hardware operations, for sequences without
padding whose labelled tokens are the last ones of their document. Numbers of tokens are not rounded, and random ones
are their mean.

What is no matrix product is bound by memory: norms, activations, rotary embeddings, sums, casts, the loss. Its bytes
are coefficients times sizes, found by adding up what every operator of a real step reads and writes
(`tests/planner/test_work.py` does it again): a Llama block with four query heads to a key head and an MLP 3.5 times as
wide as the hidden state. Other families differ by some tens of percent (Qwen3, which normalises queries and keys: 32 %
more), and kernels that fuse operators move less. Left out are dropout, what selective retention copies (selected rows,
and keys and values, in 8 bits or not), and the scaling of the head's gradients in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from framework.linear_names import Retained
from framework.planner.choice import Choice, labels_in_loss
from framework.planner.pairs import Pairs
from framework.sharding.precision import PRECISIONS

if TYPE_CHECKING:
    from framework.models.products import BlockProducts, ModelProducts, Reach


class Traffic(NamedTuple):
    """Bytes that operators other than products read and write in a way of computing.

    Attributes:
        block: of a block's forward pass, per token and element of the hidden state.
        block_backward: of its backward pass.
        logit: of the loss and its gradient, per logit.
        score: of attention that forms scores, per query, key and head.
        score_backward: of its gradient.
        adapter: of LoRA without dropout, per token and element of an adapted layer's output. What its products read and
            write is part of it: with a rank of some tens they are bound by memory too.
        adapter_backward: of its gradient.
    """

    block: float
    block_backward: float
    logit: float
    score: float
    score_backward: float
    adapter: float
    adapter_backward: float


HALF = Traffic(145, 318, 44, 29, 28, 14, 17)
"""16-bit weights. Norms, the softmax and the loss cast to float32."""

AUTOCAST = Traffic(188, 424, 44, 26, 29, 22, 28)
"""Float32 weights under autocast: rows between blocks are float32. The casts of weights are counted apart."""

FULL = Traffic(202, 452, 32, 26, 21, 28, 34)
"""Float32."""

CAST = 6
"""Bytes to make a 16-bit element of a float32 one, or the other way."""


KERNELS_OF_A_BLOCK = 60
"""Kernels of a Llama block's forward pass with stock operators."""


@dataclass(frozen=True)
class Job:
    """What all choices have in common.

    Attributes:
        products: the model's matrix products.
        parameters: elements of all parameters, tied ones once, adapters included.
        trainable: those that are trained.
        outside: those that are not in blocks: embeddings, head and final norm.
        hidden_size: width of the rows between blocks.
        precision: the config's `optimizer.precision`.
        optimizer: the config's `optimizer.name`.
        sequence_length: tokens of a sequence.
        labelled_share: labelled tokens / all tokens; of a classifier's tokens, those that its head reads.
        kernel: the config's `model.attention`; what it computes is as in `FlopTally`.
        masked: `sdpa` is given a mask, with which it computes all pairs: rows are padded, or of several documents.
        document_tokens: length of the documents that sequences are packed of; None for one document a sequence, which
            is not packed.
        quantized: those of `parameters` that are quantised to NF4.
        quantized_bytes: what holds these.
        adapter_rank: of LoRA; None for no adapter, and for one that is taken to move no bytes beside its products.
        trained_tensors: their number.
        kernels: of a block's forward pass, stock operators: with adapters and quantised matrices there are more.
        recomputed_whole: blocks that selective retention recomputes on all rows, by name.
    """

    products: ModelProducts
    parameters: int
    trainable: int
    outside: int
    hidden_size: int
    precision: str
    optimizer: str
    sequence_length: int
    labelled_share: float
    kernel: str
    masked: bool = False
    document_tokens: int | None = None
    quantized: int = 0
    quantized_bytes: int = 0
    adapter_rank: int | None = None
    trained_tensors: int = 0
    kernels: float = KERNELS_OF_A_BLOCK
    recomputed_whole: frozenset[str] = frozenset()


class Work(NamedTuple):
    """Of one pass of one micro-batch on one rank.

    Attributes:
        matrices: floating-point operations of products with weights.
        attention: floating-point operations of attention.
        weights: bytes of weights that products read, and of gradients that they write, however few the rows.
        moved: bytes that other operators read and write.
        kernels: that the host issues; a backward pass is taken to need as long as a forward pass: there are twice as
            many, but no Python between them.
    """

    matrices: float
    attention: float
    weights: float
    moved: float
    kernels: float


class _Blocks:
    """Sums over blocks: multiply-adds per row, and per query-key pair by reach."""

    def __init__(self, blocks: Iterable[BlockProducts]) -> None:
        self.count = self.forward = self.trained = 0
        self._blocks = [*blocks]
        self._retained: dict[Retained, int] = {}
        pairs: dict[Reach, tuple[int, int, int]] = {}
        for block in self._blocks:
            self.count += 1
            self.forward += block.products.forward
            self.trained += block.products.trained
            if (attention := block.attention) is not None:
                pair, score, heads = pairs.get(attention.reach, (0, 0, 0))
                score += attention.heads * attention.key_size
                pairs[attention.reach] = pair + attention.pair, score, heads + attention.heads
        self.attention = [(reach, *sums) for reach, sums in pairs.items()]

    def retained(self, chosen: Retained) -> int:
        """Multiply-adds of a row in layers whose outputs are retained."""
        if chosen not in self._retained:
            self._retained[chosen] = sum(block.retained(chosen) for block in self._blocks)
        return self._retained[chosen]


class WorkModel:
    """The work of every choice's passes.

    Args:
        job: what the choices have in common.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._precision = PRECISIONS[job.precision]
        blocks, whole = job.products.blocks, job.recomputed_whole
        self._all = _Blocks(blocks)
        replayed = _Blocks(block for block in blocks if block.differentiated and block.name not in whole)
        unselective = _Blocks(block for block in blocks if block.differentiated and block.name in whole)
        # Those that a backward pass goes through, and whether selective retention replays them.
        self._backward = [part for part in ((replayed, True), (unselective, False)) if part[0].count]
        self._differentiated = sum(part.count for part, _ in self._backward)
        self._pairs = {reach: self._pairs_of(reach, job.labelled_share) for reach, *_ in self._all.attention}
        self._classes = job.products.head.forward / job.hidden_size
        self._in_blocks = job.parameters - job.outside - job.quantized

    def under_autocast(self, choice: Choice) -> bool:
        """Whether float32 weights are cast to 16 bits in every pass, which engines that hold 16-bit ones do without."""
        whole = choice.engine == "single" or choice.zero_stage == 0
        return whole and self._precision.autocast is not None

    def compute_bytes(self, choice: Choice) -> int:
        """Of an element of the weights that an engine holds or gathers for its passes."""
        return 2 if self._precision.autocast and not self.under_autocast(choice) else self._precision.weight_bytes

    def forward(self, choice: Choice) -> Work:
        """The forward pass; selective retention's record pass. All that the head does is in it, as in `fused_loss`."""
        job, traffic = self._job, self._traffic(choice)
        tokens = choice.micro_batch_size * job.sequence_length
        head = tokens * labels_in_loss(choice, job.labelled_share)
        products, body = job.products.head, job.products.body
        attention, scores = self._attention(self._all, choice, selected=False, passes=1)
        moved = tokens * self._row(self._all, traffic.block, traffic.adapter) + scores * traffic.score
        moved += head * self._classes * traffic.logit + self._unpacking()
        if self.under_autocast(choice):
            moved += CAST * (self._in_blocks + products.forward)
        of_head = products.forward * (1 + min(1, self._differentiated)) + products.trained
        matrices = (self._all.forward + body.forward) * tokens + of_head * head
        read = self._width * (self._all.forward + body.forward + of_head)
        return Work(2 * matrices, 2 * attention, read, moved, self._all.count * job.kernels)

    def recomputation(self, choice: Choice) -> Work:
        """What a backward pass computes a second time: blocks of `checkpoint`, the replays of `selective`."""
        if choice.policy == "all":
            return Work(0, 0, 0, 0, 0)
        traffic = self._traffic(choice)
        matrices = pairs = read = moved = 0.0
        for blocks, replayed in self._backward:
            selected = replayed and choice.policy == "selective"
            rows = self._rows(choice, selected)
            forward = blocks.forward - (blocks.retained(choice.retain_linears) if selected else 0)
            # With outputs of linear layers that of attention is retained, too.
            known = selected and bool(choice.retain_linears) and self._job.kernel != "eager"
            attention, scores = self._attention(blocks, choice, selected=selected, passes=0 if known else 1)
            matrices, pairs, read = matrices + forward * rows, pairs + attention, read + forward
            moved += rows * self._row(blocks, traffic.block, traffic.adapter) + scores * traffic.score
        if self.under_autocast(choice):
            moved += CAST * self._in_blocks
        moved += self._unpacking() * (1 - self._retained_share(choice))
        return Work(2 * matrices, 2 * pairs, self._width * read, moved, self._differentiated * self._job.kernels)

    def backward(self, choice: Choice) -> Work:
        """The backward pass without recomputation."""
        job, traffic = self._job, self._traffic(choice)
        tokens = choice.micro_batch_size * job.sequence_length
        body = job.products.body
        touched = body.forward * min(1, self._differentiated) + body.trained
        matrices = float(touched * tokens)
        moved = self._unpacking()
        pairs = 0.0
        for blocks, replayed in self._backward:
            selected = replayed and choice.policy == "selective"
            rows = self._rows(choice, selected)
            attention, scores = self._attention(blocks, choice, selected=selected, passes=2, backward=True)
            matrices, pairs = matrices + (blocks.forward + blocks.trained) * rows, pairs + attention
            row = self._row(blocks, traffic.block_backward, traffic.adapter_backward)
            moved += rows * row + scores * traffic.score_backward
            touched += blocks.forward + blocks.trained
        if self.under_autocast(choice):
            moved += CAST * job.trainable
        return Work(2 * matrices, 2 * pairs, self._width * touched, moved, self._differentiated * job.kernels)

    def flops(self, choice: Choice) -> float:
        """Floating-point operations that run in a micro-batch on one rank: `Flops.hardware`."""
        passes = (self.forward(choice), self.recomputation(choice), self.backward(choice))
        return sum(work.matrices + work.attention for work in passes)

    def selected_share(self, choice: Choice) -> float:
        """Selected tokens / all tokens. `supervised` selects every labelled token, whatever the ratio."""
        if choice.strategy == "none":
            return 1.0
        return max(choice.ratio, self._job.labelled_share) if choice.strategy == "supervised" else choice.ratio

    @property
    def _width(self) -> int:
        """Bytes of an element in a product."""
        return 2 if self._precision.autocast else self._precision.weight_bytes

    def _traffic(self, choice: Choice) -> Traffic:
        if self._width == 4:
            return FULL
        return AUTOCAST if self.under_autocast(choice) else HALF

    def _rows(self, choice: Choice, selected: bool) -> float:
        """All or selected tokens of a micro-batch."""
        tokens = choice.micro_batch_size * self._job.sequence_length
        return tokens * self.selected_share(choice) if selected else tokens

    def _row(self, blocks: _Blocks, block: float, adapter: float) -> float:
        """Bytes that a row moves in blocks. LoRA has rank x (inputs + outputs) elements, taken to be half each."""
        rank = self._job.adapter_rank
        adapted = blocks.trained / (2 * rank) if rank else 0
        return blocks.count * self._job.hidden_size * block + adapted * adapter

    def _retained_share(self, choice: Choice) -> float:
        """Of the products with linear layers, those that no replay computes."""
        if choice.policy != "selective" or not choice.retain_linears:
            return 0.0
        return self._all.retained(choice.retain_linears) / self._all.retained(True) if self._all.retained(True) else 1.0

    def _unpacking(self) -> float:
        """Bytes to make the matrices of NF4 weights: codes are read, 16 bits or what computes are written."""
        return self._job.quantized_bytes + self._width * self._job.quantized

    def _attention(
        self, blocks: _Blocks, choice: Choice, *, selected: bool, passes: int, backward: bool = False
    ) -> tuple[float, float]:
        """Multiply-adds of the blocks' attention, and query-key pairs times heads where scores are formed.

        Args:
            blocks: to sum over.
            choice: says what is selected.
            selected: queries are selected tokens only.
            passes: products with scores' size, in units of a forward pass.
            backward: scores are computed once more, because fused kernels keep none (arXiv 2307.08691, section 2.3.2);
                a replay has gradients of selected keys and values only.
        """
        total = scores = 0.0
        fused = self._job.kernel != "eager"
        for reach, pair, score, heads in blocks.attention:
            pairs = keys = self._executed(choice, reach)
            if selected:
                pairs, keys = self._selected_pairs(choice, reach)
            products = passes * pairs
            if backward and fused:
                products = pairs + keys
            total += products * pair + (pairs * score if backward and fused else 0.0)
            scores += pairs * heads
        return choice.micro_batch_size * total, 0.0 if fused else choice.micro_batch_size * scores

    def _executed(self, choice: Choice, reach: Reach) -> float:
        """Pairs of a sequence that are computed for all queries: selective blocks take no mask."""
        found = self._pairs[reach]
        return found.seen if choice.policy == "selective" and self._job.kernel != "eager" else found.executed

    def _pairs_of(self, reach: Reach, labelled_share: float) -> Pairs:
        job = self._job
        return Pairs.of(
            reach,
            kernel=job.kernel,
            tokens=job.sequence_length,
            masked=job.masked,
            document_tokens=job.document_tokens,
            labelled_share=labelled_share,
        )

    def _selected_pairs(self, choice: Choice, reach: Reach) -> tuple[float, float]:
        """Pairs of a sequence that are computed for selected queries, and those of them whose key is selected.

        `eager` goes through all keys, and computes gradients of all.
        """
        job, share = self._job, self.selected_share(choice)
        if job.kernel == "eager":
            return (pairs := share * job.sequence_length**2), pairs
        found = self._pairs[reach]
        if choice.strategy in ("uniform", "bernoulli"):
            return share * found.seen, share**2 * found.seen
        if choice.strategy == "suffix":
            end = self._pairs_of(reach, share)
            return end.labelled, end.among_labelled
        labelled = job.labelled_share
        context = (share - labelled) / (1 - labelled) if labelled < 1 else 0.0
        # Queries and keys of the context are selected at random, labelled ones all.
        own, rest = found.among_labelled, found.seen - found.labelled
        both = own + context * (found.labelled - own) + context**2 * rest
        return found.labelled + context * rest, both
