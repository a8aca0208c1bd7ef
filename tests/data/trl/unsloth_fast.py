# An Unsloth notebook as a script: FastLanguageModel, LoRA by get_peft_model, vLLM by fast_inference.
import re

from unsloth import FastLanguageModel

max_seq_length, lora_rank = 1024, 64
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="meta-llama/Llama-3.1-8B-Instruct",
    max_seq_length=max_seq_length,
    load_in_4bit=True,
    fast_inference=True,
    max_lora_rank=lora_rank,
    gpu_memory_utilization=0.6,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=lora_rank,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=lora_rank,
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)
match_numbers = re.compile(r"<answer>(\d+)</answer>")


def check_numbers(prompts, completions, answer, **kwargs):
    found = [match_numbers.search(each[0]["content"]) for each in completions]
    return [1.0 if each and each[1] == right else 0.0 for each, right in zip(found, answer, strict=True)]


max_prompt_length = 287 + 1

from trl import GRPOConfig, GRPOTrainer

training_args = GRPOConfig(
    learning_rate=5e-6,
    adam_beta1=0.9,
    adam_beta2=0.99,
    weight_decay=0.1,
    warmup_ratio=0.1,
    lr_scheduler_type="cosine",
    optim="paged_adamw_8bit",
    logging_steps=1,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=6,
    num_generations=6,
    max_prompt_length=max_prompt_length,
    max_completion_length=max_seq_length - max_prompt_length,
    max_steps=250,
    save_steps=250,
    max_grad_norm=0.1,
    report_to="none",
    output_dir="outputs",
)
trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[check_numbers],
    args=training_args,
    train_dataset=dataset,  # made in another cell
)
trainer.train()
model.save_lora("grpo_saved_lora")
