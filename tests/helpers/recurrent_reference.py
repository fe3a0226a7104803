"""The slow reference of blocks with recurrent state, by the models' own caches.

Each sequence runs by itself: the tokens before its run without a graph into the model's own cache, then the run from
there with one. So the state that is handed over is a constant, and the keys and values before the run are.
"""

import torch
from torch.nn import functional
from transformers import DynamicCache

from framework.retention.reference import reference_gradients
from framework.training.loss import rows_loss, unwrapped


def last_logits(model, ids, mask, first, last):
    """Logits of the tokens from `first` on with rows and keys outside of the mask cut, those before from a cache."""
    cache = DynamicCache(config=model.config)
    name = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"

    def run(start, stop):
        position = {} if name == "cache_params" else {"position_ids": torch.arange(start, stop)[None]}
        return model(input_ids=ids[:, start:stop], use_cache=True, **{name: cache}, **position).logits[0]

    if first:
        with torch.no_grad():
            run(0, first)
    with reference_gradients(model, mask[:, :last]):
        return run(first, last)


def reference_step(steps, model, inputs, selection):
    """Loss, logits and gradients by the model's own cache; rows between selected ones are cut."""
    mask = selection.mask(inputs["input_ids"].shape[1])
    targets = functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    total, count, logits = 0.0, 0, []
    for row in mask.any(1).nonzero()[:, 0].tolist():
        (chosen,) = mask[row].nonzero(as_tuple=True)
        first, last = int(chosen[0]), int(chosen[-1]) + 1
        sequence = slice(row, row + 1)
        found = last_logits(unwrapped(model), inputs["input_ids"][sequence], mask[sequence], first, last)
        kept = mask[row, first:last] & (targets[row, first:last] != -100)
        loss = rows_loss(found[kept], targets[row, first:last][kept])
        loss.backward()
        total, count = total + loss.detach(), count + int(kept.sum())
        logits.append(found[kept].detach())
    gradients = {name: gradient / count for name, gradient in steps.collect(model).items()}
    return total / count, torch.cat(logits), gradients
