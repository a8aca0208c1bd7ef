"""The part of a published page that tells how to run the model: commands that can be copied, for its own repository."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from minigrpo.launching import RANKS
from minigrpo.markdown import fenced

if TYPE_CHECKING:
    from minigrpo.card import Facts

QUESTION = "Your question"


def how_to_run(facts: Facts, what: str) -> str:
    """With the system message and the temperature of training."""
    return f"## How to run it\n\n{RUN[what](facts)}"


def _messages(facts: Facts) -> list[dict[str, str]]:
    system = [{"role": "system", "content": facts.system}] if facts.system else []
    return [*system, {"role": "user", "content": QUESTION}]


def _answer(facts: Facts) -> str:
    """How an answer is made, once `model` and `tokenizer` are there."""
    length = facts.recipe["rollout"]["max_tokens"]
    return (
        f"messages = {_python(_messages(facts))}\n"
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
        ").to(model.device)\n"
        f"output = model.generate(**inputs, max_new_tokens={length}, do_sample=False)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    )


def _python(messages: list[dict[str, str]]) -> str:
    """Strings as JSON writes them are strings of Python, too."""
    return json.dumps(messages, indent=4, ensure_ascii=False).replace("}\n]", "},\n]")


def _merged(facts: Facts) -> str:
    repo, kind = facts.repos["merged"], _kind(facts)
    code = (
        f"from transformers import {kind}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
        f'model = {kind}.from_pretrained("{repo}", dtype="auto", device_map="auto")\n' + _answer(facts)
    )
    return f"transformers:\n\n{fenced(code, 'python')}\n\nvLLM:\n\n{_served(facts, f'vllm serve {repo}', repo)}"


def _kind(facts: Facts) -> str:
    return "AutoModelForImageTextToText" if facts.vision else "AutoModelForCausalLM"


def _served(facts: Facts, command: str, model: str) -> str:
    body: dict[str, Any] = {"model": model, "messages": _messages(facts), "temperature": 0}
    text = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    url = "http://localhost:8000/v1/chat/completions"
    return fenced(f"{command}\ncurl {url} -H 'Content-Type: application/json' -d '{text}'", "bash")


def _adapter(facts: Facts) -> str:
    repo = facts.repos["adapter"]
    base = facts.base or "PATH-OF-THE-BASE"
    note = "" if facts.base else "The base is not on the Hub: put its folder where `PATH-OF-THE-BASE` stands.\n\n"
    code = (
        f"from peft import PeftModel\nfrom transformers import {_kind(facts)}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
        f'base = {_kind(facts)}.from_pretrained("{base}", dtype="auto", device_map="auto")\n'
        f'model = PeftModel.from_pretrained(base, "{repo}")\n' + _answer(facts)
    )
    text = f"{note}transformers and PEFT:\n\n{fenced(code, 'python')}\n\n"
    room = next((room for room in RANKS if room >= facts.recipe["lora"]["rank"]), None)
    if room is None:
        return f"{text}vLLM serves ranks up to {RANKS[-1]} only: merge it first."
    name = repo.partition("/")[2]
    serve = f"vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules {name}={repo}"
    if facts.missing:  # of the base, whose config says it in words that vLLM does not read
        serve += f" --hf-overrides {_quoted(json.dumps(facts.missing))}"
    return f"{text}vLLM:\n\n{_served(facts, serve, name)}"


def _gguf(facts: Facts) -> str:
    repo = facts.repos["gguf"]
    formats = [entry["format"] for entry in facts.gguf.values()]
    kind = "Q8_0" if "Q8_0" in formats else formats[0]
    file = next(name for name, entry in facts.gguf.items() if entry["format"] == kind)
    heat = facts.recipe["rollout"]["temperature"]
    system = f" -sys {_quoted(facts.system)}" if facts.system else ""
    llama = f"llama-cli -hf {repo}:{kind}{system}\nllama-server -hf {repo}:{kind}"
    recipe = file.removesuffix(".gguf")
    ollama = (
        f"ollama run hf.co/{repo}:{kind}\n\n"
        "# or with the Modelfile beside it: its template, stop words and temperature\n"
        f"hf download {repo} {file} {recipe}.Modelfile --local-dir .\n"
        f"ollama create {recipe.lower()} -f {recipe}.Modelfile"
    )
    return (
        f"llama.cpp:\n\n{fenced(llama, 'bash')}\n\nOllama:\n\n{fenced(ollama, 'bash')}\n\n"
        f"It was trained at temperature {heat:g}; while the repository is private, both need the right to read it."
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


RUN = {"merged": _merged, "adapter": _adapter, "gguf": _gguf}
