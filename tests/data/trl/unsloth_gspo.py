# Unsloth with what is measured while the script runs: lengths from the data, a number type from the GPU.
import numpy as np
import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from unsloth import FastModel, is_bfloat16_supported

LENGTH = 2048
model, tokenizer = FastModel.from_pretrained("unsloth/Qwen3-4B-Base", max_seq_length=LENGTH, load_in_4bit=False)
model = FastModel.get_peft_model(model, r=32, lora_alpha=64, random_state=3407)

dataset = load_dataset("open-r1/DAPO-Math-17k-Processed", "en", split="train")
lengths = np.array([len(tokenizer.encode(row["prompt"])) for row in dataset])
longest = int(np.quantile(lengths, 0.9))
if is_bfloat16_supported():
    dtype = torch.bfloat16
else:
    dtype = torch.float16


def match_format_exactly(completions, **kwargs):
    return [3.0 * ("</think>" in each[0]["content"]) for each in completions]


async def ask_a_judge(prompts, completions, answer, **kwargs):
    return [0.0 for _ in completions]


funcs = [match_format_exactly, ask_a_judge]
args = GRPOConfig(
    importance_sampling_level="sequence",
    loss_type="grpo",
    epsilon=3e-4,
    epsilon_high=4e-4,
    temperature=1.0,
    min_p=0.1,
    top_p=1.0,
    learning_rate=5e-6,
    lr_scheduler_type="linear",
    optim="adamw_8bit",
    per_device_train_batch_size=4,
    num_generations=4,
    max_prompt_length=longest + 1,
    max_completion_length=LENGTH - (longest + 1),
    max_steps=100,
    report_to="none",
)
if __name__ == "__main__":
    GRPOTrainer(model=model, reward_funcs=funcs, args=args, train_dataset=dataset).train()
