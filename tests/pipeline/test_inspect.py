"""The tokens of a group, before and after its step's update, are measured by the policies of before and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minigrpo.cli import main
from minigrpo.errors import ArtifactError
from minigrpo.models.chat_template import render
from minigrpo.pipeline.inspect_group import InspectedGroup, first_different_word, inspect_group
from minigrpo.runs.rundir import RunDir, digest
from minigrpo.types import Prompt
from tests.helpers.proved import own_copy, proved_home, replace_once

__all__ = ["own_copy", "proved_home"]


def as_transformers_says(folder: Path, found: InspectedGroup, sibling: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of an answer's tokens by transformers and PEFT, from a checkpoint's own files."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    prompt = render(tokenizer, Prompt(found.prompt, tuple(found.messages))).ids
    own = [token.id for token in found.siblings[sibling].tokens]
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *own]])).logits[0, len(prompt) - 1 : -1]
    spread_TV = logits_TV.log_softmax(-1)
    return spread_TV.gather(1, torch.tensor(own)[:, None])[:, 0], -(spread_TV.exp() * spread_TV).sum(-1)


def figures(found: InspectedGroup, sibling: int, name: str) -> torch.Tensor:
    return torch.tensor([getattr(token, name) for token in found.siblings[sibling].tokens])


def test_tokens_are_measured_by_the_policies_between_which_the_update_lies(run: RunDir) -> None:
    before = digest(run.path)
    found = inspect_group(run, 5, 2, quiet=True)
    assert found.exact
    for sibling in (0, 3):
        logprobs, entropies = as_transformers_says(run.checkpoint(4), found, sibling)
        torch.testing.assert_close(figures(found, sibling, "logprob"), logprobs, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(figures(found, sibling, "entropy"), entropies, atol=2e-5, rtol=1e-5)
    found = inspect_group(run, 6, 1, quiet=True)
    logprobs, entropies = as_transformers_says(run.checkpoint(6), found, 1)
    torch.testing.assert_close(figures(found, 1, "logprob_after"), logprobs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(figures(found, 1, "entropy_after"), entropies, atol=2e-5, rtol=1e-5)
    assert (figures(found, 1, "logprob_after") - figures(found, 1, "logprob")).abs().max() > 1e-4
    assert digest(run.path) == before


def test_the_first_step_is_measured_from_the_beginning(run: RunDir) -> None:
    found = inspect_group(run, 1, 1, quiet=True)
    logged = json.loads(run.groups.read_text().splitlines()[0])
    assert found.prompt == logged["prompt"]
    assert [sibling.logged["reward"] for sibling in found.siblings] == [row["reward"] for row in logged["completions"]]
    assert [len(sibling.tokens) for sibling in found.siblings] == [row["tokens"] for row in logged["completions"]]
    moved = sum(
        sibling.logged["advantage"] * token.change / len(sibling.tokens)
        for sibling in found.siblings
        for token in sibling.tokens
    )
    assert moved > 0  # what earned more than its siblings has become likelier


def test_tokens_put_together_are_the_answer(run: RunDir) -> None:
    for sibling in inspect_group(run, 5, 1, quiet=True).siblings:
        assert "".join(token.text for token in sibling.tokens).startswith(sibling.logged["text"].rstrip("\ufffd"))


def test_the_command_tells_siblings_in_words_and_in_json(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["inspect", "run", "--step", "5", "--group", "2", "--by", "entropy"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "step 5, group 2 of 2" in told
    assert told.count("sibling 4: ") == 1
    assert "log-probability -" in told
    assert "to the last byte" in told
    with pytest.raises(SystemExit):
        main.main(["inspect", "run", "--step", "5", "--group", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["exact"]
    measured = {"logprob", "logprob_after", "entropy", "entropy_after"}
    assert set(found["siblings"][0]["tokens"][0]) == {"id", "text", *measured}


def test_what_is_not_the_logs_step_is_said(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    replace_once(Path("mine.py"), "% 2 == 0", "% 2 == 1")
    with pytest.raises(SystemExit) as ended:
        main.main(["inspect", "run", "--step", "5"])
    assert ended.value.code == 1
    assert "Not exact" in capsys.readouterr().out


def test_a_group_that_is_not_there_is_a_sentence(run: RunDir) -> None:
    with pytest.raises(ArtifactError, match="has the groups 1 to 2; there is no group 3"):
        inspect_group(run, 5, 3, quiet=True)


@pytest.mark.parametrize(
    ("best", "text", "word"),
    [("a b c", "a x c", "x"), ("say 12", "say 13 now", "13"), ("same", "same", None), ("long one", "long", "long")],
)
def test_the_first_word_that_differs_is_found(best: str, text: str, word: str | None) -> None:
    place = first_different_word(best, text)
    assert (place and text[slice(*place)]) == word
