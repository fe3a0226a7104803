"""A run's model with its transforms, and the engine that is about to take it over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import PreTrainedModel

from framework.config import Config
from framework.models import configured_model, count_parameters, sharded_model
from framework.models.architecture import describe
from framework.models.wrapping import unwrapped
from framework.sharding.deepspeed_config import OwnOptions
from framework.sharding.engines import engine_options, make_engine, model_sizes
from framework.sharding.protocol import Engine, InitialTensors
from framework.sharding.ranks import Ranks
from framework.training.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedModel:
    """What is decided about a model before it is placed.

    Attributes:
        model: with adapter, selection and retention; on the meta device where weights are sharded.
        initial: its weights then, see `Engine.prepare`; None where it has them.
        objective: the loss.
        engine: that holds no model yet.
        options: the engine's, as JSON values.
        counts: parameters and trained parameters, for people.
    """

    model: PreTrainedModel | PeftModel
    initial: InitialTensors | None
    objective: Objective
    engine: Engine
    options: dict[str, Any]
    counts: str

    @classmethod
    def build(
        cls,
        config: Config,
        tokenizer: PreTrainedTokenizerBase | None,
        ranks: Ranks,
        own_options: OwnOptions | None,
    ) -> PreparedModel:
        """Build model and engine of a run.

        Args:
            config: of the run.
            tokenizer: with the added tokens; None for images.
            ranks: of the run.
            own_options: a user's own options of DeepSpeed.

        Raises:
            UserError: the model cannot be had, or something does not go with it.
        """
        initial: InitialTensors | None = None
        if config.shards_weights:
            model, initial = sharded_model(config, tokenizer, turn=ranks.in_turn)
        else:
            model = configured_model(config, tokenizer)
        sizes = model_sizes(describe(unwrapped(model), task=config.model.task))
        options = engine_options(config, sizes, ranks.world_size, own_options)
        engine = make_engine(config, ranks, options)
        parameters, trainable = count_parameters(model)
        counts = f"{parameters:,} parameters, {trainable:,} trained"
        return cls(model, initial, Objective(model, config, engine.device), engine, options, counts)


def placed(engine: Engine, ranks: Ranks) -> str:
    """Where the model is, for people."""
    if ranks.world_size == 1:
        return f"on {engine.device}"
    return f"over {ranks.world_size} ranks, each on a {engine.device.type} device"
