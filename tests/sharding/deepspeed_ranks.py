"""One rank of the runs that test_deepspeed.py looks at; `deepspeed_ranks.py DIRECTORY` is the only one of its run.

What it finds, a dictionary, is written to `WORLD_SIZE-RANK.pt`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed_cases import ACCUMULATION, CHUNK_ROWS, CLIP, RANKS, Case, Memory, adamw, evaluation, options, stochastic
from torch import Tensor, nn

from framework.errors import UserError
from framework.sharding.deepspeed import DeepSpeedEngine
from framework.sharding.ranks import Place, Ranks, joined_ranks
from framework.training import fused_loss

STAGES = (0, 1, 2, 3)
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
OFFLOAD_BOTH = OFFLOAD | {"offload_param": {"device": "cpu", "pin_memory": True}}
LONG = Case(tied=False, steps=20, rate=1e-2, layers=1)
CASES = {
    f"{policy} {'LoRA' if adapter else 'full'}": Case(policy, adapter)
    for policy in ("all", "checkpoint", "selective")
    for adapter in (False, True)
}
CASES_OF_STAGE = {
    0: ["all full", "selective LoRA"],
    1: ["all full", "selective LoRA"],
    2: ["all full", "selective LoRA"],
    3: [*CASES],
}
PRECISIONS = {name: Case(precision=name) for name in ("fp32_master", "pure_bf16", "fp16")}


def engine_of(ranks: Ranks, stage: int, case: Case, model: nn.Module | None = None, initial: Any = None) -> Any:
    """A prepared engine."""
    engine = DeepSpeedEngine(case.precision, ranks, options(stage, case, ranks.world_size))
    engine.prepare(model or case.build(), stochastic if case.precision == "pure_bf16" else adamw, initial)
    return engine


def train(engine: Any, ranks: Ranks, case: Case, steps: range, factor: float = 1.0) -> list[Any]:
    """The results of steps, whose losses are multiplied with a factor before they go backward."""
    results, micro_batches = [], RANKS * ACCUMULATION // ranks.world_size
    for step in steps:
        total = torch.zeros(())
        for index in range(ranks.rank * micro_batches, (ranks.rank + 1) * micro_batches):
            with engine.autocast():
                loss = case.loss(engine.model, step, index % ACCUMULATION, index // ACCUMULATION)
            engine.backward(loss * factor)
            total += loss.detach()
        results.append(engine.step(loss=total, max_grad_norm=CLIP, learning_rate=case.rate))
    return results


def forward_backward(engine: Any, ranks: Ranks, factor: float) -> Tensor:
    """One micro-batch that is in no window; its loss."""
    loss = Case().loss(engine.model, 99, 0, ranks.rank) * factor
    engine.backward(loss)
    return loss.detach()


def saved(engine: Any, ranks: Ranks) -> tuple[Memory, Memory]:
    """What all ranks would write: weights and the optimiser's state, as copies."""
    kinds = (engine.weights(), engine.optimizer_state())
    mine = [[replace(fragment, values=fragment.values.clone()) for fragment in kind] for kind in kinds]
    everyone = ranks.gather(mine)
    return Memory(f for rank in everyone for f in rank[0]), Memory(f for rank in everyone for f in rank[1])


def summary(engine: Any, ranks: Ranks, results: list[Any]) -> dict[str, Any]:
    weights, optimizer = saved(engine, ranks)
    return {"results": results, "weights": weights, "optimizer": optimizer}


def trained(ranks: Ranks, stage: int, case: Case) -> dict[str, Any]:
    """A run with an evaluation on the way, in which chunks call the head."""
    engine = engine_of(ranks, stage, case)
    results = train(engine, ranks, case, range(case.steps - 1))
    evaluated = evaluation(engine.model)
    results += train(engine, ranks, case, range(case.steps - 1, case.steps))
    return summary(engine, ranks, results) | {"evaluated": evaluated}


def undisturbed(ranks: Ranks, stage: int) -> dict[str, Any]:
    """A run between whose steps gradients are discarded and steps are not finite."""
    case, engine = Case(), engine_of(ranks, stage, Case())
    forward_backward(engine, ranks, 1.0)
    engine.discard_gradients()
    emptied = sum(tensor.count_nonzero().item() for tensor in engine.held().gradients)
    results = train(engine, ranks, case, range(1))
    lost = forward_backward(engine, ranks, float("nan") if ranks.rank == 1 else 1.0)
    bad = [engine.step(loss=lost, max_grad_norm=CLIP, learning_rate=1.0)]
    loss = forward_backward(engine, ranks, 1e30)
    bad.append(engine.step(loss=loss * 1e-30, max_grad_norm=CLIP, learning_rate=1.0))
    forward_backward(engine, ranks, 1.0)
    engine.discard_gradients()
    results += train(engine, ranks, case, range(1, 3))
    return summary(engine, ranks, results) | {"bad": bad, "emptied": emptied}


def from_meta(ranks: Ranks, stage: int, case: Case) -> dict[str, Any]:
    """A run of a model on the meta device, whose tensors come one by one in any order."""
    whole = case.build()
    values = [(name, tensor.detach().clone()) for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]]
    model = case.build().to("meta")
    if case.tied:
        model.tie_weights()
    engine = engine_of(ranks, stage, case, model, reversed(values))
    return summary(engine, ranks, train(engine, ranks, case, range(case.steps)))


def resumed(ranks: Ranks, stage: int, weights: Memory, optimizer: Memory) -> dict[str, Any]:
    """What is held after loading, and one more step."""
    case, engine = Case(), engine_of(ranks, stage, Case())
    train(engine, ranks, case, range(50, 51))
    engine.load(weights, optimizer, {})
    held = saved(engine, ranks)
    return {"weights": held[0], "optimizer": held[1], "results": train(engine, ranks, case, range(3, 4))}


def scaled(ranks: Ranks, stage: int) -> dict[str, Any]:
    """fp16: an overflow that the scale answers, two good steps that double it, and the master weights at first."""
    case = PRECISIONS["fp16"]
    engine = engine_of(ranks, stage, case)
    first = saved(engine, ranks)[0]
    results = train(engine, ranks, case, range(1), factor=1e30)
    results += train(engine, ranks, case, range(3))
    return summary(engine, ranks, results) | {"state": engine.state_dict(), "first": first}


class Toy(nn.Module):
    """Two linear layers, of which a batch may use the second only, a frozen one and frozen bytes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.frozen = nn.Linear(5, 7), nn.Linear(5, 3), nn.Linear(3, 3).requires_grad_(False)
        self.bytes = nn.Parameter(torch.arange(11, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor, both: bool) -> Tensor:
        out = self.frozen(self.second(x)) * self.bytes.float().mean() + self.shift
        return out.sum() + (self.first(x).square().sum() if both else 0.0)


def toy(ranks: Ranks, stage: int, offload: bool = False) -> dict[str, Any]:
    """A step with all parameters, and one in which a layer has no gradient."""
    case = Case(zero=OFFLOAD if offload else {})
    engine = engine_of(ranks, stage, case, Toy())
    x = torch.linspace(-1, 1, 20).view(4, 5)
    for both in (True, False):
        total = torch.zeros(())
        for _ in range(RANKS * ACCUMULATION // ranks.world_size):
            loss = engine.model(x, both)
            engine.backward(loss)
            total += loss.detach()
        engine.step(loss=total, max_grad_norm=None, learning_rate=1e-2)
    return summary(engine, ranks, [])


def refusals(ranks: Ranks) -> list[str]:
    """Messages of what is refused."""
    messages = []
    fp16 = PRECISIONS["fp16"]
    try:
        DeepSpeedEngine("fp16", ranks, options(2, fp16, ranks.world_size))
    except UserError as error:
        messages.append(str(error))
    engine = engine_of(ranks, 3, Case())
    train(engine, ranks, Case(), range(1))
    weights, optimizer = saved(engine, ranks)
    incomplete = Memory([])
    for kind in ("tensors", "shapes"):
        kept = {name: value for name, value in vars(optimizer)[kind].items() if name != "exp_avg.model.norm.weight"}
        setattr(incomplete, kind, kept)
    try:
        engine.load(weights, incomplete, {})
    except UserError as error:
        messages.append(str(error))
    weights.tensors["model.norm.bias"] = weights.tensors.pop("model.norm.weight")
    weights.shapes["model.norm.bias"] = weights.shapes.pop("model.norm.weight")
    try:
        engine.load(weights, optimizer, {})
    except UserError as error:
        messages.append(str(error))
    return messages


class LateGather:
    """A gather that happens when it is waited for, and never before."""

    def __init__(self, gather: Any, arguments: dict[str, Any]) -> None:
        self._gather, self._arguments = gather, arguments

    def wait(self) -> None:
        if self._arguments:
            self._gather(**self._arguments, async_op=False)
            self._arguments = {}


@contextmanager
def late_gathers() -> Iterator[None]:
    """Let DeepSpeed's asynchronous gathers be as late as they may."""
    from deepspeed.comm.torch import TorchBackend

    at_once = TorchBackend.all_gather_into_tensor

    def gather(self: Any, async_op: bool = False, **arguments: Any) -> Any:
        given = {"self": self, **arguments}
        return LateGather(at_once, given) if async_op else at_once(**given)

    with mock.patch.object(TorchBackend, "all_gather_into_tensor", gather):
        yield


def pretend_fp16() -> None:
    """Let DeepSpeed take float16 on the CPU, where it asks for instructions of the newest ones."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def run(ranks: Ranks, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if ranks.world_size == 1:
        given = torch.load(directory / "2-0.pt", weights_only=False)["undisturbed", 3]
        for stage in STAGES:
            found["resumed", stage] = resumed(ranks, stage, given["weights"], given["optimizer"])
        return found
    found["refusals"] = refusals(ranks)
    pretend_fp16()
    for stage in STAGES:
        engine = engine_of(ranks, stage, LONG)
        found["long", stage] = summary(engine, ranks, train(engine, ranks, LONG, range(LONG.steps)))
        for name in CASES_OF_STAGE[stage]:
            found[name, stage] = trained(ranks, stage, CASES[name])
        found["undisturbed", stage] = undisturbed(ranks, stage)
        found["toy", stage] = toy(ranks, stage)
        for name, case in PRECISIONS.items():
            found[name, stage] = scaled(ranks, stage) if name == "fp16" else trained(ranks, stage, case)
    for stage in STAGES:
        given = found["undisturbed", (stage + 1) % len(STAGES)]
        found["resumed", stage] = resumed(ranks, stage, given["weights"], given["optimizer"])
    for stage in (1, 3):
        for name in ("all full", "selective LoRA"):
            found[f"meta {name}", stage] = from_meta(ranks, stage, CASES[name])
        found["offload", stage] = trained(ranks, stage, Case(zero=OFFLOAD_BOTH if stage == 3 else OFFLOAD))
        found["offload master", stage] = trained(ranks, stage, Case(zero=OFFLOAD, precision="fp32_master"))
        found["toy offload", stage] = toy(ranks, stage, offload=True)
    with late_gathers():
        found["late gathers"] = trained(ranks, 3, Case())
    found["resident"] = resident(ranks)
    found["shards"] = shards(ranks)
    return found


def resident(ranks: Ranks) -> dict[int, list[int]]:
    """Elements that this rank holds, of weights, gradients before the step, and state after one."""
    counts = {}
    for stage in STAGES:
        engine = engine_of(ranks, stage, Case(tied=False))
        train(engine, ranks, Case(), range(1))
        forward_backward(engine, ranks, 1.0)
        engine._holder.reduce()
        counts[stage] = [sum(tensor.numel() for tensor in kind) for kind in engine.held()]
        engine.discard_gradients()
    return counts


def shards(ranks: Ranks) -> dict[int, set[int]]:
    """The numbers by which a stochastic optimiser draws this rank's noise."""
    case = PRECISIONS["pure_bf16"]
    engines = {stage: engine_of(ranks, stage, case) for stage in STAGES}
    return {stage: {group["shard"] for group in engine._optimizer.param_groups} for stage, engine in engines.items()}


def main(directory: Path) -> None:
    """Run everything on this rank."""
    torch.set_num_threads(1)
    # A name of transformers' own, of which it warns itself.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    fused_loss.CHUNK_ROWS = CHUNK_ROWS
    with joined_ranks(Place.of_environment(), timeout_seconds=120) as ranks:
        found = run(ranks, directory)
        torch.save(found, directory / f"{ranks.world_size}-{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
