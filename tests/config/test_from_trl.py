"""Scripts and options for TRL become recipes: what they set, what is told, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from minigrpo.cli import main
from minigrpo.config.from_trl import LORA_DEFAULTS, TRL_DEFAULTS, FromTrl, recipe_from_trl
from minigrpo.config.load import load_recipe
from minigrpo.config.trl_script import UNSLOTH_DEFAULTS
from minigrpo.errors import RecipeError

BASIC = """
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

def length(completions, **kwargs):
    return [-abs(20 - len(text)) for text in completions]

if __name__ == "__main__":
    dataset = load_dataset("trl-lib/tldr", split="train")
    args = GRPOConfig(output_dir="out", per_device_train_batch_size=16, num_generations=4, max_steps=50,
                      learning_rate=2e-5, logging_steps=1)
    trainer = GRPOTrainer(model="Qwen/Qwen2-0.5B-Instruct", reward_funcs=length, args=args, train_dataset=dataset,
                          peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
    trainer.train()
"""
UNSLOTH = """
from unsloth import FastLanguageModel
max_seq_length = 2048
lora_rank = 32
model, tokenizer = FastLanguageModel.from_pretrained(model_name="unsloth/Qwen3-4B-Base", load_in_4bit=True,
                                                     max_lora_rank=lora_rank)
model = FastLanguageModel.get_peft_model(model, r=lora_rank, target_modules=["q_proj", "k_proj"],
                                         lora_alpha=lora_rank * 2)
max_prompt_length = 201 + 1
def check_answer(prompts, completions, answer, **kwargs): ...
def check_numbers(prompts, completions, answer, **kwargs): ...
training_args = GRPOConfig(temperature=1.0, learning_rate=5e-6, weight_decay=0.001, warmup_ratio=0.1,
    lr_scheduler_type="linear", optim="adamw_8bit", per_device_train_batch_size=1, gradient_accumulation_steps=4,
    num_generations=4, max_prompt_length=max_prompt_length,
    max_completion_length=max_seq_length - max_prompt_length, max_steps=100, report_to="none")
trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=[check_answer, check_numbers],
                      args=training_args, train_dataset=dataset)
trainer.train()
"""
UNSLOTH_TARGETS = UNSLOTH_DEFAULTS["lora"]["target_modules"]


def taken(tmp_path: Path, text: str, name: str = "train.py") -> FromTrl:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return recipe_from_trl(tmp_path / name)


def config(**fields: Any) -> str:
    """A script whose GRPOConfig has these fields, and a batch of eight completions."""
    listed = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return f"config = GRPOConfig({listed})\nGRPOTrainer(model='M', args=config, peft_config=LoraConfig())"


def knob(found: FromTrl, name: str) -> Any:
    section, _, leaf = name.partition(".")
    return getattr(getattr(found.recipe, section), leaf) if leaf else getattr(found.recipe, section)


SCRIPTS = Path(__file__).parents[1] / "data" / "trl"
WRITTEN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "keyword_arguments.py": (
        {"model.path": "Qwen/Qwen2-0.5B-Instruct", "train.full": True, "train.steps": 200, "rollout.prompts": 1},
        ("every parameter is trained", "Copy reward_num_unique_chars"),
    ),
    "gsm8k_demo.py": (
        {"model.path": "Qwen/Qwen2.5-1.5B-Instruct", "task.data": "openai/gsm8k:main", "lora.alpha": 64},
        ("max_prompt_length has no counterpart", "The length of the training follows from epochs"),
    ),
    "dataclass_overrides.py": (
        {"train.lr": 2e-5, "lora.rank": 32, "lora.alpha": 64, "rollout.max_tokens": 512, "train.steps": 100},
        ("Rows are read as they are",),
    ),
    "argument_parser.py": (
        {"train.steps": 300, "rollout.completions": 4, "train.schedule": "constant", "train.full": False},
        (
            "What training_args holds could not be read",
            "training_args.seed = script_args.seed could not be read",
            "top_p has no counterpart",
            "What get_peft_config(model_args) holds could not be read",
        ),
    ),
    "cli.yaml": (
        {
            "task.weights": {"accuracy_reward": 1.0, "think_format_reward": 0.2},
            "rollout.engine": "vllm",
            "lora.rank": 32,
        },
        ("Copy accuracy_reward, think_format_reward",),
    ),
    "dr_grpo.json": (
        {
            "objective.name": "dr_grpo",
            "objective.compare": "none",
            "rollout.prompts": 16,
            "train.steps": 250,
            "seed": 7,
        },
        ("deepspeed has no counterpart", "into 2 updates"),
    ),
    "dapo_mappings.py": (
        {"objective.clip_high": 0.28, "objective.mask_truncated": True, "lora.rslora": True, "rollout.prompts": 4},
        ("top_k has no counterpart", "Copy accuracy, soft_overlong"),
    ),
    "unsloth_fast.py": (
        {"model.quantize": "nf4", "rollout.max_tokens": 736, "lora.rank": 64, "train.optimizer": "adamw8bit"},
        ("max_prompt_length has no counterpart", "The rows could not be read"),
    ),
    "unsloth_gspo.py": (
        {"objective.name": "gspo", "model.quantize": "none", "lora.targets": ",".join(UNSLOTH_TARGETS)},
        ("GRPOConfig(max_completion_length=LENGTH - (longest + 1)) could not be read", "min_p has no counterpart"),
    ),
    "vllm_server.py": (
        {"objective.name": "cispo", "objective.clip_high": 4.0, "model.quantize": "nf4", "task.data": "train.parquet"},
        ("rollout.engine is left at auto", "some_option_of_next_year has no counterpart", "os.environ['LR']"),
    ),
}
"""Scripts and options in ten manners of writing: some of the knobs that each gives, and of what is told."""


@pytest.mark.parametrize("name", sorted(path.name for path in SCRIPTS.iterdir()))
def test_scripts_in_many_manners_become_recipes(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    knobs, told = WRITTEN[name]
    main.app(["recipes", "--from-trl", str(SCRIPTS / name)], standalone_mode=False)
    printed = capsys.readouterr()
    (tmp_path / "mine.yaml").write_text(printed.out)
    found = FromTrl(load_recipe(str(tmp_path / "mine.yaml")), ())
    assert {each: knob(found, each) for each in knobs} == knobs
    notes = " ".join(printed.err.split())
    assert [sentence for sentence in told if sentence not in notes] == []
    assert "output_dir" not in notes


@pytest.mark.parametrize(
    ("lines", "steps"),
    [
        ("steps = 50\nsteps *= 2", 100),
        ("steps = 10\nsteps: int = steps + 2**5", 42),
        ("base, steps = 1, 7", 7),
        ("class Knobs:\n    steps = 9\nsteps = Knobs().steps", 9),
        ("steps = 50\nif debug:\n    steps = 2", None),
        ("steps = 50\nfor _ in range(3):\n    steps += 1", None),
        ("steps, rest = split(100)", None),
        ("class Other:\n    steps = 9", None),
        ("try:\n    steps = 9\nexcept OSError:\n    steps = 8", None),
        ("match mode:\n    case 1:\n        steps = 9", None),
        ("steps = 9\ndef other(steps):\n    config = GRPOConfig(learning_rate=steps)", 9),
        ("steps = 2**10**10", None),
    ],
)
def test_a_value_is_worked_out_or_named_and_never_guessed(tmp_path: Path, lines: str, steps: int | None) -> None:
    found = taken(tmp_path, f"{lines}\nconfig = GRPOConfig(max_steps=steps)\nGRPOTrainer('M', [], config)")
    unread = any("GRPOConfig(max_steps=steps) could not be read: set it by hand" in note for note in found.notes)
    assert unread is (steps is None)
    assert steps in (None, found.recipe.train.steps)


def test_a_parameter_of_a_function_is_not_the_name_of_the_script(tmp_path: Path) -> None:
    script = (
        "lr = 7e-6\ndef main(lr=1e-5):\n    GRPOTrainer('M', [], GRPOConfig(learning_rate=lr, max_steps=3))\nmain()"
    )
    found = taken(tmp_path, script)
    assert "GRPOConfig(learning_rate=lr) could not be read: set it by hand." in found.notes
    assert (found.recipe.train.lr, found.recipe.train.steps) == (TRL_DEFAULTS["learning_rate"], 3)


def test_a_mapping_that_is_not_known_is_named(tmp_path: Path) -> None:
    found = taken(tmp_path, "config = GRPOConfig(**vars(arguments))\nGRPOTrainer('M', args=config, **rest)")
    assert "GRPOConfig(**vars(arguments)) could not be read: set it by hand." in found.notes
    assert "GRPOTrainer(**rest) could not be read: set it by hand." in found.notes


@pytest.mark.parametrize("tools", ["[search]", "make_tools()"])
def test_tools_of_the_trainer_are_told(tmp_path: Path, tools: str) -> None:
    script = f"def search(words): ...\nGRPOTrainer('M', [], GRPOConfig(), tools={tools}, processing_class=make())"
    told = " ".join(taken(tmp_path, script).notes)
    assert "tools has no counterpart: a completion is one answer." in told
    assert "processing_class" not in told


@pytest.mark.parametrize(
    ("option", "quantize"), [("", "nf4"), ("load_in_16bit=True", "none"), ("load_in_4bit=False", "none")]
)
def test_what_unsloth_takes_by_itself_is_taken_here(tmp_path: Path, option: str, quantize: str) -> None:
    opened = f"model, _ = FastLanguageModel.from_pretrained('M', {option})"
    trained = "GRPOTrainer(FastLanguageModel.get_peft_model(model), [], GRPOConfig(max_steps=1))"
    recipe = taken(tmp_path, f"{opened}\n{trained}").recipe
    assert (recipe.model.quantize, recipe.lora.rank, recipe.lora.targets) == (quantize, 16, ",".join(UNSLOTH_TARGETS))


def test_a_plain_script_becomes_a_recipe(tmp_path: Path) -> None:
    found = taken(tmp_path, BASIC)
    recipe = found.recipe
    assert (recipe.model.path, recipe.task.data) == ("Qwen/Qwen2-0.5B-Instruct", "trl-lib/tldr")
    assert recipe.task.name == f"{tmp_path / 'train.py'}:length"
    assert (recipe.rollout.prompts, recipe.rollout.completions, recipe.rollout.max_tokens) == (4, 4, 512)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (16, 32, "q_proj,v_proj")
    assert (recipe.train.steps, recipe.train.lr, recipe.train.schedule, recipe.seed) == (50, 2e-5, "linear", 42)
    assert (recipe.objective.name, recipe.objective.clip_high, recipe.objective.compare) == ("dapo", 0.2, "group")
    assert not recipe.train.full


def test_a_script_of_unsloth_becomes_one_with_its_constants_worked_out(tmp_path: Path) -> None:
    found = taken(tmp_path, UNSLOTH)
    recipe = found.recipe
    assert (recipe.model.path, recipe.model.quantize) == ("unsloth/Qwen3-4B-Base", "nf4")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (32, 64, "q_proj,k_proj")
    assert (recipe.rollout.prompts, recipe.rollout.completions, recipe.rollout.max_tokens) == (1, 4, 2048 - 202)
    assert (recipe.train.optimizer, recipe.train.warmup, recipe.train.weight_decay) == ("adamw8bit", 0.1, 0.001)
    told = " ".join(found.notes)
    assert "max_prompt_length has no counterpart: prompts are never cut" in told
    assert "rewards = [check_answer, check_numbers]" in told
    assert recipe.task.name == "rewards.py:rewards"


def test_a_script_that_trains_when_it_is_imported_is_no_task_file(tmp_path: Path) -> None:
    guarded = taken(tmp_path, BASIC).recipe.task.name
    bare = taken(tmp_path, BASIC.replace('if __name__ == "__main__":', "if True:"))
    assert guarded.endswith("train.py:length")
    assert bare.recipe.task.name == "rewards.py:length"
    assert any("must not train" in note for note in bare.notes)


def test_a_list_of_functions_is_named_by_its_variable(tmp_path: Path) -> None:
    text = BASIC.replace("if __name__", "both = [length, length]\nif __name__").replace("=length,", "=both,")
    assert taken(tmp_path, text).recipe.task.name == f"{tmp_path / 'train.py'}:both"


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, "objective.name", "gspo"),
        ({"loss_type": "dr_grpo", "scale_rewards": False}, "objective.compare", "none"),
        ({"loss_type": "dr_grpo"}, "objective.compare", "group"),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "objective.clip_high", 4.0),
        ({"epsilon": 0.1, "epsilon_high": 0.3}, "objective.clip_high", 0.3),
        ({"epsilon": 0.1}, "objective.clip_high", 0.1),
        ({"delta": 4.0}, "objective.clip_dual", 4.0),
        ({"beta": 0.04, "use_bias_correction_kl": False}, "objective.kl_unbiased", False),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "objective.compare", "gdpo"),
        ({"use_adaptive_entropy": True, "entropy_target": 0.4}, "objective.entropy_target", 0.4),
        ({"num_generations": 8, "gradient_accumulation_steps": 4}, "rollout.prompts", 4),
        ({"num_generations": 8, "generation_batch_size": 64}, "rollout.prompts", 8),
        ({"steps_per_generation": 4, "max_steps": 100}, "train.steps", 25),
        ({"num_iterations": 2, "max_steps": 100}, "train.steps", 50),
        ({"warmup_steps": 10, "max_steps": 100}, "train.warmup", 0.1),
        ({"lr_scheduler_type": "constant_with_warmup"}, "train.schedule", "constant"),
        ({"fp16": True}, "model.dtype", "float16"),
        ({"model_init_kwargs": {"torch_dtype": "bfloat16"}}, "model.dtype", "bfloat16"),
        ({"use_vllm": True}, "rollout.engine", "vllm"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_port": 9000},
            "rollout.server",
            "http://127.0.0.1:9000",
        ),
        ({"use_vllm": True}, "objective.importance", "sequence_mask"),
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, "objective.importance", "off"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "model.template", {"enable_thinking": False}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_fields_keep_their_meaning(tmp_path: Path, fields: dict[str, Any], name: str, value: Any) -> None:
    assert knob(taken(tmp_path, config(**fields)), name) == value


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"top_p": 0.9}, "top_p has no counterpart: samples are drawn from the policy itself"),
        ({"loss_type": "vespo"}, "loss_type vespo has no counterpart"),
        ({"optim": "lion_32bit"}, "optim lion_32bit has no counterpart"),
        ({"some_new_field": 3}, "some_new_field has no counterpart"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type polynomial has no counterpart"),
        ({"num_generations": 3}, "no whole number of groups of 3"),
        ({"steps_per_generation": 4}, "into 4 updates"),
        ({"loss_type": "cispo"}, "cap every ratio at 0.2"),
        ({}, "The length of the training follows from epochs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_has_no_counterpart_is_told(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    assert told in " ".join(taken(tmp_path, config(**fields)).notes)


@pytest.mark.parametrize("fields", [{"top_p": 1.0}, {"top_k": 0}, {"report_to": "wandb"}, {"logging_steps": 5}])
def test_what_changes_nothing_is_not_told(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert taken(tmp_path, config(**fields)).notes == taken(tmp_path, config()).notes


def test_what_the_script_takes_from_elsewhere_is_named(tmp_path: Path) -> None:
    found = taken(tmp_path, config().replace("GRPOConfig(", "GRPOConfig(learning_rate=args.lr, "))
    assert any("GRPOConfig(learning_rate=args.lr) could not be read: set it by hand" in note for note in found.notes)
    assert found.recipe.train.lr == TRL_DEFAULTS["learning_rate"]


def test_without_an_adapter_every_parameter_is_trained(tmp_path: Path) -> None:
    found = taken(tmp_path, config().replace(", peft_config=LoraConfig()", ""))
    assert found.recipe.train.full
    vllm = taken(tmp_path, config(use_vllm=True).replace(", peft_config=LoraConfig()", ""))
    assert vllm.recipe.rollout.engine == "auto"
    assert any("rollout.engine is left at auto" in note for note in vllm.notes)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_of_options_becomes_a_recipe(tmp_path: Path, suffix: str) -> None:
    options = {"model_name_or_path": "Qwen/Qwen3-0.6B", "dataset_name": "openai/gsm8k", "dataset_config": "main"}
    options |= {"use_peft": True, "lora_r": 8, "reward_funcs": ["accuracy_reward"], "max_steps": 10}
    recipe = taken(tmp_path, json.dumps(options), f"options.{suffix}").recipe  # JSON is YAML, too
    assert (recipe.model.path, recipe.task.data) == ("Qwen/Qwen3-0.6B", "openai/gsm8k:main")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.train.steps) == (8, 32, 10)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("train.py", "def (", "is no script"),
        ("train.py", "print(1)", "calls neither GRPOConfig nor GRPOTrainer"),
        ("train.py", "SFTTrainer(model='M')", "calls neither"),
        ("options.yaml", "- 1", "holds no settings"),
        ("options.json", "{", "is no script"),
        ("options.yaml", "a: [", "is no script"),
        ("train.py", config(num_generations=1), "A group of one compares nothing"),
        ("train.py", config(num_generations=0), "num_generations is 0, but must be a whole number of at least 1"),
        ("train.py", config(per_device_train_batch_size="auto"), "per_device_train_batch_size is auto"),
        ("train.py", config(warmup_ratio=[1]), "warmup_ratio is"),
        ("train.py", config(learning_rate=7), "train.lr is 7"),
    ],
)
def test_what_is_no_such_file_ends_in_a_sentence(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as fault:
        taken(tmp_path, text, name)
    assert name in str(fault.value)


def test_a_script_is_read_and_never_run(tmp_path: Path) -> None:
    taken(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')\n" + BASIC)
    assert not (tmp_path / "ran").exists()


def test_the_command_prints_a_recipe_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").write_text(UNSLOTH)
    main.app(["recipes", "--from-trl", str(tmp_path / "train.py")], standalone_mode=False)
    printed = capsys.readouterr()
    (tmp_path / "mine.yaml").write_text(printed.out)
    assert load_recipe(str(tmp_path / "mine.yaml")) == recipe_from_trl(tmp_path / "train.py").recipe
    assert "note: max_prompt_length has no counterpart" in printed.err


@pytest.mark.extra("bench")
def test_our_table_of_defaults_is_that_of_the_installed_trl() -> None:
    from peft import LoraConfig
    from trl import GRPOConfig

    fields = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert {name: fields[name] for name in TRL_DEFAULTS} == TRL_DEFAULTS
    assert {name: getattr(LoraConfig(), name) for name in LORA_DEFAULTS} == LORA_DEFAULTS
