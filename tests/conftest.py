"""Small real things that the tests share: a fast tokenizer made in code, two-layer models of real architectures.

tokenizer                     byte-level, ChatML template, <|im_end|> as eos
make_tokenizer(template=None) the same with a fault
tiny_model(arch, **overrides) a model in float32, eval mode; the same every time
tiny_folder(arch)             that model and tokenizer saved as a model folder, made once
echo_task                     "say 3" is solved by "3"
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network should fail at once, not hang
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two-layer models: threads would only wait for one another
# Some virtual machines announce matrix instructions that they do not execute; 16-bit tests do not need them.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest

from minigrpo.types import Grade, Prompt, Task

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "ministral3", "smollm3", "lfm2")
LLAMA_LIKE = ARCHITECTURES[:-1]


def build_tokenizer(template: str | None = TEMPLATE, **specials: str | None) -> Any:
    """One token a byte, so that every text survives the round trip; the specials come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {**SPECIALS, **specials}
    special = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=["<|im_start|>"],
        **{name: token for name, token in names.items() if token is not None},
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(arch: str, **overrides: Any) -> Any:
    import transformers

    classes = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "mistral": transformers.MistralConfig,
        "ministral3": transformers.Ministral3Config,
        "smollm3": transformers.SmolLM3Config,
        "lfm2": transformers.Lfm2Config,
    }
    size: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,
    }
    own: dict[str, dict[str, Any]] = {
        "qwen3": {"head_dim": 16},  # not hidden / heads: nobody may assume it
        "ministral3": {"head_dim": 16, "rope_parameters": yarn()},
        "smollm3": {"no_rope_layers": [1, 0]},
        "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    }
    return classes[arch](**{**size, **own.get(arch, {}), **overrides})


def yarn() -> dict[str, Any]:
    """Ministral3's rotation, stretched from a context so short that the tests' texts reach beyond it."""
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 512,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }


def build_model(arch: str = "qwen2", seed: int = 0, **overrides: Any) -> Any:
    """Random weights that all matter: biases and norms are not neutral, attention and outputs are peaked."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(arch, **overrides), dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                enliven(name, weight)
            ids_BT = torch.randint(4, model.config.vocab_size, (8, 64))
            final_norm(model).weight.mul_(3.0 / model(ids_BT).logits.std())
    return model.eval()


def enliven(name: str, weight: Any) -> None:
    """Library defaults hide mistakes: a zero bias can be dropped, and attention over tiny scores is a mean."""
    if weight.dim() == 1:
        weight.normal_(1.0, 0.3) if "norm" in name else weight.normal_(0.0, 0.5)
    elif "embed" in name:
        weight.normal_(0.0, 1.0)
    else:
        peak = 1.8 if "q_proj" in name or "k_proj" in name else 1.0
        weight.normal_(0.0, peak / weight.shape[-1] ** 0.5)


def final_norm(model: Any) -> Any:
    """Scaling it scales the logits, with tied embeddings too."""
    return getattr(model.model, "norm", None) or model.model.embedding_norm


@pytest.fixture(scope="session", autouse=True)
def hears_ctrl_c() -> Iterator[None]:
    """Tests send SIGINT to what they start, which would inherit that it is ignored: so a script starts its background
    jobs. A program that is started inherits an ignored signal, but not a handler."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def template() -> str:
    return TEMPLATE


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    return build_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Read only: a test that changes files copies the folder first."""
    made: dict[str, Path] = {}

    def folder(arch: str = "qwen2") -> Path:
        if arch not in made:
            path = tmp_path_factory.mktemp("models") / arch
            build_model(arch).save_pretrained(path)
            build_tokenizer().save_pretrained(path)
            made[arch] = path
        return made[arch]

    return folder


@pytest.fixture(scope="session")
def echo_task() -> Task:
    """Twenty prompts to learn from, ten to be tested on; the answer must be a number, and the right one."""

    def prompts(split: str) -> list[Prompt]:
        start, count = (0, 20) if split == "train" else (20, 10)
        return [
            Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},), target=str(i))
            for i in range(start, start + count)
        ]

    def grade(prompt: Prompt, text: str) -> Grade:
        formed, solved = text.strip().isdigit(), text.strip() == prompt.target
        reward = 1.0 if solved else 0.1 if formed else 0.0
        return Grade(reward, {"right": float(solved), "form": float(formed)}, formed, solved)

    return Task("echo", prompts, grade, gold=lambda prompt: str(prompt.target), about="repeat a number")
