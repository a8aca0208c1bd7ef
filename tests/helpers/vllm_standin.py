"""A stand-in for a vLLM server: it speaks vLLM's HTTP protocol and answers with transformers and PEFT, from the files
that it is sent. So an adapter that did not arrive, or arrived wrongly, shows as another distribution.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from tests.helpers.tiny import TEMPLATE, build_model, build_tokenizer


class StandIn(ThreadingHTTPServer):
    """`base` answers; an adapter that is loaded answers under its own name.

    `last`: the model of the adapter that was loaded last. Faults, all off at first: `fault`, a refusal of everything;
    `takes`, what loading makes of the adapter; `shift`, nats by which reported log-probabilities are off; `points`,
    by path, where it points instead of answering; `plain`,
    reporting them at temperature 1; `spoils(body, choices)`, the answer in place of a right one; `hangs(body)`, seconds
    before an answer; `dies(body)`, whether the connection is cut instead.
    """

    daemon_threads = True

    def __init__(self, base_seed: int = 0, template: str = TEMPLATE) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.template = template
        self.models: dict[str, Any] = {"the-base": build_model("qwen2", base_seed)}
        self.asked: list[dict[str, Any]] = []
        self.told: list[str] = []
        self.fault: tuple[int, str] | None = None
        self.takes: Callable[[StandIn, str, Any], Any] = lambda server, name, model: model
        self.last: Any = None
        self.points: dict[str, str] = {}
        self.shift, self.plain = 0.0, False
        self.spoils: Callable[[dict[str, Any], list[Any]], Any] = lambda body, choices: {"choices": choices}
        self.hangs: Callable[[dict[str, Any]], float] = lambda body: 0.0
        self.dies: Callable[[dict[str, Any]], bool] = lambda body: False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        """Return the requests for whole groups: not those for one short text."""
        return [body for body in self.asked if body["n"] > 1]

    def load(self, body: dict[str, Any]) -> str:
        from peft import PeftModel

        name = body["lora_name"]
        # A copy: a second model made from a seed would share torch's generator with other stand-ins' threads.
        model = PeftModel.from_pretrained(copy.deepcopy(self.models["the-base"]), body["lora_path"]).eval()
        self.models[name], self.last = self.takes(self, name, model), model
        return "Success: LoRA adapter added"

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer = build_tokenizer(self.template)
        opened = body["add_generation_prompt"]
        found = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=opened, return_dict=True)
        return {"tokens": list(found["input_ids"]), "count": len(found["input_ids"])}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        draw = torch.Generator().manual_seed(body["seed"])
        choices = [self.one(body, draw) | {"index": i} for i in range(body["n"])]
        return self.spoils(body, list(reversed(choices)))

    @torch.no_grad()
    def one(self, body: dict[str, Any], draw: torch.Generator) -> dict[str, Any]:
        ids, logprobs, finish = list(body["prompt"]), [], "length"
        for _ in range(body["max_tokens"]):
            logits_V = self.models[body["model"]](torch.tensor([ids])).logits[0, -1]
            scores_V = logits_V / body["temperature"]
            token = int(torch.multinomial(scores_V.softmax(-1), 1, generator=draw))
            ids.append(token)
            reported_V = logits_V if self.plain else scores_V
            logprobs.append(float(reported_V.log_softmax(-1)[token]) + self.shift)
            if token in body["stop_token_ids"]:
                finish = "stop"
                break
        own = ids[len(body["prompt"]) :]
        return {"token_ids": own, "logprobs": {"token_logprobs": logprobs}, "finish_reason": finish, "text": "?"}


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "the-base"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            if self.server.dies(body):
                self.close_connection = True
                return
            time.sleep(self.server.hangs(body))
        if target := self.server.points.get(self.path):
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with self.server.lock:
            self.server.told.append(self.path)
            self.answer(*self.outcome(body))

    def outcome(self, body: dict[str, Any]) -> tuple[Any, int]:
        if self.server.fault:
            return self.server.fault[1], self.server.fault[0]
        if self.path == "/tokenize":
            return self.server.tokenize(body), 200
        if self.path == "/v1/load_lora_adapter":
            return self.server.load(body), 200
        if self.path == "/v1/unload_lora_adapter":
            known = self.server.models.pop(body["lora_name"], None) is not None
            return ("Success", 200) if known else ("cannot be found", 404)
        if body["model"] not in self.server.models:
            return f"The model `{body['model']}` does not exist.", 404
        return self.server.complete(body), 200

    def answer(self, content: Any, code: int = 200) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        try:
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # whoever asked has gone
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        return


@contextmanager
def stand_ins(*servers: StandIn) -> Iterator[tuple[StandIn, ...]]:
    """Run the servers inside the block."""
    with ExitStack() as open_ones:
        for server in servers:
            open_ones.enter_context(server)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            open_ones.callback(server.shutdown)
        yield servers
