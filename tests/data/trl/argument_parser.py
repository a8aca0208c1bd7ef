# In the manner of TRL's own examples: arguments come from the command line, and some are set in the script.
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl.rewards import think_format_reward

if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.max_steps = 300
    training_args.num_generations = 4
    training_args.per_device_train_batch_size = 16
    training_args.learning_rate = 1e-5
    training_args.lr_scheduler_type = "constant_with_warmup"
    training_args.top_p = 0.95
    training_args.seed = script_args.seed

    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=think_format_reward,
        args=training_args,
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
