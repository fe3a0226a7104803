"""Token selection in a loop of one's own with Accelerate.

python tools/examples/accelerate_loop.py --model runs/tiny/export --data data/default/train.jsonl
"""

from itertools import chain, islice, repeat

import torch
from accelerate import Accelerator
from chat_data import arguments, tokenized
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import framework

ACCUMULATION = 2

args = arguments(__doc__)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model).train()

selection = framework.enable_token_selection(model)  # the line

accelerator = Accelerator()
accelerator.register_for_checkpointing(selection)  # its draws, where it draws, are part of the state
loader = DataLoader(
    tokenized(args.data, tokenizer),
    batch_size=8,
    shuffle=True,
    collate_fn=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

batches = chain.from_iterable(repeat(loader))
for step in range(1, args.max_steps + 1):
    window = list(islice(batches, ACCUMULATION))
    # The mean is over the labels of the whole window and of all processes, whose gradients Accelerate averages.
    labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
    count = accelerator.reduce(labels.float(), "mean")
    total = 0.0
    for batch in window:
        loss = model(**batch, num_items_in_batch=count).loss
        accelerator.backward(loss)
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0 or step == args.max_steps:
        accelerator.print(f"step {step}: loss {total:.4f}")

accelerator.unwrap_model(model).save_pretrained(args.output, is_main_process=accelerator.is_main_process)
tokenizer.save_pretrained(args.output)
