"""A whole run passes its audit, and each kind of tampering is found: by a hash, or by doing things again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigrpo import audit
from minigrpo.cli import main
from minigrpo.config.load import load_recipe
from minigrpo.evaluation.evaluate import Evaluation, compare
from minigrpo.evaluation.statistics import score_groups
from minigrpo.pipeline import stages
from minigrpo.pipeline.audit_answers import _group
from minigrpo.runs.manifest import create_run, hash_files, read_sealed, write_sealed
from minigrpo.runs.rundir import RunDir, digest, read_json, write_json
from tests.helpers.proved import STEPS, flip, forge, own_copy, proved_home, recipe_of, replace_once, reseal

__all__ = ["own_copy", "proved_home"]

WEIGHTS = "adapter_model.safetensors"
TUNED = "tuned-even-test.json"


def test_a_whole_run_passes_and_says_what_was_shown_and_what_was_not(run: RunDir) -> None:
    before = digest(run.path)
    found = audit(run, steps=9, answers=4, seed=1, quiet=True)
    assert found.faults == ()
    assert [(each.start, each.until) for each in found.stretches] == [(0, 2), (4, 6)]
    assert sum(map(len, found.answers.values())) == 4
    shown, unshown = " ".join(found.shown), " ".join(found.unshown)
    for words in ("recipe", "unbroken", "base here", "Checkpoints 4, 6", "both logs up to step 6", "adapter/ is what"):
        assert words in shown
    for words in ("merged/ was made", "GGUF", "scores", "Every weight of merged/", "asked again", "byte for byte"):
        assert words in shown
    assert "2 of 6 steps could not be drawn" in unshown
    assert "verify" in unshown
    assert "does not prove honesty" in found.statement
    assert found.machine["processor"] in found.statement
    kept = read_sealed(run.audit)
    assert kept["statement"] == found.statement
    run.audit.unlink()
    assert digest(run.path) == before


@pytest.mark.long
def test_the_same_seed_draws_the_same_and_a_new_one_is_told(run: RunDir) -> None:
    drawn = [audit(run, steps=1, answers=3, seed=seed, quiet=True) for seed in (5, 5, None)]
    assert drawn[0].stretches[0].start == drawn[1].stretches[0].start
    assert drawn[0].answers == drawn[1].answers
    assert read_json(run.audit)["seed"] == drawn[2].seed


def drop_line(file: Path, place: int) -> None:
    lines = file.read_text().splitlines(keepends=True)
    del lines[place]
    file.write_text("".join(lines))


def swap(one: Path, two: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def turn_answers(run: RunDir, count: int = 5) -> dict[str, Any]:
    """Turn answers of the trained model right; return the evaluation's content."""
    content = read_json(run.evals / TUNED)
    for answer in content["scores"]["answers"][:count]:
        answer["solved"] = not answer["solved"]
    return content


def rescore(content: dict[str, Any]) -> dict[str, Any]:
    content["scores"] = score_groups([_group([answer]) for answer in content["scores"]["answers"]]).to_dict()
    return content


def turn_consistently(run: RunDir) -> None:
    """Turn answers with everything that follows from them: scores, seal, comparison."""
    reseal(run.evals / TUNED, **rescore(turn_answers(run, 6)))
    sides = [Evaluation.from_dict(read_json(run.evals / name)) for name in ("base-even-test.json", TUNED)]
    told = read_json(run.evals / "comparison.json")
    told["comparisons"]["greedy"] = compare(*sides).summary()
    write_json(run.evals / "comparison.json", told)


def rewrite_recipe(run: RunDir) -> None:
    """Change a knob as if the run had begun with it."""
    for file in (run.recipe, run.made):
        file.unlink()
    create_run(recipe_of(train={"lr": 0.02}), run)


def reseal_checkpoint(run: RunDir, step: int) -> None:
    reseal(run.checkpoint(step) / "made.json", sha256=hash_files(run.checkpoint(step)))


def other_optimizer(run: RunDir) -> None:
    shutil.copy(run.checkpoint(4) / "optimizer.pt", run.checkpoint(6))
    reseal_checkpoint(run, 6)


def flip_and_reseal(run: RunDir) -> None:
    flip(run.checkpoint(4) / WEIGHTS)
    reseal_checkpoint(run, 4)


def forge_without_log(run: RunDir) -> None:
    """Every hash written anew, and none of the groups."""
    forge(run, lambda kind, facts: kind == "checkpoint" and facts["logs"].pop("groups.jsonl"))


def adapter_of_no_checkpoint(run: RunDir) -> None:
    """Other weights at the end, the chain's last line written anew, and the checkpoints as they were."""
    flip(run.adapter / WEIGHTS, -2)
    forge(run)


def exchange_checkpoints(run: RunDir) -> None:
    swap(run.checkpoint(4), run.checkpoint(6))
    for step in (4, 6):
        reseal(run.checkpoint(step) / "made.json", step=step)


def edit_chain(run: RunDir) -> None:
    replace_once(run.chain, '"step":4', '"step":3')


def change_accuracy(run: RunDir) -> None:
    told = read_json(run.evals / "comparison.json")
    told["comparisons"]["greedy"]["after"]["scores"]["accuracy"]["value"] -= 0.25
    write_json(run.evals / "comparison.json", told)


def append(file: Path, text: str) -> None:
    with file.open("a") as stream:
        stream.write(text)


Tamper = Callable[[RunDir], object]
BY_HASH: dict[str, tuple[Tamper, str]] = {
    "a knob of the recipe": (lambda run: replace_once(run.recipe, "rank: 2", "rank: 4"), "recipe.yaml was changed"),
    "recipe and its seal": (rewrite_recipe, "made.json is not that of the recipe"),
    "the seal of the recipe": (lambda run: flip(run.made), "made.json is damaged"),
    "another base, sealed": (lambda run: reseal(run.base, sha256="0" * 64), "base.json names another base"),
    "the base's weights": (lambda run: flip(Path("base/model.safetensors")), "is not the one that run began from"),
    "the machine, sealed": (lambda run: reseal(run.machine, threads=8), "machine.json says another threads"),
    "a figure of a step": (lambda run: replace_once(run.metrics, '"reward": 0.', '"reward": 1.'), "metrics.jsonl was"),
    "a reward in the log": (
        lambda run: replace_once(run.groups, '"reward": 0.', '"reward": 1.', after='"step": 5'),
        "groups.jsonl was changed in the lines of steps 5 to 6",
    ),
    "a line of the log left out": (lambda run: drop_line(run.groups, 3), r"groups.jsonl was changed .* steps 1 to 2"),
    "the last line of the log left out": (
        lambda run: drop_line(run.metrics, -1),
        "metrics.jsonl was changed .* 5 to 6",
    ),
    "a line added to the log": (lambda run: append(run.metrics, '{"step": 7}\n'), "lines after step 6"),
    "the log removed": (lambda run: run.groups.unlink(), "groups.jsonl was changed in the lines of steps 1 to 2"),
    "the end of the chain": (lambda run: drop_line(run.chain, -1), "chain.jsonl was cut: it ends after step 6"),
    "two lines off the chain": (lambda run: [drop_line(run.chain, -1) for _ in "12"], "is in no line of"),
    "a line of the chain left out": (lambda run: drop_line(run.chain, 2), "line 3 does not follow"),
    "a value of the chain": (edit_chain, "line 5 does not follow"),
    "the chain's first line": (lambda run: flip(run.chain, 3), "line 1 is damaged"),
    "the chain removed": (lambda run: run.chain.unlink(), "chain.jsonl is missing"),
    "a bit of a checkpoint": (lambda run: flip(run.checkpoint(4) / WEIGHTS), f"000004/{WEIGHTS} is damaged"),
    "a checkpoint, sealed again": (flip_and_reseal, f"000004/{WEIGHTS} is not the one that .*chain.jsonl names"),
    "another optimizer, sealed": (other_optimizer, "000006/optimizer.pt is not the one"),
    "a checkpoint's line before it, sealed": (
        lambda run: reseal(run.checkpoint(4) / "made.json", previous="0" * 64),
        "000004/made.json names another line before it than .*chain.jsonl has",
    ),
    "an adapter of no checkpoint": (adapter_of_no_checkpoint, "adapter holds weights that no checkpoint of the chain"),
    "a log without its hash": (forge_without_log, "chain.jsonl: line 2 is damaged"),
    "two checkpoints exchanged": (exchange_checkpoints, "000004/.* is not the one"),
    "a checkpoint renamed": (lambda run: run.checkpoint(4).rename(run.checkpoint(5)), "of step 4, so it was renamed"),
    "the adapter's weights": (lambda run: flip(run.adapter / WEIGHTS), f"adapter/{WEIGHTS} was changed after training"),
    "the adapter's stamp": (lambda run: replace_once(run.adapter / "made.json", "train", "Train"), "adapter/made.json"),
    "an added adapter file": (lambda run: append(run.adapter / "x.txt", "?"), "adapter/x.txt was added"),
    "the merged weights": (lambda run: flip(run.merged / "model.safetensors"), "merged/model.safetensors was changed"),
    "the GGUF file": (lambda run: flip(run.gguf / "run-Q8_0.gguf"), "run-Q8_0.gguf was put there or changed"),
    "the GGUF file removed": (lambda run: (run.gguf / "run-Q8_0.gguf").unlink(), "run-Q8_0.gguf is missing"),
    "the check": (lambda run: replace_once(run.check, "norm_a", "norm_b"), "check.json is damaged"),
    "the proof": (lambda run: replace_once(run.parity, '"mean_kl": ', '"mean_kl": 1'), "parity.json is damaged"),
    "preflight's verdict": (lambda run: replace_once(run.preflight, "true", "false"), "preflight.json is damaged"),
    "the proof without its seal": (
        lambda run: write_json(run.parity, {k: v for k, v in read_json(run.parity).items() if k != "seal"}),
        "parity.json carries no seal",
    ),
    "five answers turned": (lambda run: write_json(run.evals / TUNED, turn_answers(run)), f"{TUNED} is damaged"),
    "five answers turned, sealed": (lambda run: reseal(run.evals / TUNED, **turn_answers(run)), "scores are not those"),
    "five answers and scores": (
        lambda run: reseal(run.evals / TUNED, **rescore(turn_answers(run))),
        "greedy is not what the evaluations beside it say",
    ),
    "the comparison alone": (change_accuracy, "comparison.json: greedy is not what"),
}


@pytest.mark.parametrize("kind", BY_HASH)
def test_what_was_changed_is_named_by_the_hashes_alone(kind: str, run: RunDir) -> None:
    tamper, told = BY_HASH[kind]
    tamper(run)
    found = audit(run, steps=0, answers=0, quiet=True)
    assert not found.ok
    assert any(re.search(told, fault) for fault in found.faults), found.faults
    assert "An audit found" in found.statement


def forge_log(run: RunDir) -> None:
    """A better reward in the log of step 5, and every hash written anew."""
    row = next(json.loads(line) for line in run.groups.read_text().splitlines() if '"step": 5' in line)
    answer = next(each for each in row["completions"] if f"{each['reward']}" != "0.0" and 0.1 < each["reward"] < 1)
    old = f'"reward": {answer["reward"]}'
    replace_once(run.groups, old, old[:-1] + ("1" if old[-1] != "1" else "2"), after='"step": 5')
    forge(run)


def forge_weights(run: RunDir) -> None:
    """Other weights at the end: in the last checkpoint and the adapter, and every hash written anew."""
    for folder in (run.checkpoint(STEPS), run.adapter):
        flip(folder / WEIGHTS, -2)
    forge(run)


def forge_without_weights(run: RunDir) -> None:
    """No hash of the weights after step 2, whose checkpoint was removed, and every other hash written anew."""
    forge(run, lambda kind, facts: facts.get("step") == 2 and facts["files"].pop(WEIGHTS))


def forge_merged(run: RunDir) -> None:
    flip(run.merged / "model.safetensors", -2)
    reseal(run.merged / "made.json", sha256=hash_files(run.merged))


def edit_task(run: RunDir) -> None:
    replace_once(Path("mine.py"), "% 2 == 0", "% 2 == 1")


AGAIN: dict[str, tuple[Tamper, str]] = {
    "a forged log": (forge_log, "step 5, prompt .*, done again: another grade"),
    "forged weights": (forge_weights, r"step 6, done again: adapter_model.safetensors .* 1 of"),
    "weights without their hash": (forge_without_weights, r"step 2, done again: adapter_model.safetensors after"),
    "forged merged weights": (forge_merged, "merged: .* are not"),
    "an edited reward file": (edit_task, "mine.py is another than when the run began"),
    "turned answers that fit": (turn_consistently, "asked again: solved was"),
}


QUICK = ("a forged log", "turned answers that fit")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.long) for kind in AGAIN]
)
def test_what_was_forged_with_all_its_hashes_is_found_by_doing_it_again(kind: str, run: RunDir) -> None:
    tamper, told = AGAIN[kind]
    tamper(run)
    found = audit(run, steps=9, answers=1, seed=2, quiet=True)
    assert any(re.search(told, fault) for fault in found.faults), found.faults


def undo_the_end(run: RunDir) -> None:
    """Take away what came after step 6 was done, and its checkpoint."""
    for folder in (run.adapter, run.merged, run.gguf, run.evals, run.checkpoint(6)):
        shutil.rmtree(folder)
    for file in (run.check, run.parity):
        file.unlink()
    drop_line(run.chain, -1)


def kill_in_the_log(run: RunDir) -> None:
    """As kill -9 while step 6 is logged leaves it: its groups are there, its figures are cut in their middle."""
    undo_the_end(run)
    drop_line(run.chain, -1)
    drop_line(run.metrics, -1)
    append(run.metrics, '{"step": 6, "rew')


def kill_in_the_chain(run: RunDir) -> None:
    """As kill -9 while the chain's line is written leaves it."""
    undo_the_end(run)
    line = run.chain.read_text().splitlines()[-1]
    drop_line(run.chain, -1)
    append(run.chain, line[:80])


@pytest.mark.parametrize(
    "kill",
    [kill_in_the_log, *(pytest.param(kill, marks=pytest.mark.long) for kill in (undo_the_end, kill_in_the_chain))],
)
def test_a_run_that_was_killed_and_resumed_audits_cleanly(kill: Tamper, run: RunDir) -> None:
    kill(run)
    killed = audit(run, steps=9, quiet=True)
    assert killed.faults == ()
    assert "The run has not ended: there is no result to check." in killed.unshown
    stages.train(load_recipe("run"), run, resume=True)
    resumed = audit(run, steps=9, quiet=True)
    assert resumed.faults == ()
    assert any("adapter/ is what training ended with" in sentence for sentence in resumed.shown)
    assert not any("went on with another" in sentence for sentence in resumed.unshown)


def test_a_run_of_before_the_chain_says_what_cannot_be_shown(run: RunDir) -> None:
    run.chain.unlink()
    for folder in (run.checkpoint(4), run.checkpoint(6)):
        made = {name: value for name, value in read_sealed(folder / "made.json").items() if name != "previous"}
        write_sealed(folder / "made.json", made)
    found = audit(run, steps=9, answers=2, seed=1, quiet=True)
    assert found.faults == ()
    assert any("has no chain" in sentence for sentence in found.unshown)
    assert any("no hash of its data" in sentence for sentence in found.unshown)
    assert [(each.start, each.until) for each in found.stretches] == [(0, 4), (4, 6)]
    assert "it has no chain" in found.statement


def test_a_run_that_goes_on_with_other_data_says_so(run: RunDir) -> None:
    undo_the_end(run)
    replace_once(Path("mine.py"), "share > 0.5", "share > 0.6")
    stages.train(load_recipe("run"), run, resume=True)
    found = audit(run, steps=0, answers=0, quiet=True)
    assert "After step 4 the run went on with another task." in found.unshown


@pytest.mark.parametrize(("tampered", "code"), [(False, 0), (True, 1)])
def test_the_exit_code_tells_whether_it_passed(
    tampered: bool, code: int, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    if tampered:
        flip(run.adapter / WEIGHTS)
    with pytest.raises(SystemExit) as ended:
        main.main(["audit", "run", "--steps", "0", "--answers", "0", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (ended.value.code, told["ok"]) == (code, not tampered)


def test_the_published_page_carries_the_statement_while_it_is_of_this_run(run: RunDir) -> None:
    from minigrpo.delivery.hub.model_card import card_facts, render_card

    found = audit(run, steps=1, answers=0, quiet=True)
    repos = {"merged": "me/x", "adapter": "me/x-lora", "gguf": "me/x-GGUF"}
    page = render_card(card_facts(run, repos, online=False), "adapter")
    assert "## Audit" in page
    assert "does not prove honesty" in page
    assert found.ok
    append(run.adapter / "x.txt", "?")
    facts = card_facts(run, repos, online=False)
    assert "## Audit" not in render_card(facts, "adapter")
    assert any("Audit again: minigrpo audit run" in remark for remark in facts.remarks)
