"""Leave out of a training pass what nobody reads: the last layer's outputs of prompt tokens.

Later tokens read a prompt's keys and values, of every layer. What the last layer makes of a prompt token beyond those
would go to the output head alone, and only completions are scored. So its queries, the projection behind its attention
and its MLP work on the scored tokens alone; the others get zeros, through which no gradient passes.

Shapes: T tokens of a packed row, S of them prompts', which stand first, W hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from minigrpo.models.lora_linear import SeededDropout


def skip_unread(decoder: Any) -> None:
    """Make the decoder's last layer skip prompt tokens wherever it is given a packed row's `layout`."""
    last = decoder.layers[-1]
    if not isinstance(last, _SkipsUnread):
        own = type(last)
        # A class, not a forward of this one layer: to make activations again, transformers calls the class's own.
        last.__class__ = type(own.__name__, (_SkipsUnread, own), {"__module__": own.__module__})


class _SkipsUnread:
    """Stands before the class of a decoder layer."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layout = kwargs.get("layout")
        with ExitStack() as stack:
            if layout is not None and layout.shared_tokens:
                for module in (self.self_attn.q_proj, self.self_attn.o_proj, self.mlp):
                    stack.enter_context(_from_token(module, layout.shared_tokens))
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _from_token(module: nn.Module, start: int) -> Iterator[None]:
    """Let the module work on the tokens from `start` on inside the block, and return zeros for those before."""

    def cut(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0][:, start:], *inputs[1:]

    def fill(_: nn.Module, inputs: Any, out_1tW: Tensor) -> Tensor:
        return pad(out_1tW, (0, 0, start, 0))

    dropouts = [inner for inner in module.modules() if isinstance(inner, SeededDropout)]
    names = [dropout.token_keys for dropout in dropouts]
    hooks = module.register_forward_pre_hook(cut), module.register_forward_hook(fill)
    for dropout, keys in zip(dropouts, names, strict=True):
        dropout.token_keys = None if keys is None else keys[:, start:]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for dropout, keys in zip(dropouts, names, strict=True):
            dropout.token_keys = keys
