"""Small real things that the tests share: a fast tokenizer made in code, two-layer models of real architectures."""

from __future__ import annotations

from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "ministral3", "smollm3", "lfm2")
LLAMA_LIKE = ARCHITECTURES[:-1]


def build_tokenizer(template: str | None = TEMPLATE, **specials: str | None) -> Any:
    """Build a tokenizer of one token a byte, so that every text survives the round trip; the specials come first."""
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
    """Return Ministral3's RoPE settings, scaled from a context so short that the tests' texts reach beyond it."""
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
    """Build a model of random weights that all matter.

    Biases and norms are not neutral, attention and outputs are peaked.
    """
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
    """Fill a weight with random values.

    Library defaults hide mistakes: a zero bias can be dropped, and attention over tiny scores is a mean.
    """
    if weight.dim() == 1:
        weight.normal_(1.0, 0.3) if "norm" in name else weight.normal_(0.0, 0.5)
    elif "embed" in name:
        weight.normal_(0.0, 1.0)
    else:
        peak = 1.8 if "q_proj" in name or "k_proj" in name else 1.0
        weight.normal_(0.0, peak / weight.shape[-1] ** 0.5)


def final_norm(model: Any) -> Any:
    """Return the last norm: scaling it scales the logits, with tied embeddings too."""
    return getattr(model.model, "norm", None) or model.model.embedding_norm
