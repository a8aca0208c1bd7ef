# QLoRA with samples from a vLLM server, in functions, with CISPO.
import os

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

MODEL_ID = "Qwen/Qwen2.5-7B-Instruct"
HOST, PORT = "0.0.0.0", 8001


def exact_match(prompts, completions, solution, **kwargs):
    return [float(text == right) for text, right in zip(completions, solution, strict=True)]


def make_args() -> GRPOConfig:
    return GRPOConfig(
        output_dir=os.environ.get("OUT", "out"),
        loss_type="cispo",
        epsilon_high=5.0,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_host=HOST,
        vllm_server_port=PORT,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
        learning_rate=float(os.environ["LR"]),
        num_generations=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=16,
        max_steps=150,
        entropy_coef=0.001,
        use_adaptive_entropy=False,
        chat_template_kwargs={"enable_thinking": False},
        some_option_of_next_year=True,
    )


def make_model():
    bnb_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(MODEL_ID, quantization_config=bnb_config, dtype=torch.bfloat16)


def main() -> None:
    trainer = GRPOTrainer(
        model=make_model(),
        reward_funcs=exact_match,
        args=make_args(),
        train_dataset=load_dataset("parquet", data_files={"train": "train.parquet"}),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
