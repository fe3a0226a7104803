"""The keys of DeepSpeed's JSON: whose each is. Known as of DeepSpeed 0.19. Must not import torch."""

from __future__ import annotations

_PRECISION = "optimizer.precision"

RUN_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size / (training.micro_batch_size x ranks)",
    "gradient_clipping": "training.max_grad_norm",
    "bf16": _PRECISION,
    "bf16.enabled": _PRECISION,
    "fp16": "optimizer.precision and optimizer.loss_scale",
    "fp16.enabled": _PRECISION,
    "data_types": _PRECISION,
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "optimizer.name",
    "optimizer.type": "optimizer.name",
    "zero_optimization.stage": "sharding.zero_stage",
    "zero_optimization.offload_optimizer": "sharding.offload_optimizer",
    "zero_optimization.offload_param": "sharding.offload_parameters",
}
"""Keys that the run decides, and the key of its config that does."""

PASSED_KEYS = (
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "timers",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "wandb",
    "comet",
    "csv_monitor",
    "aio",
)
"""Keys that are passed on as they are."""

_PIPELINE = "the model is not a pipeline"
_DATA = "the run's `data` section says what comes in which order"
_MODEL = "it changes the model or its weights"
_CHECKPOINT = "the run writes its own checkpoints"
_SUM = "gradients are summed over micro-batches and ranks in one way, so that any split gives the same loss"

REFUSED_KEYS = {
    "gradient_predivide_factor": _SUM,
    "prescale_gradients": _SUM,
    "communication_data_type": "gradients are exchanged in the dtype that optimizer.precision gives them",
    "seq_parallel_communication_data_type": "sequences are not split over ranks",
    "managed_gradient_accumulation": "the engine says itself when a window ends",
    "sparse_gradients": "gradients of embeddings are dense here",
    "disable_allgather": "it leaves the ranks with different weights",
    "amp": 'it needs Apex: optimizer.precision "fp32_master" or "fp16" instead',
    "torch_autocast": 'it is a second precision beside optimizer.precision: "fp32_master" there instead',
    "bfloat16": 'an old name of "bf16"',
    "activation_checkpointing": "the run's `retention` section says what blocks keep",
    "curriculum_learning": _DATA,
    "data_efficiency": _DATA,
    "dataloader_drop_last": _DATA,
    "progressive_layer_drop": _MODEL,
    "eigenvalue": _MODEL,
    "quantize_training": _MODEL,
    "compression_training": _MODEL,
    "weight_quantization": _MODEL,
    "sparse_attention": _MODEL,
    "hybrid_engine": "it is for generating while training",
    "elasticity": "it changes the batch size with the number of ranks; runs resume with any number of them",
    "autotuning": "the run's settings are fixed when it starts",
    "pipeline": _PIPELINE,
    "use_data_before_expert_parallelism": "experts are not split over ranks",
    "expert_parallel": "experts are not split over ranks",
    "tensor_parallel": "matrices are not split over ranks",
    "sequence_parallel_size": "sequences are not split over ranks",
    "data_parallel_size": "every rank is a data-parallel one",
    "checkpoint": _CHECKPOINT,
    "nebula": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "load_universal_checkpoint": _CHECKPOINT,
    "compile": "blocks are compiled by the run, not by DeepSpeed",
    "graph_harvesting": "its graphs do not hold blocks that are replayed",
    "vocabulary_size": "the model has one",
}
"""Keys that are refused if they ask for something, and why."""

SIZE_KEYS = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
)
"""Keys of `zero_optimization` that are numbers of elements."""

PASSED_ZERO_KEYS = (
    *SIZE_KEYS,
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "round_robin_gradients",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "ignore_unused_parameters",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save",
    "memory_efficient_linear",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
)
"""Keys of `zero_optimization` that are passed on as they are."""

OFFLOAD_KEYS = ("offload_optimizer", "offload_param")

_QUANTIZED = "it rounds weights or gradients to fewer bits than optimizer.precision says"
_OLD = 'an old key: sharding.offload_optimizer and sharding.offload_parameters, and "pin_memory" in their sections'

REFUSED_ZERO_KEYS = {
    "zero_quantized_weights": (False, _QUANTIZED),
    "zero_quantized_nontrainable_weights": (False, _QUANTIZED),
    "zero_quantized_gradients": (False, _QUANTIZED),
    "zeropp_loco_param": (None, _QUANTIZED),
    "zero_hpz_partition_size": (1, "a second partition of the weights is not saved or loaded"),
    "mics_shard_size": (-1, "partitions over a part of the ranks are not saved or loaded"),
    "mics_hierarchical_params_gather": (False, "it belongs to mics_shard_size"),
    "zenflow": (None, "it updates weights with gradients of earlier steps"),
    "leaf_module": (None, "blocks are replayed module by module"),
    "stage3_module_granularity_threshold": (0, "blocks are replayed module by module"),
    "legacy_stage1": (False, "DeepSpeed has dropped it"),
    "elastic_checkpoint": (False, _CHECKPOINT),
    "load_from_fp32_weights": (True, _CHECKPOINT),
    "pipeline_loading_checkpoint": (False, _CHECKPOINT),
    "save_muon_momentum_buffer_in_memory": (False, "the optimiser is AdamW"),
    "cpu_offload": (False, _OLD),
    "cpu_offload_param": (False, _OLD),
    "cpu_offload_use_pin_memory": (False, _OLD),
    "stage3_gather_fp16_weights_on_model_save": (False, _CHECKPOINT),
}
"""Keys of `zero_optimization` that are refused unless they have this value, and why."""

_NVME = "offloading to a disk is not supported"

REFUSED_OFFLOAD_KEYS = {
    "nvme_path": (None, _NVME),
    "buffer_count": (None, _NVME),
    "buffer_size": (None, _NVME),
    "max_in_cpu": (None, _NVME),
    "pipeline_read": (False, _NVME),
    "pipeline_write": (False, _NVME),
    "fast_init": (False, _NVME),
    "ratio": (1.0, "part of the state on the device needs DeepSpeed's own optimiser"),
    "super_offload": (False, "it needs DeepSpeed's own optimiser"),
    "cpuadam_cores_perc": (None, "it belongs to super_offload"),
}
"""Keys of the offload sections that are refused unless they have this value, and why."""
