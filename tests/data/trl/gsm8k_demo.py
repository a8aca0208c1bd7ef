# A GSM8K demo as many copy it: a model opened by hand, several rewards, f-strings, a branch on the model's name.
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

SIZE = "1.5B"
model_name = f"Qwen/Qwen2.5-{SIZE}-Instruct"
if "Llama" in model_name:
    run_name = "Llama-GRPO-gsm8k"
else:
    run_name = "Qwen-GRPO-gsm8k"


def correctness_reward_func(prompts, completions, answer, **kwargs) -> list[float]:
    return [2.0 if right in each[0]["content"] else 0.0 for each, right in zip(completions, answer, strict=True)]


def strict_format_reward_func(completions, **kwargs) -> list[float]:
    return [0.5 if each[0]["content"].startswith("<reasoning>") else 0.0 for each in completions]


dataset = load_dataset("openai/gsm8k", "main")["train"]
training_args = GRPOConfig(
    output_dir=f"outputs/{run_name}",
    run_name=run_name,
    learning_rate=5e-6,
    adam_beta1=0.9,
    adam_beta2=0.99,
    weight_decay=0.1,
    warmup_ratio=0.1,
    lr_scheduler_type="cosine",
    logging_steps=1,
    bf16=True,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=4,
    num_generations=16,
    max_prompt_length=256,
    max_completion_length=786,
    num_train_epochs=1,
    save_steps=100,
    max_grad_norm=0.1,
    report_to="wandb",
    log_on_each_node=False,
)
peft_config = LoraConfig(
    r=16,
    lora_alpha=64,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"],
    task_type="CAUSAL_LM",
    lora_dropout=0.05,
)
model = AutoModelForCausalLM.from_pretrained(
    model_name, torch_dtype=torch.bfloat16, attn_implementation="flash_attention_2", device_map=None
).to("cuda")
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token

trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[strict_format_reward_func, correctness_reward_func],
    args=training_args,
    train_dataset=dataset,
    peft_config=peft_config,
)
trainer.train()
