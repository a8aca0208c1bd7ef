"""An engine that answers prompts from a GGUF file, through llama.cpp's server, so that the file can be evaluated.

    with open_gguf(file, max_tokens=256) as engine:
        engine.generate(prompts, n=1, sampling)

Prompts are rendered by the file's own chat template and tokenizer, which the export compared with the model's, token by
token: so the evaluation covers what people will use. The engine only evaluates: its weights cannot be trained, and its
completions carry no log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from minigrpo.delivery.gguf.header import GgufHeader, read_header
from minigrpo.delivery.serve.commands import DEFAULT_CONTEXT
from minigrpo.delivery.serve.resolve import NONSENSE, no_template
from minigrpo.delivery.serve.server import ServerClient, serve_gguf
from minigrpo.errors import ModelError
from minigrpo.models.context_window import check_room
from minigrpo.rollouts.engines.sampling import ProgressCounter
from minigrpo.types import Completion, Progress, Ready, Rendered, Sampling
from minigrpo.utils.rng import name_key


@contextmanager
def open_gguf(file: Path, *, max_tokens: int) -> Iterator[GgufEngine]:
    """Serve a GGUF file and yield its engine. `max_tokens`: of the longest answer. Raises ArtifactError for a file
    that is missing, truncated or refused, ModelError for one without a chat template."""
    header = read_header(file)
    if not header.template:
        raise ModelError(no_template(file), entry=NONSENSE)
    wanted = max(DEFAULT_CONTEXT, 2 * max_tokens + DEFAULT_CONTEXT // 2)
    server = serve_gguf(file, context=min(wanted, header.context or wanted))
    with server as client:
        yield GgufEngine(client, header, server.command.context)


class GgufEngine:
    """An engine that queries a GGUF file's server. `context`: most tokens it reads; `tokenizer`: renders prompts for
    it."""

    is_exact = False

    def __init__(self, client: ServerClient, header: GgufHeader, context: int | None) -> None:
        self.client, self.header, self.context = client, header, context
        self.tokenizer = Renderer(client, str(header.file))

    def generate(
        self,
        prompts: Sequence[Rendered],
        n: int,
        sampling: Sampling,
        ready: Ready | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[tuple[Completion, ...]]:
        check_room(prompts, sampling.max_tokens, self.context)
        answers = []
        counter = ProgressCounter(progress)
        for index, rendered in enumerate(prompts):
            own = []
            for sibling in range(n):
                own.append(self._answer(rendered, sibling, sampling))
                counter.add_completions(own[-1:])
            answers.append(tuple(own))
            if ready:
                ready(index, answers[-1])
        return answers

    def update(self, policy: Any) -> None:
        """Raise ModelError: a GGUF file is not trained."""
        raise ModelError(f"{self.header.file} can be judged but not trained.")

    def _answer(self, rendered: Rendered, sibling: int, sampling: Sampling) -> Completion:
        fixed = {"prompt": list(rendered.ids), "n_predict": sampling.max_tokens, "return_tokens": True}
        seed = name_key(sampling.seed, rendered.prompt.id, sibling) % 2**32
        reply = self.client.ask("/completion", {**fixed, "temperature": sampling.temperature, "seed": seed})
        cut = reply["stop_type"] == "limit"
        end = () if cut or self.header.eos is None else (self.header.eos,)
        return Completion(reply["content"], (*reply["tokens"], *end), (), "length" if cut else "stop")


class Renderer:
    """Takes the place of a tokenizer when prompts are rendered, by asking the server."""

    def __init__(self, client: ServerClient, name: str) -> None:
        self._client = client
        self.name_or_path = name

    @cached_property
    def chat_template(self) -> str | None:
        return self._client.chat_template()

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool, **_: Any
    ) -> dict[str, list[int]] | str:
        """Return the rendered ids, or the text. The answer is always opened, or continued."""
        return {"input_ids": list(self._client.render(messages))} if tokenize else self._client.render_text(messages)
