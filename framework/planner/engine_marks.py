"""When an engine is at work during a recorded step, and what it is told of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import Tensor, nn

from framework.planner.marks import FETCH, GRADIENT, RELEASE, Mark
from framework.planner.naming import Naming
from framework.sharding.fsdp import FsdpEngine
from framework.sharding.single import SingleEngine

if TYPE_CHECKING:
    from framework.planner.recorder import Recorder


@contextmanager
def marks_of(engine: Any, recorder: Recorder, naming: Naming) -> Iterator[None]:
    """Within this context the recorder hears what an engine is told of, and when it is at work.

    Args:
        engine: prepared. What FSDP2 does is not told from what passes do, so that its law has no marks.
        recorder: that hears.
        naming: of its model.
    """
    with ExitStack() as stack:
        if isinstance(engine, SingleEngine):
            stack.enter_context(_gradients_stay(engine.model, recorder, naming))
            stack.enter_context(_working(recorder, SingleEngine, "step"))
        elif isinstance(engine, FsdpEngine):
            stack.enter_context(_let_go_of_blocks(recorder))
        elif type(engine).__name__ == "DeepSpeedEngine":
            for context in _deepspeed(engine, recorder, naming):
                stack.enter_context(context)
        yield


@contextmanager
def _gradients_stay(model: nn.Module, recorder: Recorder, naming: Naming) -> Iterator[None]:
    def told(parameter: nn.Parameter) -> None:
        recorder.mark(Mark(GRADIENT, *naming.parameters[parameter]), parameter.grad)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # torch's hooks are not annotated.
    handles = [p.register_post_accumulate_grad_hook(told) for p in trained]  # type: ignore[no-untyped-call]  # torch's
    yield
    for handle in handles:
        handle.remove()


def _let_go_of_blocks(recorder: Recorder) -> AbstractContextManager[Any]:
    """What replaces the end of FSDP2's backward pass, where it frees what it has kept for every block."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    plain = FSDPState._root_post_backward_final_callback

    def end(self: FSDPState) -> None:
        with recorder.after_blocks():
            plain(self)

    return mock.patch.object(FSDPState, "_root_post_backward_final_callback", end)


def _deepspeed(engine: Any, recorder: Recorder, naming: Naming) -> Iterator[AbstractContextManager[Any]]:
    from deepspeed.runtime.engine import DeepSpeedEngine as Package
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Stages12

    from framework.sharding.zero_stages import FlatPartitions, WholeParameters

    def entered(module: nn.Module, **_: Any) -> tuple[Mark, Tensor | None]:
        return Mark(FETCH, *naming.modules[module]), None

    def left(module: nn.Module, **_: Any) -> tuple[Mark, Tensor | None]:
        return Mark(RELEASE, *naming.modules[module]), None

    def reduced(parameter: nn.Parameter, *_: Any) -> tuple[Mark, Tensor | None]:
        return Mark(GRADIENT, *naming.parameters[parameter]), parameter.grad

    yield _working(recorder, type(engine), "step")
    if isinstance(engine._holder, WholeParameters):
        yield _gradients_stay(engine.model, recorder, naming)
        return
    yield _working(recorder, Coordinator, "fetch_sub_module", entered)
    yield _working(recorder, Coordinator, "release_sub_module", left)
    yield _working(recorder, Coordinator, "reset_step")
    yield _working(recorder, Stage3, "reduce_ready_partitions_and_remove_grads", reduced)
    yield _working(recorder, Stage3, "independent_gradient_partition_epilogue")
    yield _working(recorder, Stages12, "process_gradients", reduced)
    yield _working(recorder, Stages12, "independent_gradient_partition_epilogue")
    yield _working(recorder, Package, "allreduce_gradients")
    yield _working(recorder, FlatPartitions, "_add_up")


def _working(
    recorder: Recorder, owner: type, method: str, mark_of: Callable[..., tuple[Mark, Tensor | None]] | None = None
) -> AbstractContextManager[Any]:
    """What replaces a method by itself, at work, after a mark."""
    plain = getattr(owner, method)

    def working(self: Any, *arguments: Any, **options: Any) -> Any:
        if mark_of is not None:
            recorder.mark(*mark_of(*arguments, **options))
        with recorder.at_work():
            return plain(self, *arguments, **options)

    return mock.patch.object(owner, method, working)
