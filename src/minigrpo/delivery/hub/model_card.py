"""The model card of a published model: what it is, what it does, how it was proved, how to run it. Every value is the
run's.

Facts are collected once (`card_facts`), and each repository's card is rendered from them. What users wrote (task names,
recipes, model ids) is escaped: in front matter by YAML, in tables and sentences by `plain`, in code blocks by the
fence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minigrpo.config.load import load_recipe
from minigrpo.delivery.artifacts.source import made_by
from minigrpo.delivery.hub.client import format_bytes
from minigrpo.delivery.hub.local_paths import hide_paths
from minigrpo.delivery.hub.page import parse_header, render_page, split_page
from minigrpo.delivery.hub.reward_svg import read_rewards
from minigrpo.delivery.hub.run_files import how_to_audit
from minigrpo.delivery.parity.table import read_parity, unusable_reason
from minigrpo.errors import ArtifactError, command_line
from minigrpo.models.chat_template import ChatTemplate
from minigrpo.models.model_files import local_config
from minigrpo.models.vllm_compat import (
    VLLM_LORA_RANKS,
    vllm_config_overrides,
    vllm_max_lora_rank,
    without_attention_scale,
)
from minigrpo.runs.chain import audited_state
from minigrpo.runs.logger import system_message
from minigrpo.runs.manifest import read_sealed
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.utils.markdown import fenced, markdown_table, plain
from minigrpo.utils.paths import user_path

CURVE_FILE = "reward.svg"
"""The picture of the reward, beside the card."""
LICENCE_PATTERNS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"\bMIT License\b",
    "gpl-3.0": r"GNU GENERAL PUBLIC",
}
NO_LICENCE = "The base's licence could not be found, so the page names none: --license ID writes it."
EMBEDDED = "the small model that minigrpo builds from nothing"
TASK_DATASETS = {"gsm8k": "openai/gsm8k"}
"""The Hub's dataset of a task where the recipe names none; other tasks generate their own data."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says. `base`: its name on the Hub, or None; `base_words`: what it is, in a sentence. `repos`: all
    that are published together, by kind. `rewards`: (step, mean reward). `gguf`: facts of each exported file, by
    name. `audit`: an audit's statement. `missing`: settings that vLLM needs and the base's config lacks.
    `licence_is_set`: the user names it."""

    name: str
    base: str | None
    base_words: str
    licence: dict[str, str]
    licence_is_set: bool
    recipe: dict[str, Any]
    datasets: tuple[str, ...]
    system: str
    template: ChatTemplate
    repos: Mapping[str, str]
    rewards: tuple[tuple[int, float], ...]
    comparisons: Mapping[str, Any]
    stages: list[dict[str, Any]]
    audit: str
    gguf: dict[str, dict[str, Any]]
    versions: dict[str, str]
    vision: bool
    missing: Mapping[str, Any]
    remarks: tuple[str, ...]
    adopted: bool


def card_facts(run: RunDir, repos: Mapping[str, str], *, online: bool, licence: str | None = None) -> CardFacts:
    """Collect the facts from the run's folder; what a run has not made is left out of the card. `licence`: an ID, in
    place of the recipe's publish.license."""
    recipe = load_recipe(str(run.path))
    chosen = licence or recipe.publish.license
    base = hub_name(recipe.model.path)
    found = find_licence(recipe.model.path, recipe.model.revision, online)
    shown: dict[str, Any] = hide_paths(recipe.model_dump(mode="json"))
    data = hub_name(recipe.task.data) if recipe.task.data else TASK_DATASETS.get(recipe.task.name)
    made = read_sealed(run.gguf / "made.json") if (run.gguf / "made.json").is_file() else {"files": {}}
    merged = read_sealed(run.merged / "made.json") if (run.merged / "made.json").is_file() else {}
    versions = {**made.get("made", {}).get("versions", {}), **merged.get("made", {}).get("versions", {})}
    whole = read_json(run.merged / "config.json") if (run.merged / "config.json").is_file() else {}
    config = local_config(recipe.model.path, recipe.model.revision) or without_attention_scale(whole)
    there = {name: entry for name, entry in made["files"].items() if (run.gguf / name).is_file()}
    audit, stale = audit_statement(run)
    return CardFacts(
        name=run.path.absolute().name,
        base=base,
        base_words=_base_words(recipe.model.path, base),
        licence={"license": chosen} if chosen else found[0],
        licence_is_set=bool(chosen),
        recipe=shown,
        datasets=(data,) if data else (),
        system=system_message(run),
        template=ChatTemplate.beside(run.adapter),
        repos=repos,
        rewards=tuple(read_rewards(run)),
        comparisons=_comparisons(run),
        stages=[row for row in read_parity(run) if row.get("ok", True)],
        audit=audit,
        gguf={name: entry | {"size": (run.gguf / name).stat().st_size} for name, entry in there.items()},
        versions={name: version for name, version in versions.items() if version},
        vision="vision_config" in {**config, **whole},
        missing=vllm_config_overrides(config),
        remarks=(*stale, *(() if chosen else found[1])),
        adopted=made_by(run.adapter) == "adopt",
    )


def hub_name(path: str) -> str | None:
    """Return USER/NAME where a path is one; None for a folder of this machine and for the embedded model."""
    name = path.partition(":")[0]
    if path.partition(":")[0] == "seedling" or user_path(path).exists() or path.startswith((".", "~", "/")):
        return None
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _base_words(path: str, base: str | None) -> str:
    if base:
        return f"[{plain(base)}](https://huggingface.co/{base})"
    if path.partition(":")[0] == "seedling":
        kind = path.partition(":")[2]
        return f"{EMBEDDED}{f' ({plain(kind)})' if kind else ''}"
    return "a model that is not on the Hub"


def find_licence(path: str, revision: str | None, online: bool) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the licence from the base's own card or LICENSE file, for the front matter; else nothing and a remark."""
    folder = user_path(path)
    page = folder / "README.md" if folder.is_dir() else _find_page(path, revision, online)
    said = read_front_matter(page) if page and page.is_file() else {}
    if isinstance(said.get("license"), str):
        names = ("license", "license_name", "license_link")
        return {name: str(said[name]) for name in names if said.get(name)}, ()
    for file in sorted(folder.glob("LICENSE*")) if folder.is_dir() else ():
        text = file.read_text(encoding="utf-8", errors="replace")[:3000]
        found = next((name for name, words in LICENCE_PATTERNS.items() if re.search(words, text)), None)
        return ({"license": found} if found else {"license": "other", "license_link": file.name}), ()
    return {}, (NO_LICENCE,)


def _find_page(path: str, revision: str | None, online: bool) -> Path | None:
    """Find the base's README.md in the Hub client's cache, or download it."""
    if not hub_name(path):
        return None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(path, "README.md", revision=revision)
    if isinstance(cached, str) or not online:
        return Path(cached) if isinstance(cached, str) else None
    try:
        return Path(hf_hub_download(path, "README.md", revision=revision))
    except Exception:  # the caller then reports that no licence was found
        return None


def read_front_matter(page: Path) -> dict[str, Any]:
    """Return the YAML header of a model card; {} where there is none that is valid."""
    return parse_header(split_page(page.read_text(encoding="utf-8", errors="replace")).header) or {}


def _comparisons(run: RunDir) -> dict[str, Any]:
    """Read the evaluations before and after training, by decoding; {} if there are none. Raises ArtifactError if
    damaged."""
    file = run.evals / "comparison.json"
    if not file.is_file():
        return {}
    try:
        found: dict[str, Any] = read_json(file)["comparisons"]
        _evaluation(found)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ArtifactError(f"{file} is damaged. Remove it, and what was measured is left out of the page.") from None
    return found


def audit_statement(run: RunDir) -> tuple[str, tuple[str, ...]]:
    """Return the statement of the run's audit, and remarks; "" where there is none, or the run has changed since.

    Raises ArtifactError where audit.json was changed.
    """
    if not run.audit.is_file():
        return "", ()
    audited = read_sealed(run.audit)
    if audited["made"]["from"] == audited_state(run):
        return str(audited["statement"]), ()
    again = command_line("minigrpo", "audit", run.path)
    return "", (f"{run.audit} is of this run as it was before, so the page leaves it out. Audit again: {again}",)


# Rendering


def render_card(facts: CardFacts, what: str) -> str:
    """Render one repository's card: front matter, then what a reader asks, in that order."""
    parts = [
        f"# {plain(facts.repos[what].partition('/')[2])}",
        _opening(facts, what),
        _evaluation(facts.comparisons),
        _files(facts.gguf) if what == "gguf" else "",
        how_to_run(facts, what),
        _proof(facts.stages),
        f"## Audit\n\n{plain(facts.audit)}" if facts.audit else "",
        _training(facts),
        "" if facts.adopted else _recipe(facts.recipe),  # its knobs are defaults, which trained nothing
        _versions(facts.versions),
    ]
    return render_page(card_metadata(facts, what), "\n\n".join(part for part in parts if part))


def card_metadata(facts: CardFacts, what: str) -> dict[str, Any]:
    """Return the front matter, by which the Hub files a model."""
    relation = {"merged": "finetune", "adapter": "adapter", "gguf": "quantized"}.get(what)
    base = facts.repos.get("merged", facts.base) if what == "gguf" else facts.base
    library = {"merged": {"library_name": "transformers"}, "adapter": {"library_name": "peft"}}.get(what, {})
    tags = {"merged": ["transformers"], "adapter": ["peft", "lora"], "gguf": ["gguf", "llama.cpp"]}.get(what, ["log"])
    pictures = facts.vision and what == "merged"
    return {
        **({"base_model": [base], "base_model_relation": relation} if base and relation else {}),
        **({"datasets": list(facts.datasets)} if facts.datasets else {}),
        **library,
        **({"pipeline_tag": "image-text-to-text" if pictures else "text-generation"} if relation else {}),
        **facts.licence,
        "tags": [*([] if facts.adopted else ["grpo"]), *tags, "minigrpo"],
        # GGUF files are rounded, and a run is no model: the scores are not theirs.
        **({} if what in ("gguf", "run") else _model_index(facts, what)),
    }


def _model_index(facts: CardFacts, what: str) -> dict[str, Any]:
    """Return the tuned model's accuracy by decoding, in the form from which the Hub makes its table of results."""
    if not facts.comparisons:
        return {}
    task, metrics, split = facts.recipe["task"]["name"], [], "test"
    for decoding, found in facts.comparisons.items():
        rate, split = found["after"]["scores"]["accuracy"], found["after"].get("split", split)
        name = f"accuracy, {decoding}, {rate['count']} prompts"
        metrics.append({"type": "accuracy", "value": round(rate["value"], 4), "name": name})
    dataset = {"type": facts.datasets[0] if facts.datasets else task, "name": task, "split": split}
    result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}
    return {"model-index": [{"name": facts.repos[what].partition("/")[2], "results": [result]}]}


def _opening(facts: CardFacts, what: str) -> str:
    kind = {"merged": "The whole model", "adapter": "The LoRA adapter", "gguf": "GGUF files for llama.cpp and Ollama"}
    kind["run"] = "Logs, checkpoints and hashes of a training, by which anybody can audit it"
    links = {name: f"[{plain(repo)}](https://huggingface.co/{repo})" for name, repo in facts.repos.items()}
    others = [link for name, link in links.items() if name not in (what, "run")]
    task = plain(facts.recipe["task"]["name"])
    how = f"trained with GRPO on the task {task} by minigrpo"
    if facts.adopted:
        how = f"trained by another tool, merged and proved by minigrpo, judged by the task {task}"
    text = f"{kind[what]}: {facts.base_words}, {how}."
    if facts.vision and what == "gguf":
        text += " Only the part that reads text; the vision tower was not changed, so the base's own `mmproj` serves."
    elsewhere = "What came of it" if what == "run" else "The same model elsewhere"
    text += f"\n\n{elsewhere}: {', '.join(others)}." if others else ""
    return text + (f"\n\nThe run itself, to be audited: {links['run']}." if "run" in links and what != "run" else "")


def _evaluation(comparisons: Mapping[str, Any]) -> str:
    if not comparisons:
        return ""
    rows, count = [], 0
    for decoding, found in comparisons.items():
        before, after = found["before"]["scores"], found["after"]["scores"]
        count = after["accuracy"]["count"]
        for name, key in (("right", "accuracy"), ("well-formed", "formed"), ("cut off", "truncated")):
            change = _points(found["change"]) if key == "accuracy" else ""
            rows.append((f"{name}, {decoding}", _rate(before[key]), f"**{_rate(after[key])}**", change))
        rows.append((f"mean reward, {decoding}", f"{before['mean_reward']:.3f}", f"{after['mean_reward']:.3f}", ""))
    table = markdown_table(("", "before", "after", "change in points"), rows)
    return f"## Before and after\n\nThe same {count} unseen prompts. In brackets: 95 % intervals.\n\n{table}"


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{rate['value']:.1%} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _points(change: Mapping[str, Any]) -> str:
    return f"{100 * change['difference']:+.1f} [{100 * change['low']:.1f}, {100 * change['high']:.1f}]"


def _files(files: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            f"`{name}`",
            entry["format"],
            f"{entry['bits']:.2f}",
            format_bytes(entry["size"]),
            f"{entry['proof']['mean_kl']:.2g}",
        )
        for name, entry in files.items()
    ]
    table = markdown_table(("file", "type", "bits a weight", "size", "KL"), rows)
    found = ((name, unusable_reason(entry["proof"])) for name, entry in files.items())
    warnings = "".join(f"\n\n**`{name}` is {reason}**" for name, reason in found if reason)
    meaning = "KL: distance from the merged model, nats a token, as llama.cpp reads the file."
    return f"## Files\n\n{table}\n\n{meaning}{warnings}"


def _proof(stages: Sequence[Mapping[str, Any]]) -> str:
    if not stages:
        return ""
    return (
        "## How it was proved\n\nNext-token distributions on held texts, each compared with what was trained, nats a "
        "token. *Of training*: the distance over that of the base, which is how far training moved it; what is further "
        "than the limit is not published. GGUF files are compared with the merged model, in llama.cpp itself.\n\n"
        f"{parity_markdown(stages)}"
    )


def parity_markdown(stages: Sequence[Mapping[str, Any]]) -> str:
    """Render rows of parity.json as a table. `greedy`: tokens before the likeliest one differs, of how many."""
    rows = [
        (
            plain(stage["name"]) + _rounded(stage),
            f"{stage['mean_kl']:.2g}" if stage.get("mean_kl") is not None else "-",
            f"{stage['relative_kl']:.2g}" if stage.get("relative_kl") is not None else "-",
            f"{stage['max_kl']:.2g}" if stage.get("max_kl") is not None else "-",
            f"{stage['top1']:.1%}",
            f"{stage['greedy']:.1f} of {stage['greedy_of']:.1f}",
            f"{stage['limit']:g}" if stage.get("limit") is not None else "",
        )
        for stage in stages
    ]
    return markdown_table(("", "KL", "of training", "worst", "top-1", "greedy", "limit"), rows)


def _rounded(stage: Mapping[str, Any]) -> str:
    """Name the number type of a row that was not computed in float32, where rounding counts as distance."""
    precision = stage.get("precision", "float32")
    return "" if precision == "float32" else f" (computed in {plain(precision)})"


def _training(facts: CardFacts) -> str:
    recipe = facts.recipe
    if facts.adopted:
        return (
            f"## Training\n\nAnother tool trained the adapter (LoRA of rank {recipe['lora']['rank']}). minigrpo was "
            "given the result, and knows nothing of how it came about."
        )
    adapter = "every parameter" if recipe["train"]["full"] else f"LoRA of rank {recipe['lora']['rank']}"
    text = (
        f"## Training\n\n{recipe['train']['steps']} steps of {plain(recipe['objective']['name'])} at a learning rate "
        f"of {recipe['train']['lr']:g} ({adapter}); each step {recipe['rollout']['prompts']} prompts with "
        f"{recipe['rollout']['completions']} completions of at most {recipe['rollout']['max_tokens']} tokens, "
        f"temperature {recipe['rollout']['temperature']:g}."
    )
    return f"{text}\n\n{_curve(facts.rewards)}" if facts.rewards else text


def _curve(rewards: Sequence[tuple[int, float]]) -> str:
    """Render the mean reward over the steps, as a picture and as numbers."""
    marks = sorted({round(i * (len(rewards) - 1) / 5) for i in range(6)})
    steps = [str(rewards[i][0]) for i in marks]
    table = markdown_table(("step", *steps), [("mean reward", *(f"{rewards[i][1]:.3f}" for i in marks))])
    return f"![mean reward over the steps]({CURVE_FILE})\n\n{table}"


def _recipe(recipe: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    return f"<details><summary>The whole recipe</summary>\n\n{fenced(text, 'yaml')}\n\n</details>"


def _versions(versions: Mapping[str, str]) -> str:
    return "Made with " + ", ".join(f"{plain(n)} {plain(v)}" for n, v in versions.items()) + "." if versions else ""


SAMPLE_QUESTION = "Your question"


def how_to_run(facts: CardFacts, what: str) -> str:
    """Render how to run the model, with the system message and temperature of training."""
    return f"## How to {'audit' if what == 'run' else 'run'} it\n\n{HOW_TO_RUN[what](facts)}"


def _messages(facts: CardFacts) -> list[dict[str, str]]:
    system = [{"role": "system", "content": facts.system}] if facts.system else []
    return facts.template.fold_system([*system, {"role": "user", "content": SAMPLE_QUESTION}])


def _answer(facts: CardFacts) -> str:
    """Render the code that generates an answer, given `model` and `tokenizer`."""
    length = facts.recipe["rollout"]["max_tokens"]
    return (
        f"messages = {_as_python(_messages(facts))}\n"
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
        ").to(model.device)\n"
        f"output = model.generate(**inputs, max_new_tokens={length}, do_sample=False)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    )


def _as_python(messages: list[dict[str, str]]) -> str:
    """Render messages as Python: JSON's string literals are Python's, too."""
    return json.dumps(messages, indent=4, ensure_ascii=False).replace("}\n]", "},\n]")


def _run_merged(facts: CardFacts) -> str:
    repo, kind = facts.repos["merged"], _model_class(facts)
    code = (
        f"from transformers import {kind}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
        f'model = {kind}.from_pretrained("{repo}", dtype="auto", device_map="auto")\n' + _answer(facts)
    )
    return (
        f"transformers:\n\n{fenced(code, 'python')}\n\nvLLM:\n\n{_serve_and_ask(facts, ['vllm', 'serve', repo], repo)}"
    )


def _model_class(facts: CardFacts) -> str:
    return "AutoModelForImageTextToText" if facts.vision else "AutoModelForCausalLM"


def _serve_and_ask(facts: CardFacts, serve: Sequence[object], model: str) -> str:
    body: dict[str, Any] = {"model": model, "messages": _messages(facts), "temperature": 0}
    text = json.dumps(body, ensure_ascii=False)
    url = "http://localhost:8000/v1/chat/completions"
    ask = command_line("curl", url, "-H", "Content-Type: application/json", "-d", text)
    return fenced(f"{command_line(*serve)}\n{ask}", "bash")


def _run_adapter(facts: CardFacts) -> str:
    repo = facts.repos["adapter"]
    base = facts.base or "PATH-OF-THE-BASE"
    note = "" if facts.base else "The base is not on the Hub: put its folder where `PATH-OF-THE-BASE` stands.\n\n"
    code = (
        f"from peft import PeftModel\nfrom transformers import {_model_class(facts)}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
        f'base = {_model_class(facts)}.from_pretrained("{base}", dtype="auto", device_map="auto")\n'
        f'model = PeftModel.from_pretrained(base, "{repo}")\n' + _answer(facts)
    )
    text = f"{note}transformers and PEFT:\n\n{fenced(code, 'python')}\n\n"
    room = vllm_max_lora_rank(facts.recipe["lora"]["rank"])
    if room is None:
        return f"{text}vLLM serves ranks up to {VLLM_LORA_RANKS[-1]} only: merge it first."
    name = repo.partition("/")[2]
    serve = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", room, "--lora-modules", f"{name}={repo}"]
    if facts.missing:  # the base's config says it under names that vLLM does not read
        serve += ["--hf-overrides", json.dumps(facts.missing)]
    return f"{text}vLLM:\n\n{_serve_and_ask(facts, serve, name)}"


def _run_gguf(facts: CardFacts) -> str:
    repo = facts.repos["gguf"]
    usable = [entry["format"] for entry in facts.gguf.values() if not unusable_reason(entry["proof"])]
    formats = usable or [entry["format"] for entry in facts.gguf.values()]
    kind = "Q8_0" if "Q8_0" in formats else formats[0]
    file = next(name for name, entry in facts.gguf.items() if entry["format"] == kind)
    temperature = facts.recipe["rollout"]["temperature"]
    begin = "While" if facts.adopted else f"It was trained at temperature {temperature:g}; while"
    system = ("-sys", facts.system) if facts.system else ()
    llama = command_line("llama-cli", "-hf", f"{repo}:{kind}", *system) + "\n"
    if facts.system:
        llama += "# the server takes no system message: whoever asks it sends the one above with each question\n"
    llama += command_line("llama-server", "-hf", f"{repo}:{kind}")
    stem = file.removesuffix(".gguf")
    ollama = (
        f"{command_line('ollama', 'run', f'hf.co/{repo}:{kind}')}\n\n"
        "# or with the Modelfile beside it: its template, system message, stop words and sampling\n"
        f"{command_line('hf', 'download', repo, file, f'{stem}.Modelfile', '--local-dir', '.')}\n"
        f"{command_line('ollama', 'create', stem.lower(), '-f', f'{stem}.Modelfile')}"
    )
    return (
        f"llama.cpp:\n\n{fenced(llama, 'bash')}\n\nOllama:\n\n{fenced(ollama, 'bash')}\n\n"
        f"{begin} the repository is private, both need the right to read it."
    )


def _audit_run(facts: CardFacts) -> str:
    return fenced(how_to_audit(facts.repos, facts.base, embedded=facts.base_words.startswith(EMBEDDED)), "bash")


HOW_TO_RUN = {"merged": _run_merged, "adapter": _run_adapter, "gguf": _run_gguf, "run": _audit_run}
