"""Token selection under `transformers.Trainer`: one line more.

python tools/examples/trainer.py --model runs/tiny/export --data data/default/train.jsonl
"""

from chat_data import arguments, tokenized
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import framework

args = arguments(__doc__)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)

framework.enable_token_selection(model)  # the line: gradient flows through the labelled tokens only

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        max_steps=args.max_steps,
        logging_steps=5,
        report_to="none",
    ),
    train_dataset=tokenized(args.data, tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()  # a stock model: nothing of token selection is in its files
