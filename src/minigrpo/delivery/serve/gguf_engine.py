"""A GGUF file as the model that is judged: its answers to a task's prompts, through llama.cpp's own server.

    with open_gguf(file, max_tokens=256) as engine:
        engine.generate(prompts, n=1, sampling)

Prompts are rendered by the file's own chat template and tokenizer, which the export compared with the model's, token by
token: so what is judged is what people will use. It only judges. It has no weights that training could change, and its
completions carry no log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigrpo.delivery.gguf.header import GgufHeader, read_head
from minigrpo.delivery.serve.commands import ROOM
from minigrpo.delivery.serve.server import ServerClient, serve_gguf
from minigrpo.errors import ModelError
from minigrpo.models.context import check_room
from minigrpo.types import Completion, Ready, Rendered, Sampling
from minigrpo.utils.rng import name_key


@contextmanager
def open_gguf(file: Path, *, max_tokens: int) -> Iterator[GgufEngine]:
    """`max_tokens`: of the longest answer. Raises ArtifactError for a file that is missing, cut short or refused."""
    head = read_head(file)
    if not head.template:
        raise ModelError(f"{file} holds no chat template, so messages cannot become a prompt. Export it again.")
    wanted = max(ROOM, 2 * max_tokens + ROOM // 2)
    server = serve_gguf(file, context=min(wanted, head.context or wanted))
    with server as client:
        yield GgufEngine(client, head, server.launch.context)


class GgufEngine:
    """Asks a file's server. `context`: tokens that it reads at most; `tokenizer`: what renders prompts for it."""

    def __init__(self, client: ServerClient, head: GgufHeader, context: int | None) -> None:
        self.client, self.head, self.context = client, head, context
        self.tokenizer = Renderer(client, str(head.file))

    def generate(
        self, prompts: Sequence[Rendered], n: int, sampling: Sampling, ready: Ready | None = None
    ) -> list[tuple[Completion, ...]]:
        check_room(prompts, sampling.max_tokens, self.context)
        answers = []
        for place, asked in enumerate(prompts):
            own = tuple(self._answer(asked, sibling, sampling) for sibling in range(n))
            answers.append(own)
            if ready:
                ready(place, own)
        return answers

    def update(self, policy: Any) -> None:
        raise ModelError(f"{self.head.file} can be judged but not trained.")

    def _answer(self, asked: Rendered, sibling: int, sampling: Sampling) -> Completion:
        fixed = {"prompt": list(asked.ids), "n_predict": sampling.max_tokens, "return_tokens": True}
        seed = name_key(sampling.seed, asked.prompt.id, sibling) % 2**32
        said = self.client.ask("/completion", {**fixed, "temperature": sampling.temperature, "seed": seed})
        cut = said["stop_type"] == "limit"
        end = () if cut or self.head.eos is None else (self.head.eos,)
        return Completion(said["content"], (*said["tokens"], *end), (), "length" if cut else "stop")


class Renderer:
    """Stands where a tokenizer does when prompts are rendered."""

    def __init__(self, client: ServerClient, name: str) -> None:
        self._client = client
        self.name_or_path = name

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_: Any) -> dict[str, list[int]]:
        """The answer is always opened, and ids are always returned."""
        return {"input_ids": list(self._client.rendered(messages))}
