"""From a config and machines to plans: the ledger and the time model of a job, searched and reported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from framework.config import Config
from framework.errors import UserError
from framework.models import configured_tokenizer
from framework.models.architecture import describe
from framework.models.configured import base_config, configured_empty_model
from framework.models.products import matrix_products
from framework.models.quantization import quantized_elements
from framework.models.wrapping import unwrapped
from framework.planner.changes import AUTO, Change, MoreRanks
from framework.planner.choice import Choice
from framework.planner.hardware import Cluster
from framework.planner.holders import Holders
from framework.planner.kinds import config_of_law, kind_of
from framework.planner.law import StepLaw
from framework.planner.laws import NoLaw, laws_of
from framework.planner.ledger import Ledger
from framework.planner.linears import retention_order
from framework.planner.memory import MemoryModel
from framework.planner.naming import weights_of
from framework.planner.plan import Plan, launch_line, plan_json
from framework.planner.profile import Profile
from framework.planner.rates import MASKED_KERNELS, rates_of
from framework.planner.report import Report, sharding_words
from framework.planner.search import Budget, Found, Laws, Point, search
from framework.planner.small_models import Family
from framework.planner.space import ENGINES, Candidate, candidates
from framework.planner.symbols import model_symbols
from framework.planner.timing import TimeModel
from framework.planner.work import KERNELS_OF_A_BLOCK, Job
from framework.retention import blocks_of
from framework.retention.linears import PackedLinear, check_retained
from framework.sharding.deepspeed_config import OwnOptions, bucket_sizes
from framework.sharding.engines import engine_options, model_sizes
from framework.training.parameter_groups import parameter_groups

KERNELS_OF_AN_ADAPTER = 10
"""What LoRA at a layer adds for the host to issue: 14 operators, where a Llama block's 60 kernels are 88 operators."""

KERNELS_OF_NF4 = 9
"""The same of making a layer's matrix from its codes: 13 operators."""


@dataclass(frozen=True)
class Planned:
    """Plans of a job.

    Attributes:
        found: by the search.
        plans: of its points, the best first.
        budget: of a rank.
        cluster: that the plans are for.
        labelled_share: labelled tokens / all tokens.
        smallest: ledger of the candidate that takes least; None where a plan fits.
        changes: that would make the job fit, where nothing fits; see `framework.planner.advice`.
        more_ranks: the fewest on which it would.
    """

    found: Found
    plans: tuple[Plan, ...]
    budget: Budget
    cluster: Cluster
    labelled_share: float
    smallest: Ledger | None
    changes: tuple[Change, ...] = ()
    more_ranks: MoreRanks | None = None

    def to_json(self) -> dict[str, Any]:
        """In the shape of `plan.json`."""
        return plan_json(self.plans, self.budget.bytes)

    def report(self, config_path: str, given: Sequence[str] = ()) -> Report:
        """For people.

        Args:
            config_path: of the config, for the launch line.
            given: keys that were overridden, as `--set` takes them, for the launch line too.
        """
        nodes = self.cluster.nodes
        launch = launch_line(self.plans[0], config_path, nodes, given) if self.plans else None
        return Report(
            found=self.found,
            plans=self.plans,
            budget=self.budget,
            ranks=self.cluster.ranks,
            nodes=nodes,
            labelled_share=self.labelled_share,
            launch=launch,
            smallest=self.smallest,
            changes=self.changes,
            more_ranks=self.more_ranks,
        )


class PlannedJob:
    """A job whose choices can be weighed.

    Args:
        config: of the run, with its open keys.
        labelled_share: labelled tokens / all tokens of its data.
        say: is told what takes time.
        one_by_one: DeepSpeed gathers weights one by one and none ahead, as over gloo.
        own: a user's own options of DeepSpeed.

    Raises:
        UserError: the model is not what can be planned for.
    """

    def __init__(
        self,
        config: Config,
        labelled_share: float,
        say: Callable[[str], None],
        *,
        one_by_one: bool = False,
        own: OwnOptions | None = None,
    ) -> None:
        if config.model.task != "causal_lm" or config.data.sequence_length is None:
            raise UserError(f"model.task: the planner knows causal_lm only, not {config.model.task}")
        self.config, self.labelled_share, self._say = config, labelled_share, say
        self._one_by_one, self._own = one_by_one, own
        self._described = described = _described(config)
        model = configured_empty_model(described, _tokenizer(described))
        self._family = Family(base_config(described))
        self._symbols = model_symbols(model)
        self._model_sizes = model_sizes(describe(unwrapped(model), task=config.model.task))
        self._laws: dict[Choice, StepLaw | NoLaw] = {}
        self._told: set[str] = set()
        adapter = config.model.adapter
        rank = None if adapter is None else adapter.rank
        weights = weights_of(model, parameter_groups(model, described.optimizer))
        own_buffers = {} if own is None else own.buffers
        self.memory = MemoryModel(
            self._law,
            self._symbols,
            weights,
            Holders(described, weights, bucket_sizes(self._model_sizes) | own_buffers, one_by_one=one_by_one),
            blocks=self._family.depth,
            sequence_length=config.data.sequence_length,
            labelled_share=labelled_share,
            adapter_rank=rank,
        )
        self.time = TimeModel(self._job(model, rank), self._sent)
        self.linears = retention_order(self.time.job.products)
        blocks = blocks_of(unwrapped(model)).values()
        check_retained(blocks, [] if config.retention.retain_linears == AUTO else config.retained_linears)

    def _job(self, model: nn.Module, adapter_rank: int | None) -> Job:
        inner, config = unwrapped(model), self.config
        blocks = blocks_of(inner)
        inside = {parameter for block in blocks.values() for parameter in block.parameters()}
        quantized, quantized_bytes = quantized_elements(model)
        assert config.data.sequence_length is not None
        return Job(
            products=matrix_products(inner, blocks),
            parameters=round(self._symbols["parameters"]) + quantized,
            trainable=round(self._symbols["trained"]),
            outside=sum(p.numel() for p in model.parameters() if p not in inside),
            hidden_size=inner.config.get_text_config().hidden_size,
            precision=config.optimizer.precision,
            optimizer=config.optimizer.name,
            sequence_length=config.data.sequence_length,
            labelled_share=self.labelled_share,
            kernel=config.model.attention,
            masked=config.model.attention in MASKED_KERNELS,
            trained_tensors=round(self._symbols["trained_tensors"]),
            kernels=self._kernels(model, len(blocks)),
            quantized=quantized,
            quantized_bytes=quantized_bytes,
            adapter_rank=adapter_rank,
        )

    def _kernels(self, model: nn.Module, blocks: int) -> float:
        """Of a block's forward pass."""
        adapted = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
        packed = sum(isinstance(module, PackedLinear) for module in model.modules())
        return KERNELS_OF_A_BLOCK + (KERNELS_OF_AN_ADAPTER * adapted + KERNELS_OF_NF4 * packed) / blocks

    def _law(self, choice: Choice) -> StepLaw:
        law = self._laws[kind_of(choice)]
        assert isinstance(law, StepLaw)
        return law

    def _sent(self, choice: Choice) -> float:
        return self.memory.sent(choice) if choice.placement == "host" else 0.0

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self._family.depth

    def with_config(self, config: Config) -> PlannedJob:
        """The same model and data with other settings: of those that a choice has, of batch, hardware or planner."""
        other = copy.copy(self)
        other.config, other._described = config, _described(config)
        return other

    def of_config(self, config: Config) -> PlannedJob:
        """A job of another model, on the same data."""
        return PlannedJob(config, self.labelled_share, self._say, one_by_one=self._one_by_one, own=self._own)

    def space(self, ranks: int, nodes: int) -> list[Candidate]:
        """What the config permits on so many ranks.

        Raises:
            UserError: nothing.
        """
        space = candidates(
            self.config, ranks=ranks, nodes=nodes, labelled_share=self.labelled_share, linears=self.linears
        )
        if self._own is not None:
            # Where it contradicts all of them, it is refused when the engine is made.
            space = [each for each in space if self._is_permitted(each.choice)] or space
        if ranks > 1:
            return space
        # In one process the other engines do the same and hold more, unless they offload.
        alone = [each for each in space if each.choice.engine == "single" or each.choice.offload_optimizer]
        return alone or space

    def _is_permitted(self, choice: Choice) -> bool:
        """Whether a user's own options leave a choice."""
        if self._own is None or choice.zero_stage is None:
            return True
        return self._own.permits(
            choice.zero_stage,
            offload_optimizer=choice.offload_optimizer,
            offload_parameters=choice.offload_parameters,
        )

    def recorded(self, space: Iterable[Candidate]) -> list[Candidate]:
        """The candidates whose laws are there."""
        return [each for each in space if isinstance(self._laws.get(kind_of(each.choice)), StepLaw)]

    def unrecorded(self, space: Iterable[Candidate]) -> list[Choice]:
        """Of each law that was not asked for yet, the kind of choice."""
        kinds = dict.fromkeys(kind_of(each.choice) for each in space)
        return [kind for kind in kinds if kind not in self._laws]

    def known(self, space: Sequence[Candidate]) -> list[Candidate]:
        """The candidates whose laws are to be had; says why others are left out.

        Raises:
            UserError: there are none.
            RunError: laws cannot be recorded.
        """
        learn([(self, space)], self._say)
        kept, missing = self.recorded(space), self.missing(space)
        if not kept:
            raise UserError("\n".join(missing))
        for reason, choices in missing.items():
            engines = dict.fromkeys(map(sharding_words, choices))
            line = f"left out: {len(choices)} settings of {', '.join(engines)}: {reason}"
            if line not in self._told:
                self._told.add(line)
                self._say(line)
        return kept

    def missing(self, space: Sequence[Candidate]) -> dict[str, list[Choice]]:
        """Why there are no laws, and of which kinds of choices."""
        missing: dict[str, list[Choice]] = {}
        for kind in dict.fromkeys(kind_of(each.choice) for each in space):
            law = self._laws.get(kind)
            if isinstance(law, NoLaw):
                missing.setdefault(law.reason, []).append(kind)
        return missing

    def laws(self, cluster: Cluster, profile: Profile) -> Laws:
        """What a choice takes on a cluster."""
        rates = rates_of(self.config, cluster, profile)
        return Laws(
            lambda choice: self.memory(choice).with_workspaces(profile.workspace_bytes),
            lambda choice: self.time.step(choice, rates).total,
            self.recorded,
            self.linears,
        )

    def plan(
        self, cluster: Cluster, profile: Profile, *, engines: Sequence[str] = ENGINES, top: int | None = None
    ) -> Planned:
        """The plans for a cluster.

        Args:
            cluster: that the job is to run on.
            profile: of its machines.
            engines: that can be taken where the config leaves that open.
            top: plans to find; None for `planner.top`.

        Raises:
            UserError: nothing can be chosen from.
            RunError: a law cannot be recorded.
        """
        config, space = self.config, self.space(cluster.ranks, cluster.nodes)
        if config.sharding.engine == "auto":
            space = [each for each in space if each.choice.engine in engines] or space
        space = self.known(space)
        laws, budget = self.laws(cluster, profile), budget_of(cluster, profile)
        options = config.planner if top is None else config.planner.model_copy(update={"top": top})
        found = search(space, laws, budget, options, labelled_share=self.labelled_share)
        plans = tuple(self._plan(point, cluster, profile) for point in found.points[: options.top])
        smallest = None if plans else self.smallest(space, laws).ledger
        return Planned(found, plans, budget, cluster, self.labelled_share, smallest)

    def smallest(self, space: Iterable[Candidate], laws: Laws) -> Point:
        """The point of a space that takes least."""
        points = ((choice, laws.memory(choice)) for choice in (each.at(each.lowest) for each in space))
        choice, ledger = min(points, key=lambda point: point[1].peak)
        return Point(choice, ledger, laws.seconds(choice))

    def _plan(self, point: Point, cluster: Cluster, profile: Profile) -> Plan:
        return Plan.of(
            self.config,
            point,
            self.labelled_share,
            engine_options=lambda resolved: engine_options(resolved, self._model_sizes, cluster.ranks, self._own),
            reserved_bytes=lambda planned: round(planned.ledger.peak * profile.reserved_ratio),
        )


def budget_of(cluster: Cluster, profile: Profile) -> Budget:
    """What a rank may take: the allocator's, fragmentation included, and its share of the host's memory."""
    host = None if cluster.host_bytes is None else cluster.host_bytes // cluster.gpus_per_node
    return Budget(cluster.budget_bytes, host, lambda ledger: round(ledger.peak * profile.reserved_ratio))


def learn(
    wanted: Sequence[tuple[PlannedJob, Iterable[Candidate]]], say: Callable[[str], None], most: int | None = None
) -> None:
    """Get the laws of candidates, of jobs with models of one family, all together.

    Args:
        wanted: jobs and candidates of each.
        say: is told what takes time.
        most: laws to record, see `laws_of`.

    Raises:
        RunError: laws cannot be recorded.
    """
    missing: dict[tuple[int, Choice], PlannedJob] = {}
    for job, space in wanted:
        for kind in job.unrecorded(space):
            missing.setdefault((id(job._laws), kind), job)
    if not missing:
        return
    configs = [config_of_law(job._described, kind) for (_, kind), job in missing.items()]
    family = next(iter(missing.values()))._family
    for ((_, kind), job), law in zip(missing.items(), laws_of(configs, family, say, most), strict=True):
        job._laws[kind] = law


def _described(config: Config) -> Config:
    """The run with its architecture from `model.from_config`, where that has it: planning needs no weights."""
    if config.model.from_config is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": None})})


def _tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """Only where tokens are added, whose ids it has."""
    return configured_tokenizer(config) if config.model.added_tokens else None
