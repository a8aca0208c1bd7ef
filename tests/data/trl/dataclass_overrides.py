# Settings as a dataclass of the script's own, with some of them given when it is made and one changed afterwards.
from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer


@dataclass
class Settings:
    model: str = "HuggingFaceTB/SmolLM2-360M-Instruct"
    lr: float = 1e-6
    group: int = 8
    prompts: int = 4
    tokens: int = 2**8
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    rank: int = field(default=8)


cfg = Settings(lr=2e-5, rank=32)
cfg.tokens = 2**9
steps: int = 400
steps //= 2


def reward_len(completions, **kwargs):
    return [-abs(50 - len(text)) / 50 for text in completions]


def main() -> None:
    trainer = GRPOTrainer(
        model=cfg.model,
        reward_funcs=[reward_len],
        args=GRPOConfig(
            output_dir="out",
            learning_rate=cfg.lr,
            num_generations=cfg.group,
            per_device_train_batch_size=cfg.prompts * cfg.group,
            max_completion_length=cfg.tokens,
            max_steps=steps,
            beta=0.04,
            num_iterations=2,
        ),
        train_dataset=load_dataset("json", data_files="rows.jsonl", split="train"),
        peft_config=LoraConfig(r=cfg.rank, lora_alpha=2 * cfg.rank, target_modules=cfg.targets),
    )
    trainer.train()


if __name__ == "__main__":
    main()
