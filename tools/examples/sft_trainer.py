"""Token selection under TRL's `SFTTrainer`: one line more, once the trainer is made.

python tools/examples/sft_trainer.py --model runs/tiny/export --data data/default/train.jsonl
"""

import torch
from chat_data import arguments, conversations
from trl import SFTConfig, SFTTrainer

import framework

args = arguments(__doc__)
trainer = SFTTrainer(
    model=args.model,
    args=SFTConfig(
        output_dir=args.output,
        assistant_only_loss=True,
        packing=True,
        max_length=256,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        max_steps=args.max_steps,
        logging_steps=5,
        bf16=torch.cuda.is_available(),  # TRL's default, which a CPU does not have
        report_to="none",
    ),
    train_dataset=conversations(args.data),
)

framework.enable_token_selection(trainer.model)  # the line: after the trainer has put its own head on the model

trainer.train()
trainer.save_model()
