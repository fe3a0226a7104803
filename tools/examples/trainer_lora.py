"""Token selection with a LoRA adapter under `transformers.Trainer`, with draws that a resumed run repeats.

python tools/examples/trainer_lora.py --model runs/tiny/export --data data/default/train.jsonl
"""

from chat_data import arguments, tokenized
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import framework

args = arguments(__doc__)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))

# All labelled tokens, and so much of the context, drawn at random, that four tenths of the tokens are selected.
selection = framework.enable_token_selection(model, ratio=0.4)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_steps=args.max_steps,
        logging_steps=5,
        report_to="none",
    ),
    train_dataset=tokenized(args.data, tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
    processing_class=tokenizer,
    callbacks=[framework.TokenSelectionCallback(selection)],
)
trainer.train()
trainer.save_model()  # the adapter alone
