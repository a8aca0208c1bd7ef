# DAPO: settings gathered in mappings that are merged, and handed over with **.
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from my_rewards import accuracy, soft_overlong  # isort: skip

common = dict(output_dir="out", max_steps=1_000, report_to=["tensorboard"], logging_steps=5)
sampling = {"num_generations": 16, "per_device_train_batch_size": 64, "max_completion_length": 4096, "temperature": 1.0}
dapo = {
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.0,
    "mask_truncated_completions": True,
    "scale_rewards": "batch",
}
lora = dict(r=64, lora_alpha=64, target_modules="all-linear", use_rslora=True, bias="none")

config = GRPOConfig(**{**common, **sampling}, **dapo, learning_rate=1e-6, warmup_steps=20, top_k=50)
trainer = GRPOTrainer(
    "Qwen/Qwen2.5-3B",
    [accuracy, soft_overlong],
    config,
    train_dataset=None,
    peft_config=LoraConfig(**lora),
)
trainer.train()
