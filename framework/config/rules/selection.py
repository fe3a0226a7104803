"""Rules about selection and retention."""

from __future__ import annotations

from framework.config.rules.registry import CLASSIFICATION, rule


@rule("selection.strategy", "selection.ratio")
def _ratio_suits_strategy(strategy: str, ratio: float | str | None) -> tuple[str, str] | None:
    if ratio == "labelled" and strategy != "supervised":
        return "selection.ratio", f'"labelled" needs selection.strategy "supervised", which is "{strategy}"'
    if strategy == "none" and ratio not in (None, 1.0):
        shown = f'"{ratio}"' if ratio == "auto" else ratio
        return "selection.ratio", f'{shown} has no effect with selection.strategy "none": name a strategy'
    if strategy in ("uniform", "bernoulli", "suffix") and ratio is None:
        return "selection.ratio", f'missing: selection.strategy "{strategy}" needs a number in (0, 1], or "auto"'
    return None


@rule("selection.strategy", "selection.tokentune")
def _tokentune_is_uniform(strategy: str, tokentune: bool) -> tuple[str, str] | None:
    if tokentune and strategy != "uniform":
        return "selection.tokentune", f'needs selection.strategy "uniform", which is "{strategy}"'
    return None


@rule("selection.strategy", "selection.ratio", "retention.policy")
def _selection_needs_selective(strategy: str, ratio: float | str | None, policy: str) -> tuple[str, str] | None:
    if strategy == "none" or ratio == 1.0 or policy in ("selective", "auto"):
        return None
    return "retention.policy", (
        f'"{policy}" is for exact training, but selection.strategy "{strategy}" without selection.ratio 1.0 '
        'leaves tokens out: set retention.policy "selective", or selection.strategy "none"'
    )


@rule("retention.policy", "retention.retain_linears")
def _retain_linears_needs_selective(policy: str, retain_linears: bool) -> tuple[str, str] | None:
    if retain_linears and policy not in ("selective", "auto"):
        return "retention.retain_linears", f'needs retention.policy "selective", which is "{policy}"'
    return None


@rule("retention.policy", "retention.kv_format")
def _kv_format_needs_selective(policy: str, kv_format: str) -> tuple[str, str] | None:
    if kv_format != "model" and policy not in ("selective", "auto"):
        return "retention.kv_format", f'"{kv_format}" needs retention.policy "selective", which is "{policy}"'
    return None


@rule("retention.policy", "retention.placement")
def _host_needs_selective(policy: str, placement: str) -> tuple[str, str] | None:
    if placement != "device" and policy not in ("selective", "auto"):
        return "retention.placement", f'"{placement}" needs retention.policy "selective", which is "{policy}"'
    return None


@rule("selection.strategy", "selection.correction", "model.task")
def _correction_needs_draws(strategy: str, correction: float, task: str) -> tuple[str, str] | None:
    if not correction:
        return None
    if task != "causal_lm":
        return "selection.correction", (
            f'model.task "{task}" has none: where tokens see later ones, a gradient\'s path can come back to a token'
        )
    if strategy not in ("supervised", "uniform", "bernoulli"):
        return "selection.correction", f'has no effect with selection.strategy "{strategy}", which draws no tokens'
    return None


@rule("model.task", "selection.strategy", "selection.normalization")
def _suffix_is_biased(task: str, strategy: str, normalization: str | None) -> tuple[str, str] | None:
    if strategy == "suffix" and normalization == "supervised" and task not in CLASSIFICATION:
        return "selection.normalization", (
            '"supervised" makes up for labels that are left out by chance, and selection.strategy "suffix" leaves the '
            'same ones out for certain: set it to "selected", or leave it out'
        )
    return None


@rule("model.task", "selection.normalization")
def _one_label_a_sample_needs_no_weights(task: str, normalization: str | None) -> tuple[str, str] | None:
    if normalization == "selected" and task in CLASSIFICATION:
        return "selection.normalization", (
            f'"{normalization}" has no effect with model.task "{task}": the pooled token, which alone carries a label, '
            "is always selected"
        )
    return None
