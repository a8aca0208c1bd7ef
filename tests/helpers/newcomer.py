"""What a newcomer has who goes through the pages: a folder with the files that they name, and a model that is small.

`Newcomer.do` runs a command of a page as it stands there, with options after it that make it short. Runs of all names
that pages use (`runs/mine`, `runs/my`) are copies of one, which trained for 100 tiny steps.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.helpers.command_server import CommandServer, command_server
from tests.helpers.pages import ROOT, words_of

# So hasty a model earns nothing but ties, of which it would learn nothing: the bonus moves it.
TINY = (
    *("--rollout.prompts", "4", "--rollout.completions", "2", "--rollout.max_tokens", "6", "--eval.limit", "4"),
    *("--task.size", "32", "--lora.alpha", "8", "--objective.entropy", "0.01"),
)
BRIEF = (*TINY, "--train.steps", "2", "--save.every", "1")
LEARNS = ("--task.name", "mine.py:task")
BRIEFLY: dict[str, tuple[str, ...]] = {
    "train": BRIEF,
    **dict.fromkeys(("run", "quickstart"), (*BRIEF, *LEARNS, "--train.lr", "1e-2")),
    "warmup": (*BRIEF, "--warmup.steps", "2", "--warmup.rows", "2"),
    "preflight": (*BRIEF, "--seconds", "1"),
    "evaluate": ("--limit", "4", "--rollout.max_tokens", "6"),
    "fork": ("--times", "1", "--steps", "2", "--limit", "2"),
    "check-task --attack": ("--steps", "0"),
    "publish": ("--dry-run",),
    "serve": ("--dry-run",),
}
"""Options that make a command short; what it does stays the same. A server that nobody asks is shown, not started."""
MAY_SAY_NO = ("preflight", "check-task", "doctor", "sandbox")
"""Commands whose answer may be no here (exit code 1): a hasty model may be told that it will learn nothing."""
READERS = (
    *("evaluate", "check", "merge", "export", "verify", "publish", "serve"),
    *("replay", "fork", "audit", "inspect", "watch", "report"),
)
"""Commands that work on a run that has trained."""
TASK = """
rows = [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(100)]


def score(completion, answer):
    return completion.strip() == answer


def never(completion):
    return 0.0


def correct(completion):
    return float(sum(map(ord, completion)) % 2)


def format(completion):
    return sum(letter.islower() for letter in completion) / max(1, len(completion))


def task(recipe):
    from minigrpo import reward_task

    return reward_task(correct, format, rows=rows)
"""
"""A newcomer's task, with the names that pages use. Whatever a hasty model says earns something, so it learns."""


def hasty_cache(cache: Path) -> Path:
    """Build the embedded model in a hurry, under the real one's name, and the same for the other seed of the pages."""
    from minigrpo.models.embedded import seedling

    real = seedling.Blueprint()
    hasty = replace(real, school=replace(real.school, steps=2), imitation=replace(real.imitation, steps=60))
    seedling.build_seedling(hasty, cache / "hasty")
    for one in (replace(real, seed=1), real):
        name = f"seedling-{one.architecture}-{one.seed}-{seedling.fingerprint(one)}"
        shutil.copytree(cache / "hasty", cache / name)
    return cache


@dataclass(frozen=True)
class Newcomer:
    """`whole`: a run with all that the commands make of it. `folder`: where this one works."""

    server: CommandServer
    whole: Path
    folder: Path

    def do(self, command: str, *, in_order: bool) -> str:
        """Run a command and return what it printed. `in_order`: on what the commands before it left; else its files are
        laid out first. Fails where it ends otherwise than it should."""
        words, target = words_of(command)
        if not in_order:
            words = [self._known_prompt(word) for word in words]
            self._lay_out(words)
        verb, *given = words[1:]
        brief = BRIEFLY.get(f"{verb} --attack" if "--attack" in given else verb, ())
        brief = () if verb == "serve" and "--once" in given else brief
        brief = (*brief, "--with-paths") if "--with-run" in given else brief  # the base is a folder here
        brief = (*brief, "--ctx", "512") if "--ctx" in given else brief  # the model has no more than 1,024
        out, err = self.folder / "stdout", self.folder / "stderr"
        for file in (out, err):
            file.unlink(missing_ok=True)
        ended = self.server.run(verb, *given, *brief, out=str(out), err=str(err), folder=self.folder)
        printed = out.read_text(encoding="utf-8")
        told = f"{command}\n{printed}\n{err.read_text(encoding='utf-8')}"
        assert ended.code == 0 or (ended.code == 1 and verb in MAY_SAY_NO), f"exit code {ended.code}: {told}"
        assert not ended.left, f"leaves a process behind: {told}"
        if target and (in_order or not (self.folder / target).exists()):
            (self.folder / target).write_text(printed, encoding="utf-8")
        return printed

    def told(self, command: str) -> str:
        """Run a command as it is, but tiny, and return all that it printed, however it ended."""
        words, _ = words_of(command)
        self._lay_out(words)
        tiny = TINY if words[1] == "train" else ()
        out = self.folder / "told"
        self.server.run(*words[1:], *tiny, out=str(out), err=str(out), folder=self.folder)
        return out.read_text(encoding="utf-8")

    def _known_prompt(self, word: str) -> str:
        """Put a prompt of step 51 in the place of the one that a page names."""
        groups = [json.loads(line) for line in (self.whole / "groups.jsonl").read_text().splitlines()]
        known = next(group["prompt"] for group in groups if group["step"] == 51)
        return re.sub(r"(groups\.factor\.)(?:train-7|PROMPT)\b", rf"\g<1>{known}", word)

    def _lay_out(self, words: list[str]) -> None:
        """Give a command the runs and folders that it names: whole but for what it makes, none where it begins one."""
        verb = words[1]
        begins = verb in ("train", "run", "quickstart", "warmup") and "--resume" not in words
        named = [name for word in words for name in re.findall(r"^(?:\./)?(runs/[\w-]+)", word)]
        default = Path(words[2]).stem if verb in ("train", "run", "warmup") else "quickstart"
        named = named or ([f"runs/{default}"] if begins or "--resume" in words else [])
        for name in named:
            run = self.folder / name
            if begins or verb in READERS:
                shutil.rmtree(run, ignore_errors=True)
            if verb in READERS and not (verb == "publish" and "--folder" in words):
                shutil.copytree(self.whole, run, ignore=shutil.ignore_patterns(*_made_by(verb)))
        for folder, source in {"adapter": "adapter", "model": "merged", "my-run": "", "mine-run": ""}.items():
            if any(word.removeprefix("./") == folder for word in words) and not (self.folder / folder).exists():
                shutil.copytree(self.whole / source, self.folder / folder)
        for folder in ("my-GGUF", "mine-GGUF"):
            if folder in words and not (self.folder / folder).exists():
                shutil.copytree(self.whole / "gguf", self.folder / folder)


def _made_by(verb: str) -> tuple[str, ...]:
    return {"merge": ("merged", "gguf", "parity.json"), "export": ("gguf",)}.get(verb, ())


@contextmanager
def newcomers(place: Path) -> Iterator[Newcomer]:
    """Start the server of a newcomer, and train the run that others are copies of."""
    (place / "cache").mkdir()
    folder, log = place / "home", str(place / "log")
    folder.mkdir()
    environment = {"MINIGRPO_CACHE": str(hasty_cache(place / "cache")), "HOME": str(folder)}
    with command_server(**environment) as server:
        steps = ("--train.steps", "100", "--save.every", "25")
        (folder / "mine.py").write_text(TASK, encoding="utf-8")
        for words in (("run", "quickstart", *TINY, *LEARNS, *steps, "--run", "runs/whole"), ("recipes", "runs/whole")):
            ended = server.run(*words, out=f"{log}-{words[0]}", err=log, folder=folder)
            assert ended.code == 0, Path(log).read_text(encoding="utf-8")
        recipe = Path(f"{log}-recipes").read_text(encoding="utf-8")
        for name in ("my.yaml", "mine.yaml"):
            (folder / name).write_text(recipe, encoding="utf-8")
        shutil.copy(ROOT / "tests/data/trl/keyword_arguments.py", folder / "train.py")
        answer = {"prompt": "What is 3 + 4?", "completion": "<think>3+4=7</think><answer>7</answer>"}
        asked = [{**answer, "prompt": f"What is {i} + 4?"} for i in range(4)]
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
        shutil.copytree(next((place / "cache").glob("seedling-*-0-*")), folder / "base")
        whole = (folder / "runs/whole").rename(place / "whole")
        gguf = next((whole / "gguf").glob("*.gguf"))
        for name in ("model.gguf", "my-Q8_0.gguf"):
            shutil.copy(gguf, folder / name)
        yield Newcomer(server, whole, folder)
