"""The page of a repository: what a user wrote into it on the Hub outlives the next publication."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from minigrpo.config.load import dump_recipe, load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.delivery.hub.page import BEGIN_MARK, END_MARK, merge_pages, parse_header, render_page, split_page
from minigrpo.delivery.hub.publish import publish
from minigrpo.delivery.hub.reward_svg import render_reward_svg
from minigrpo.errors import MinigrpoError, RecipeError
from minigrpo.runs.rundir import RunDir
from tests.helpers.hub_storage import Repo, StandIn
from tests.helpers.published import command, hub_here, run_copy, send, whole_run  # noqa: F401

OURS = {"library_name": "transformers", "tags": ["grpo", "minigrpo"]}
PAGE = render_page(OURS, "# tiny\n\nfirst")
NEXT = render_page(OURS, "# tiny\n\nsecond")


def front(text: str) -> dict[str, Any]:
    return parse_header(split_page(text).header) or {}


def test_a_page_that_nobody_touched_is_replaced_as_a_whole() -> None:
    assert merge_pages(NEXT, PAGE, OURS) == (NEXT, ())
    assert merge_pages(PAGE, PAGE, OURS) == (PAGE, ())


def test_text_outside_the_marks_stays_and_text_between_them_is_ours() -> None:
    theirs = PAGE.replace(BEGIN_MARK, f"A word first.\n\n{BEGIN_MARK}").replace("first\n", "first, edited\n")
    text, notes = merge_pages(NEXT, f"{theirs}\n## Thanks\n", OURS)
    assert text == NEXT.replace(BEGIN_MARK, f"A word first.\n\n{BEGIN_MARK}") + "\n## Thanks\n"
    assert merge_pages(NEXT, text, OURS) == (text, ())
    assert notes == ()


def test_keys_written_by_hand_stay_with_their_comments_and_ours_are_updated() -> None:
    by_hand = "# chosen with care\nlicense: mit  # mine\nlanguage: [en,  de]\n"
    theirs = PAGE.replace("---\n", f"---\n{by_hand}", 1).replace("- grpo", "- grpo\n- mine")
    text, notes = merge_pages(render_page({**OURS, "library_name": "peft"}, "x"), theirs, OURS)
    assert text.startswith(f"---\n{by_hand}library_name: peft\ntags:\n- grpo\n- minigrpo\n- mine\n---\n")
    assert notes == ()


def result(dataset: str, value: float) -> dict[str, Any]:
    metrics = [{"type": "accuracy", "value": value}]
    return {"task": {"type": "text-generation"}, "dataset": {"type": dataset, "name": dataset}, "metrics": metrics}


def test_results_added_to_the_model_index_by_hand_stay_beside_ours() -> None:
    old, new = ({**OURS, "model-index": [{"name": "tiny", "results": [result("gsm8k", x)]}]} for x in (0.1, 0.2))
    other = {"name": "other", "results": [result("gsm8k", 0.3)]}
    by_hand = [{"name": "tiny", "results": [result("gsm8k", 0.1), result("math", 0.4)]}, other]
    text, _ = merge_pages(render_page(new, "x"), render_page({**old, "model-index": by_hand}, "x"), old)
    mine = {"name": "tiny", "results": [result("gsm8k", 0.2), result("math", 0.4)]}
    assert front(text)["model-index"] == [mine, other]
    for damaged in (3, [3], [{"name": "tiny", "results": 3}], {}):
        text, _ = merge_pages(render_page(new, "x"), render_page({**old, "model-index": damaged}, "x"), old)
        assert front(text) == new


def test_a_key_that_we_wrote_and_write_no_longer_goes() -> None:
    before = {**OURS, "base_model": ["a/b"], "license": "mit"}
    assert front(merge_pages(PAGE, render_page(before, "x"), before)[0]) == OURS
    assert front(merge_pages(PAGE, render_page({**before, "base_model": ["c/d"]}, "x"), before)[0]) == {
        **OURS,
        "base_model": ["c/d"],
    }


def test_a_licence_written_by_hand_gives_way_to_none_but_the_users_own_choice() -> None:
    base = {**OURS, "license": "apache-2.0"}
    theirs = render_page({**OURS, "license": "other", "license_name": "tuesday"}, "x")
    text, notes = merge_pages(render_page(base, "x"), theirs, base)
    assert (front(text)["license"], front(text)["license_name"]) == ("other", "tuesday")
    assert "other, stays; the base's is apache-2.0" in notes[0]
    text, notes = merge_pages(render_page(base, "x"), theirs, {}, licence_is_set=True)
    assert front(text) == base
    assert "was other; it is now apache-2.0" in notes[0]


def test_text_without_marks_stays_below_ours_and_is_told() -> None:
    text, notes = merge_pages(PAGE, f"---\nlicense: mit\n---\n# My own page\n{END_MARK}\nmore\n", {})
    assert front(text) == {"license": "mit", **OURS}
    assert text.endswith(f"{END_MARK}\n\n# My own page\n\nmore\n")
    assert "has no marks" in notes[0]
    assert merge_pages(PAGE, text, OURS) == (text, ())


@pytest.mark.parametrize("header", ["license: [mit\n", "- a\n- b\n", "day: 2024-99-99\n"])
def test_damaged_front_matter_is_written_anew_and_kept_to_read(header: str) -> None:
    text, notes = merge_pages(PAGE, PAGE.replace(split_page(PAGE).header, header), OURS)
    assert front(text) == OURS
    assert text.endswith(f"{END_MARK}\n\n```yaml\n{header}```\n")
    assert "no YAML" in notes[0]
    assert merge_pages(PAGE, text, OURS) == (text, ())


def test_pages_of_other_editors_are_read(recwarn: pytest.WarningsRecorder) -> None:
    theirs = "\ufeff" + PAGE.replace("tags:", "license: mit\ntags:").replace("\n", "\r\n") + "mine\r\n"
    text, notes = merge_pages(NEXT, theirs, OURS)
    assert (front(text), notes) == ({**OURS, "license": "mit"}, ())
    assert text.count(BEGIN_MARK) == 1
    assert text.endswith("mine\r\n")


def test_our_text_may_quote_the_end_mark() -> None:
    text = render_page(OURS, f"# tiny\n\n{END_MARK}\n\nthe rest")
    assert merge_pages(text, text + "mine\n", OURS)[0] == text + "mine\n"


@pytest.mark.parametrize("count", [1, 2, 200, 1001])
def test_the_picture_goes_from_the_lowest_reward_to_the_highest(count: int) -> None:
    rewards = [(step, step / count) for step in range(1, count + 1)]
    root = ElementTree.fromstring(render_reward_svg(rewards))
    line = next(each for each in root if each.tag.endswith("polyline"))
    points = [[float(x) for x in point.split(",")] for point in line.attrib["points"].split()]
    assert len(points) <= 200
    assert all(52 <= x <= 624 and 14 <= y <= 206 for x, y in points)
    if count > 1:
        assert (points[0][1], points[-1][1]) == (206, 14)
        assert points == sorted(points, key=lambda point: (point[0], -point[1]))
    assert {f"step {rewards[0][0]}", "mean reward over the steps"} <= {each.text for each in root}


@pytest.mark.parametrize("rewards", [(0.38, 1.15), (-3.6, 28), (0, 0), (1e-6, 3e-6), (999, 1001)])
def test_the_numbers_beside_the_picture_are_few_and_short(rewards: tuple[float, float]) -> None:
    root = ElementTree.fromstring(render_reward_svg(list(enumerate(rewards, 1))))
    told = [
        each.text or "" for each in root if each.attrib.get("text-anchor") == "end" and "step" not in (each.text or "")
    ]
    assert 3 <= len(told) <= 6
    assert all(len(text.lstrip("-")) <= 7 for text in told)
    assert len(set(told)) == len(told)


# On the Hub


def edit(hub: StandIn, repo: str, old: str, new: str) -> None:
    data = hub.repos[repo].files["README.md"][0].decode()
    assert old in data
    hub.repos[repo].files["README.md"] = (data.replace(old, new, 1).encode(), False)
    hub.repos[repo].commits.append("a" * 40)


def retold(run: RunDir, **sections: dict[str, Any]) -> None:
    recipe = load_recipe(str(run.path)).model_dump()
    run.recipe.write_text(dump_recipe(Recipe(**{**recipe, **sections})))


def test_a_licence_and_text_added_on_the_hub_outlive_the_next_publication(run: RunDir, hub: StandIn) -> None:
    send(run, what=["merged"])
    edit(hub, "me/tiny", "---\n", "---\nlicense: mit\n")
    edit(hub, "me/tiny", f"{END_MARK}\n", f"{END_MARK}\n\nThanks to all.\n")
    page = hub.repos["me/tiny"].files["README.md"]
    found = send(run, what=["merged"]).sent[0]
    assert hub.repos["me/tiny"].files["README.md"] == page
    assert not [remark for remark in found.remarks if "licence" in remark], "it names one"
    run.metrics.write_text('{"step": 1, "reward": 0.25}\n')
    send(run, what=["merged"])
    text = hub.repos["me/tiny"].files["README.md"][0].decode()
    assert "| mean reward | 0.250 |" in text
    assert "](reward.svg)" in text
    assert b"<polyline" in hub.repos["me/tiny"].files["reward.svg"][0]
    assert (front(text)["license"], text[-15:]) == ("mit", "Thanks to all.\n")
    head = hub.repos["me/tiny"].head
    assert send(run, what=["merged"]).sent[0].verdict == "there already"
    assert hub.repos["me/tiny"].head == head


def test_a_page_of_an_earlier_version_is_replaced_only_if_nobody_changed_it(run: RunDir, hub: StandIn) -> None:
    send(run, what=["adapter"])
    files = hub.repos["me/tiny-lora"].files
    old = b"---\nlicense: mit\n---\n# as it was\n"
    mark = json.loads(files["minigrpo.json"][0])
    mark["files"]["README.md"] = hashlib.sha256(old).hexdigest()
    del mark["front_matter"]
    files["minigrpo.json"] = (json.dumps(mark).encode(), False)
    for page, stays in ((old, False), (old + b"mine\n", True)):
        files["README.md"] = (page, False)
        hub.repos["me/tiny-lora"].files = dict(files)
        hub.repos["me/tiny-lora"].commits.append(hashlib.sha1(page).hexdigest())
        found = send(run, what=["adapter"]).sent[0]
        text = hub.repos["me/tiny-lora"].files["README.md"][0].decode()
        assert (text.endswith("mine\n"), front(text).get("license") == "mit") == (stays, stays)
        assert any("has no marks" in remark for remark in found.remarks) == stays


def test_a_new_repository_with_the_hubs_own_page_keeps_its_licence(run: RunDir, hub: StandIn) -> None:
    hub.repos["me/tiny"] = Repo(True, {"README.md": (b"---\nlicense: mit\n---\n", False)})
    assert send(run, what=["merged"]).sent[0].verdict == "published"
    assert front(hub.repos["me/tiny"].files["README.md"][0].decode())["license"] == "mit"


def test_a_page_beside_the_files_is_not_dropped_in_silence(run: RunDir) -> None:
    (run.gguf / "README.md").write_text("---\nlicense: mit\n---\n")
    found = send(run, dry_run=True)
    told = [any(f"{run.gguf / 'README.md'} stays here" in remark for remark in sent.remarks) for sent in found.sent]
    assert told == [False, False, True]


def test_the_licence_of_the_recipe_or_the_command_line_is_written(run: RunDir, hub: StandIn) -> None:
    retold(run, publish={"license": "cc-by-4.0"})
    send(run, what=["merged"])
    assert front(hub.repos["me/tiny"].files["README.md"][0].decode())["license"] == "cc-by-4.0"
    publish(run, "me/tiny", what=["merged"], licence="mit", quiet=True)
    assert front(hub.repos["me/tiny"].files["README.md"][0].decode())["license"] == "mit"


def test_a_licence_that_is_no_id_is_refused(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(run.path), "--repo", "me/x", "--dry-run", "--license", "MIT License")
    code, printed = command(*words, capsys=capsys)
    assert (code, "is no ID of the Hub's" in " ".join(printed.split())) == (2, True)
    code, printed = command("--folder", str(run.merged), "--repo", "me/x", "--license", "mit", capsys=capsys)
    assert (code, "A folder goes as it is" in printed) == (2, True)
    with pytest.raises((MinigrpoError, RecipeError), match=r"publish\.license"):
        load_recipe(None, {"publish.license": "MIT License"})
    assert yaml.safe_load(dump_recipe(load_recipe(None, {"publish.license": "mit"})))["publish"]["license"] == "mit"
