"""The model card: true, complete, and unharmed by whatever a user may have written."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from minigrpo.config.load import dump_recipe, load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.delivery.hub.model_card import (
    SAMPLE_QUESTION,
    card_facts,
    find_licence,
    hub_name,
    parity_markdown,
    read_front_matter,
    render_card,
)
from minigrpo.delivery.merge.merge import merge
from minigrpo.delivery.parity.table import unusable_reason
from minigrpo.errors import ArtifactError
from minigrpo.runs.rundir import RunDir, read_json, write_json
from minigrpo.utils.markdown import fenced, markdown_table, plain
from tests.helpers.delivered import adapted, make_run, save_base
from tests.helpers.published import add_gguf, run_copy, whole_run  # noqa: F401

REPOS = {"merged": "me/tiny", "adapter": "me/tiny-lora", "gguf": "me/tiny-GGUF"}
RATE = {"value": 0.25, "low": 0.2, "high": 0.31, "count": 500}
SCORES = {"accuracy": RATE, "formed": RATE, "truncated": RATE, "mean_reward": 0.5}
CHANGE = {"difference": 0.5, "low": 0.4, "high": 0.6}
NASTY = "a | b `c` <script>x</script>\n---\nlicense: mit\n# \"d\" 'e' ```\n$(rm -rf x) [f](g)"


def page(run: RunDir, what: str = "merged") -> str:
    return render_card(card_facts(run, REPOS, online=False), what)


def header(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def retold(run: RunDir, **changes: dict[str, Any]) -> RunDir:
    recipe = load_recipe(str(run.path)).model_dump()
    whole = {name: {**recipe[name], **changes.get(name, {})} if name in changes else recipe[name] for name in recipe}
    run.recipe.write_text(dump_recipe(Recipe(**whole)))
    return run


def test_front_matter_says_what_the_hub_asks_for(run: RunDir) -> None:
    retold(run, model={"path": "Qwen/Qwen2.5-0.5B-Instruct"}, task={"name": "gsm8k"})
    merged, adapter, gguf = (header(page(run, what)) for what in REPOS)
    assert merged["base_model"] == adapter["base_model"] == ["Qwen/Qwen2.5-0.5B-Instruct"]
    assert gguf["base_model"] == ["me/tiny"]
    relations = [each["base_model_relation"] for each in (merged, adapter, gguf)]
    assert relations == ["finetune", "adapter", "quantized"]
    assert (merged["library_name"], adapter["library_name"]) == ("transformers", "peft")
    assert "library_name" not in gguf
    assert {"gguf", "llama.cpp", "grpo"} <= set(gguf["tags"])
    assert all(each["datasets"] == ["openai/gsm8k"] for each in (merged, adapter, gguf))
    assert {each["pipeline_tag"] for each in (merged, adapter, gguf)} == {"text-generation"}


def test_a_vision_language_model_has_its_own_pipeline_tag(run: RunDir) -> None:
    write_json(run.merged / "config.json", {**read_json(run.merged / "config.json"), "vision_config": {}})
    assert header(page(run))["pipeline_tag"] == "image-text-to-text"
    assert "AutoModelForImageTextToText" in page(run)
    assert header(page(run, "gguf"))["pipeline_tag"] == "text-generation"
    assert "mmproj" in page(run, "gguf")


@pytest.mark.parametrize(
    "path", ["seedling", "seedling:qwen2", "/home/me/model", "./model", "~/model", "C:\\me\\model"]
)
def test_a_base_of_this_machine_is_described_and_not_named(run: RunDir, path: str) -> None:
    text = page(retold(run, model={"path": path}))
    assert "base_model" not in header(text)
    assert "/home" not in text
    assert "\\me" not in text
    assert ("builds from nothing" if path.startswith("seedling") else "not on the Hub") in text


def test_no_path_of_this_machine_is_on_the_page(run: RunDir, tmp_path: Path) -> None:
    retold(run, task={"name": f"{tmp_path}/mine.py:task", "data": "/data/secret/rows.jsonl"})
    for what in REPOS:
        text = page(run, what)
        assert str(tmp_path) not in text
        assert "/data/secret" not in text
        assert "mine.py:task" in text


def test_the_licence_is_the_one_that_the_base_gives(tmp_path: Path) -> None:
    assert find_licence(str(tmp_path), None, False)[0] == {}
    assert "could not be found" in find_licence(str(tmp_path), None, False)[1][0]
    (tmp_path / "LICENSE").write_text("                Apache License\n        Version 2.0, January 2004\n")
    assert find_licence(str(tmp_path), None, False) == ({"license": "apache-2.0"}, ())
    (tmp_path / "LICENSE").write_text("Do what you like, on Tuesdays.")
    assert find_licence(str(tmp_path), None, False)[0] == {"license": "other", "license_link": "LICENSE"}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: tuesday\nx: [1\n---\n")
    assert find_licence(str(tmp_path), None, False)[0]["license"] == "other", (
        "front matter that is no YAML says nothing"
    )
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: tuesday\n---\ntext")
    assert find_licence(str(tmp_path), None, False)[0] == {"license": "other", "license_name": "tuesday"}


def test_the_licence_stands_in_the_front_matter(run: RunDir) -> None:
    base = Path(load_recipe(str(run.path)).model.path)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert header(page(run))["license"] == "apache-2.0"
    (base / "README.md").unlink()
    assert "license" not in header(page(run))


def test_every_figure_is_from_the_runs_files(run: RunDir) -> None:
    run.metrics.write_text("".join(json.dumps({"step": i, "reward": i / 100}) + "\n" for i in range(1, 101)) + '{"st')
    found = {"before": {"scores": SCORES}, "after": {"scores": SCORES}, "change": CHANGE}
    write_json(run.evals / "comparison.json", {"comparisons": {"greedy": found}})
    text = page(run, "gguf")
    assert "| right, greedy | 25.0% [20.0, 31.0] | **25.0% [20.0, 31.0]** | +50.0 [40.0, 60.0] |" in text
    assert "The same 500 unseen prompts" in text
    assert "| step | 1 | 21 | 41 | 60 | 80 | 100 |" in text
    assert "| mean reward | 0.010 | 0.210 | 0.410 | 0.600 | 0.800 | 1.000 |" in text
    assert "| `tiny-Q8_0.gguf` | Q8_0 | 8.50 | 150 kB | 1e-05 |" in text
    merged = next(row for row in read_json(run.parity)["stages"] if row["name"] == "merged")
    assert f"| merged | {merged['mean_kl']:.2g} | {merged['relative_kl']:.2g} |" in text


@pytest.mark.parametrize(
    ("task", "dataset"), [({"name": "gsm8k"}, "openai/gsm8k"), ({"name": "gsm8k", "data": "mine.jsonl"}, "gsm8k")]
)
def test_the_hub_reads_the_tuned_models_accuracy_from_the_front_matter(
    run: RunDir, task: dict[str, str], dataset: str
) -> None:
    after = {"scores": {**SCORES, "accuracy": {"value": 2 / 3, "low": 0.6, "high": 0.7, "count": 300}}, "split": "test"}
    found = {"before": {"scores": SCORES}, "after": after, "change": CHANGE}
    write_json(run.evals / "comparison.json", {"comparisons": {"greedy": found, "temperature 1": found}})
    retold(run, task=task)
    for what in ("merged", "adapter"):
        data = ModelCard(page(run, what)).data
        assert data.model_name == REPOS[what].partition("/")[2]
        assert [(each.dataset_type, each.dataset_split) for each in data.eval_results] == [(dataset, "test")] * 2
        names = [(each.metric_type, each.metric_value, each.metric_name) for each in data.eval_results]
        assert names[0] == ("accuracy", 0.6667, "accuracy, greedy, 300 prompts")
    assert ModelCard(page(run, "gguf")).data.eval_results is None, "a rounded file was not measured"


def test_the_page_calls_a_file_unusable_and_shows_another_first(run: RunDir) -> None:
    (run.gguf / "tiny-Q8_0.gguf").unlink()
    add_gguf(run, "Q4_K_M", 10, relative_kl=2.5, top1=0.97)
    add_gguf(run, "Q5_K_M", 10, relative_kl=None, top1=0.9)
    text = page(run, "gguf")
    assert (
        "**`tiny-Q4_K_M.gguf` is unusable: rounding to Q4_K_M moves it 2.5 times as far as training did. Take" in text
    )
    assert "`tiny-Q5_K_M.gguf` is unusable" not in text
    assert "llama-cli -hf me/tiny-GGUF:Q5_K_M" in text


@pytest.mark.parametrize(
    ("kind", "figures", "words"),
    [
        ("Q4_K_M", {"relative_kl": 1.0, "top1": 0.9}, None),
        ("Q4_K_M", {"relative_kl": 1.1, "top1": 1.0}, "1.1 times as far as training did. Take Q8_0"),
        ("Q4_K_M", {"relative_kl": None, "top1": 0.89}, "another one at 11% of the positions. Take Q8_0"),
        ("Q8_0", {"relative_kl": None, "top1": 0.5}, "another one at 50% of the positions. Take F16"),
        ("F16", {"relative_kl": 2.0, "top1": 0.5}, None),
    ],
)
def test_a_file_is_unusable_by_what_training_did_or_by_its_likeliest_tokens(
    kind: str, figures: dict[str, Any], words: str | None
) -> None:
    reason = unusable_reason({"name": f"gguf {kind}", **figures})
    assert (reason is None) == (words is None)
    assert (words or "") in (reason or "")


def test_what_a_run_has_not_made_is_left_out(run: RunDir) -> None:
    run.parity.unlink()
    text = page(run)
    for words in ("Before and after", "How it was proved", "mean reward", "model-index"):
        assert words not in text
    assert "nan" not in text.lower().split()


@pytest.mark.parametrize("content", ["[]", "{}", '{"comparisons": {"greedy": {}}}', "not json", '{"comparisons": []}x'])
def test_figures_that_are_damaged_are_named(run: RunDir, content: str) -> None:
    run.evals.mkdir()
    (run.evals / "comparison.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"comparison\.json is damaged"):
        page(run)


def test_logs_that_were_cut_short_are_read_as_far_as_they_go(run: RunDir) -> None:
    run.metrics.write_text(
        '[1]\n{"reward": 1}\n{"step": 1, "reward": null}\n{"step": 2, "reward": 0.5}\n{"step": 3, "rew'
    )
    run.groups.write_text('{"messages": [')
    assert "| step | 2 |" in page(run)


def test_the_parity_table_has_a_row_for_each_stage_and_leaves_out_what_was_rejected(run: RunDir) -> None:
    rows = read_json(run.parity)["stages"]
    odd = rows[1] | {"name": "gguf F16", "mean_kl": None, "max_kl": None, "relative_kl": None, "ok": False}
    lines = parity_markdown([*rows, odd]).splitlines()
    assert lines[0] == "|  | KL | of training | worst | top-1 | greedy | limit |"
    assert len(lines) == 2 + len(rows) + 1
    assert lines[-1].startswith("| gguf F16 | - | - | - |")
    write_json(run.parity, {"stages": [*rows, odd]})
    assert "gguf F16" not in page(run)


def test_nothing_that_a_user_wrote_breaks_the_card(run: RunDir) -> None:
    messages = [{"role": "system", "content": NASTY}, {"role": "user", "content": "PRIVATE ROW"}]
    row = {"step": 1, "messages": messages, "completions": []}
    run.groups.write_text(json.dumps(row) + "\n")
    recipe = load_recipe(str(run.path)).model_copy(update={"about": NASTY})
    task = recipe.task.model_copy(update={"name": NASTY})
    run.recipe.write_text(yaml.safe_dump(recipe.model_copy(update={"task": task}).model_dump(mode="json")))
    for what in REPOS:
        text = page(run, what)
        assert "license" not in header(text)
        body, blocks = apart(text)
        assert "<script>" not in body
        assert "PRIVATE ROW" not in text, "rows of a training set are nobody else's"
        assert yaml.safe_load(blocks[-1][1])["about"] == NASTY
        for language, code in blocks:
            if language == "python":
                ast.parse(code)
                assert repr(NASTY)[5:15] in code
            if language == "bash":
                subprocess.run(["bash", "-n"], input=code, text=True, check=True)
        for table in re.findall(r"(?:^\|.*\|\n?)+", body, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def apart(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the text outside of code blocks, and (language, text) of each block, as a Markdown reader splits them."""
    body, blocks, fence = list[str](), list[tuple[str, str]](), ""
    for line in text.splitlines():
        mark = re.fullmatch(r"(`{3,})(\w*)", line)
        if fence and line == fence:
            fence = ""
        elif fence:
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + line + "\n")
        elif mark:
            fence = mark[1]
            blocks.append((mark[2], ""))
        else:
            body.append(line)
    assert not fence
    return "\n".join(body), blocks


def test_the_code_for_transformers_runs_as_it_stands(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    retold(run, rollout={"max_tokens": 4})
    code = next(code for language, code in apart(page(run))[1] if language == "python")
    assert SAMPLE_QUESTION in code
    exec(compile(code.replace('"me/tiny"', repr(str(run.merged))), "card", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_commands_name_their_own_repository(run: RunDir) -> None:
    add_gguf(run, "F16", 10)
    text = page(run, "gguf")
    for words in ("llama-cli -hf me/tiny-GGUF:Q8_0", "ollama run hf.co/me/tiny-GGUF:Q8_0", "tiny-Q8_0.Modelfile"):
        assert words in text
    assert "vllm serve me/tiny\n" in page(run)
    assert "--lora-modules tiny-lora=me/tiny-lora" in page(run, "adapter")


@pytest.mark.parametrize(("family", "merged"), [("ministral3", False), ("ministral3", True), ("mistral3", True)])
def test_an_adapters_page_gives_vllm_what_the_base_lacks_and_a_rank_that_it_takes(
    tmp_path: Path, family: str, merged: bool
) -> None:
    """Where the base is gone, the merged model's config tells it."""
    run = make_run(
        tmp_path / "tiny", tmp_path / "base", adapted(save_base(tmp_path / "base", family), tmp_path / "base")
    )
    if merged:
        merge(run, quiet=True)
        shutil.rmtree(tmp_path / "base")
    lines = apart(page(retold(run, lora={"rank": 9}), "adapter"))[1]
    command = shlex.split(next(code for _, code in lines if code.startswith("vllm")).splitlines()[0])
    scale = {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 32}}
    wanted = {"text_config": scale} if family == "mistral3" else scale
    assert json.loads(command[command.index("--hf-overrides") + 1]) == wanted
    assert command[command.index("--max-lora-rank") + 1] == "16"
    kind = "AutoModelForImageTextToText" if family == "mistral3" else "AutoModelForCausalLM"
    assert f"base = {kind}.from_pretrained" in page(run, "adapter")
    assert "vLLM serves ranks up to 512 only" in page(retold(run, lora={"rank": 600}), "adapter")


def test_an_adapters_page_tells_vllm_nothing_that_the_base_says_itself(run: RunDir) -> None:
    assert "--hf-overrides" not in page(run, "adapter")


def test_hub_names_are_distinguished_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert hub_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert hub_name("openai/gsm8k:main") == "openai/gsm8k"
    others = ("seedling", "seedling:qwen2", "runs/mine", "/a/b", "./a/b", "~/a", "a/b/c", "C:\\a\\b", "model", "a b/c")
    assert not [name for name in others if hub_name(name)]


def test_markdown_is_shown_as_it_was_written() -> None:
    assert plain("a|b\nc") == "a\\|b c"
    assert "<" not in plain("<img src=x onerror=y>")
    assert fenced("x ````` y").startswith("``````\n")
    assert markdown_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_front_matter_of_other_pages_is_read_with_care(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    for text, found in (("no front", {}), ("---\n- 1\n---\n", {}), ("---\na: 1\n---", {"a": 1}), ("---\n", {})):
        file.write_text(text)
        assert read_front_matter(file) == found
