"""A model behind OpenAI's chat protocol as a reward: `judge:FILE` in place of a function, or from Python

    quality = Judge(url="http://127.0.0.1:8000/v1", model="m", template="... {completion} ...", field="score")

The number that it answers, between `low` and `high`, becomes a reward between 0 and 1. An answer without one gives
None: the judge does not apply. Answers are kept on the disk by model, options and template as filled in, not by
address, so a resumed run pays nothing twice and gets the same rewards.

Not covered: a completion that talks the judge over. Read what it pays for.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from minigrpo.errors import TaskError
from minigrpo.tasks.common.rewards import as_number
from minigrpo.tasks.custom.judge_cache import JudgeCache, JudgeReply, request_key
from minigrpo.tasks.custom.judge_settings import PLACEHOLDER, check_judge_settings, read_judge_settings
from minigrpo.utils.event_loop import run_in_daemon_thread
from minigrpo.utils.http import StatusError, exchange
from minigrpo.utils.paths import user_path

_WORTH_REPEATING = (408, 409, 429)
_LONGEST_PAUSE_S = 60.0
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(slots=True)
class JudgeUse:
    """What a judge was asked since it was last told."""

    calls: int = 0
    cached: int = 0
    read: int = 0
    written: int = 0
    unreadable: int = 0


@dataclass(slots=True)
class _LoopState:
    """What belongs to one event loop. `asked`: requests that are under way, by their key."""

    gate: asyncio.Semaphore
    asked: dict[str, asyncio.Task[JudgeReply]] = field(default_factory=dict)


class Judge:
    """A reward function with TRL's signature that asks a model. Its parameters: those of JudgeSettings."""

    def __init__(self, *, name: str = "judge", **settings: Any) -> None:
        self.settings = check_judge_settings(settings, name)
        self._set_up(name)

    @classmethod
    def read(cls, path: Path) -> Judge:
        """Open the judge that a file describes; it is called after the file."""
        settings = read_judge_settings(path).model_dump()
        if settings["cache"] not in (None, "default"):
            settings["cache"] = str(path.parent / user_path(settings["cache"]))
        return cls(name=path.stem, **settings)

    def _set_up(self, name: str) -> None:
        self.__name__ = name
        needed = ("completions", "prompts", "log_metric", *self.settings.placeholders)
        names = [one for one in dict.fromkeys(needed) if one not in ("completion", "prompt")]
        # Columns that the template names are asked for like those of any function, and missed like them.
        kind = inspect.Parameter.KEYWORD_ONLY
        self.__signature__ = inspect.Signature([inspect.Parameter(one, kind) for one in names])
        self.use, self._calls = JudgeUse(), 0
        self._use_lock = threading.Lock()
        self._cache = JudgeCache.of(self.settings.cache)
        self._states: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = WeakKeyDictionary()

    async def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Any], log_metric: Any = None, **columns: Sequence[Any]
    ) -> list[float | None]:
        filled = [
            self._fill(
                {"prompt": prompt, "completion": said, **{name: values[place] for name, values in columns.items()}}
            )
            for place, (prompt, said) in enumerate(zip(prompts, completions, strict=True))
        ]
        replies = await asyncio.gather(*(self._judge(text) for text in filled))
        rewards = [None if reply is None else self.read_reward(reply.text) for reply in replies]
        unreadable = sum(r is None and reply is not None for r, reply in zip(rewards, replies, strict=True))
        with self._use_lock:
            self.use.unreadable += unreadable
        if log_metric is not None:
            log_metric(f"{self.__name__}/unreadable", unreadable / max(1, len(rewards)))
        return rewards

    def _fill(self, values: Mapping[str, Any]) -> str | None:
        """Fill in the template, each place once; None where the row has nothing for one of them."""
        if any(values[name] is None for name in self.settings.placeholders):
            return None
        return PLACEHOLDER.sub(lambda found: _as_text(values[found[1]]), self.settings.template)

    async def _judge(self, filled: str | None) -> JudgeReply | None:
        if filled is None:
            return None
        body = self._body(filled)
        key = request_key(body)
        if (kept := self._cache.get(key)) is not None:
            with self._use_lock:
                self.use.cached += 1
            return kept
        state = self._state()
        if key not in state.asked:
            state.asked[key] = task = asyncio.create_task(self._ask(state, key, body))
            task.add_done_callback(partial(_forget, state, key))
        # Siblings that say the same share one call, and a group that is given up does not take it from the others.
        return await asyncio.shield(state.asked[key])

    def _state(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        if loop not in self._states:
            self._states[loop] = _LoopState(asyncio.Semaphore(self.settings.parallel))
        return self._states[loop]

    def _body(self, filled: str) -> dict[str, Any]:
        opening = [] if self.settings.system is None else [{"role": "system", "content": self.settings.system}]
        limit = {} if self.settings.max_tokens is None else {"max_tokens": self.settings.max_tokens}
        messages = [*opening, {"role": "user", "content": filled}]
        return {"model": self.settings.model, "messages": messages, **limit, **self.settings.options}

    async def _ask(self, state: _LoopState, key: str, body: dict[str, Any]) -> JudgeReply:
        async with state.gate:
            reply = await self._repeat(body)
        self._cache.put(key, reply)
        return reply

    async def _repeat(self, body: dict[str, Any]) -> JudgeReply:
        """Ask until there is an answer. Raise TaskError for a refusal, or after the last repetition."""
        for attempt in range(self.settings.retries + 1):
            self._count_call()
            pause = self.settings.backoff * 2**attempt
            try:
                raw = await run_in_daemon_thread(partial(self._send, body))
                reply = _parse_reply(raw)
            except StatusError as fault:
                why = f"it refused with status {fault.code}: {fault.raw[:300].decode(errors='replace')}"
                if fault.code not in _WORTH_REPEATING and fault.code < 500:
                    raise TaskError(f"{self._title} cannot be asked: {why}") from None
                pause = max(pause, fault.retry_after or 0.0)
            except (OSError, HTTPException, ValueError) as fault:
                why = f"{type(fault).__name__}: {fault}"
            else:
                with self._use_lock:
                    self.use.read += reply.read
                    self.use.written += reply.written
                return reply
            if attempt < self.settings.retries:
                await asyncio.sleep(min(pause, _LONGEST_PAUSE_S))
        raise TaskError(
            f"{self._title} gave no answer in {self.settings.retries + 1} calls; at last {why}. Is it up? A run goes "
            "on from its last checkpoint with --resume."
        )

    def _count_call(self) -> None:
        with self._use_lock:
            if self.settings.calls is not None and self._calls >= self.settings.calls:
                raise TaskError(
                    f"{self._title} was called {self._calls} times, its limit. Raise `calls`, and --resume."
                )
            self._calls += 1
            self.use.calls += 1

    @property
    def _title(self) -> str:
        return f"The judge {self.__name__} ({self.settings.model} at {self.settings.url})"

    def _send(self, body: dict[str, Any]) -> bytes:
        key = None
        if self.settings.key is not None:
            key = os.environ.get(self.settings.key, "").strip()
            if not key:
                raise TaskError(f"{self._title} needs its key: set the environment variable {self.settings.key}.")
            if not (key.isascii() and key.isprintable()):  # refused as a header, in words that would show it
                raise TaskError(
                    f"{self._title}: what stands in {self.settings.key} is no key, but several lines or so."
                )
        url = f"{self.settings.url.rstrip('/')}/chat/completions"
        direct = urlsplit(url).hostname in _LOCAL_HOSTS
        return exchange(url, body, timeout=self.settings.timeout, direct=direct, key=key)

    def read_reward(self, text: str) -> float | None:
        """Return the reward that an answer gives; None where no number between low and high stands in its place."""
        said = text.rpartition("</think>")[2]
        number = _find_field(said, self.settings.field) if self.settings.field else self._find_match(said)
        if not self.settings.low <= number <= self.settings.high:  # false for NaN
            return None
        return (number - self.settings.low) / (self.settings.high - self.settings.low)

    def _find_match(self, said: str) -> float:
        found = list(re.finditer(self.settings.pattern or "", said))
        return _number_of((found[-1][1] if found[-1].re.groups else found[-1][0]) if found else None)

    def closing_words(self) -> str | None:
        """Tell what was asked since the last telling; None where nothing was."""
        with self._use_lock:
            use, self.use = self.use, JudgeUse()
        if not use.calls and not use.cached:
            return None
        price = self.settings.prices
        cost = f", {(use.read * price[0] + use.written * price[1]) / 1e6:.4g} to pay" if price else ""
        return (
            f"The judge {self.__name__}: {use.calls} calls, {use.read} tokens read and {use.written} written{cost}; "
            f"{use.cached} answers from the cache; {use.unreadable} without a number."
        )


def _forget(state: _LoopState, key: str, task: asyncio.Task[JudgeReply]) -> None:
    state.asked.pop(key, None)
    if not task.cancelled():
        task.exception()  # whoever waits for it gets it; where nobody does any more, it is no news


def _parse_reply(raw: bytes) -> JudgeReply:
    """Read text and token counts. Raise ValueError for what is no answer of the chat protocol."""
    try:
        answer = json.loads(raw)
        text = answer["choices"][0]["message"]["content"] or ""
        usage = answer.get("usage") or {}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"it is no answer of the chat protocol: {raw[:200].decode(errors='replace')}") from None
    # Half a character (a lone surrogate) is no text that could be kept.
    return JudgeReply(str(text).encode(errors="replace").decode(), *counts)


def _as_text(value: Any) -> str:
    """Return a value as it is to be read: messages as the words of the only one, or all with their roles."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(one, Mapping) and "content" in one for one in value):
        if len(value) == 1:
            return str(value[0]["content"])
        return "\n".join(f"{one.get('role')}: {one['content']}" for one in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _find_field(said: str, name: str) -> float:
    """Return the field of the last JSON object in a text that has it; NaN where none has."""
    decoder, number = json.JSONDecoder(), float("nan")
    at = said.find("{")
    while at >= 0:
        end = at + 1
        with suppress(ValueError, RecursionError):
            found, end = decoder.raw_decode(said, at)
            number = _number_of(found[name]) if name in found else number
        at = said.find("{", end)
    return number


def _number_of(value: Any) -> float:
    """Return a number, or text that is one; NaN for anything else."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else as_number(value)
    return float("nan")
