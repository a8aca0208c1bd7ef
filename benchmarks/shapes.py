"""Count the matrix products that a GRPO step needs, phase by phase, from the model's shape and the lengths alone.

What counts as necessary: every prompt read once for all its siblings; one row of each linear layer for every token
that is fed, none for padding and none for rows that have ended; the output head at sampled or scored positions only;
attention over the tokens that may be seen. Of prompt tokens, the last layer's keys and values alone (in the prefill
with the queries, which are one product with both; in training with their attention). LoRA beside the weights where
they lie in 16 bit (a 16-bit sum of both would round training away); in float32 folded into them where that is cheaper.
Norms, activations, RoPE and the sampling of tokens are left out: in the limit they cost nothing. Layers that read the
same input count as one product.

A completion of c tokens is c decoding steps: the first is fed the prompt's last token, so a prompt of p tokens shares
p - 1 of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Way = Literal["linear", "input", "made"]
"""How a product meets its right-hand side: a weight [outer, inner], a weight [inner, outer], or two activations."""


@dataclass(frozen=True, slots=True)
class Product:
    """[rows, inner] x [inner, outer]."""

    rows: int
    inner: int
    outer: int
    way: Way = "linear"

    @property
    def operations(self) -> int:
        """Count the operations: a multiplication and an addition are two."""
        return 2 * self.rows * self.inner * self.outer

    @property
    def weight_entries(self) -> int:
        """Count the entries that must be read from memory: the weight's. Activations may be in the cache already."""
        return 0 if self.way == "made" else self.inner * self.outer


@dataclass(frozen=True, slots=True)
class Attention:
    """The products of queries, keys, probabilities and values. `entries`: keys and values that must be read."""

    operations: int = 0
    entries: int = 0

    def __add__(self, other: Attention) -> Attention:
        return Attention(self.operations + other.operations, self.entries + other.entries)


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a phase.

    `choices`: pairs of equivalent ways, of which one is needed. `moved`: bytes of no product.
    """

    products: Counter[Product]
    attention: Attention = Attention()
    choices: tuple[tuple[Counter[Product], Counter[Product]], ...] = ()
    moved: int = 0

    @property
    def operations(self) -> int:
        """Count the operations, with the first of each choice."""
        chosen = [self.products, *(first for first, _ in self.choices)]
        return self.attention.operations + sum(
            product.operations * times for products in chosen for product, times in products.items()
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a Llama-like decoder."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    inner: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the shape from a transformers config, or from its text part."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            vocab=text.vocab_size,
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=text.num_key_value_heads,
            width=getattr(text, "head_dim", None) or text.hidden_size // heads,
            inner=text.intermediate_size,
        )

    @property
    def readers(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Return (inputs, outputs of each layer that reads them): query, key and value; out; gate and up; down."""
        query, key = self.heads * self.width, self.kv_heads * self.width
        return (
            (self.hidden, (query, key, key)),
            (query, (self.hidden,)),
            (self.hidden, (self.inner, self.inner)),
            (self.inner, (self.hidden,)),
        )

    @property
    def entries(self) -> int:
        """Count the weights that are read for every token: all linear layers and the head."""
        layer = sum(reads * sum(outs) for reads, outs in self.readers)
        return self.layers * layer + self.vocab * self.hidden

    def adapter_entries(self, rank: int) -> int:
        """Count the entries of LoRA's two matrices on every linear layer."""
        return self.layers * sum(rank * (reads + out) for reads, outs in self.readers for out in outs)

    def seen(self, pairs: int) -> int:
        """Count the operations of attention in which a query meets `pairs` keys and their values, over all layers."""
        return 4 * self.layers * self.heads * self.width * pairs

    def kept(self, tokens: int) -> int:
        """Count the entries of the KV cache that `tokens` tokens fill."""
        return 2 * self.layers * self.kv_heads * self.width * tokens


@dataclass(frozen=True, slots=True)
class Lengths:
    """The tokens of each prompt, and of its completions."""

    prompts_P: tuple[int, ...]
    completions_PG: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, prompts_B: Sequence[int], completions_B: Sequence[int], siblings: int) -> Lengths:
        """Make lengths from those of single completions, siblings side by side."""
        groups = range(0, len(completions_B), siblings)
        return cls(
            tuple(prompts_B[start] for start in groups),
            tuple(tuple(completions_B[start : start + siblings]) for start in groups),
        )

    @property
    def shared(self) -> int:
        return sum(self.prompts_P) - len(self.prompts_P)

    @property
    def scored(self) -> int:
        return sum(map(sum, self.completions_PG))

    def pairs(self) -> int:
        """Count the (query, key) pairs of one causal pass in which siblings share their prompt."""
        return sum(
            s * (s + 1) // 2 + sum(c * s + c * (c + 1) // 2 for c in own_G)
            for s, own_G in ((p - 1, own_G) for p, own_G in zip(self.prompts_P, self.completions_PG, strict=True))
        )


def prefill(shape: Shape, lengths: Lengths, rank: int) -> Work:
    """Count the prefill: shared prompts through the layers, in the last one up to keys and values, not the head.

    `rank`: of an adapter beside the weights, or 0.
    """
    if not lengths.shared:
        return Work(Counter())
    whole, last = replace(shape, layers=shape.layers - 1), replace(shape, layers=1)
    pairs = sum((p - 1) * p // 2 for p in lengths.prompts_P)
    attention = Attention(whole.seen(pairs), shape.kept(lengths.shared))
    products = _forward(whole, lengths.shared, rank) + _forward(last, lengths.shared, rank, last.readers[:1])
    return Work(products, attention)


def decode(shape: Shape, lengths: Lengths, rank: int) -> Work:
    """Count decoding step by step.

    Rows not yet ended, each with its own context; a prompt's keys are read once for all.
    """
    products: Counter[Product] = Counter()
    attention = Attention()
    for step in range(max(map(max, lengths.completions_PG))):
        live_P = [sum(c > step for c in own_G) for own_G in lengths.completions_PG]
        rows = sum(live_P)
        products += _forward(shape, rows, rank) + Counter({Product(rows, shape.hidden, shape.vocab): 1})
        pairs = sum(live * (p + step) for live, p in zip(live_P, lengths.prompts_P, strict=True))
        read = sum(p - 1 for live, p in zip(live_P, lengths.prompts_P, strict=True) if live) + rows * (step + 1)
        attention += Attention(shape.seen(pairs), shape.kept(read))
    return Work(products, attention)


def training(shape: Shape, lengths: Lengths, rank: int, *, may_fold: bool) -> Work:
    """Count one forward and one backward pass over prompts once and completions; gradients of the adapter alone.

    `may_fold`: weights of 32 bit, into which the adapter may be added before the product. The lowest layer passes no
    gradient on: embeddings are not trained. The last one works on scored tokens, but for keys and values.
    """
    tokens, scored = lengths.shared + lengths.scored, lengths.scored
    products = Counter(
        {Product(scored, shape.hidden, shape.vocab): 1, Product(scored, shape.vocab, shape.hidden, "input"): 1}
    )
    choices: list[tuple[Counter[Product], Counter[Product]]] = []
    (hidden, (query, *keys)), *behind = shape.readers
    most, single = shape.layers - 1, int(shape.layers == 1)
    parts = [
        *((tokens, reads, outs, Times(most, most - (place == 0))) for place, (reads, outs) in enumerate(shape.readers)),
        (scored, hidden, (query,), Times(1, 1 - single)),
        (tokens, hidden, tuple(keys), Times(1, 1 - single)),
        *((scored, reads, outs, Times(1, 1)) for reads, outs in behind),
    ]
    for rows, reads, outs, times in parts:
        narrow = _narrow(rows, reads, outs, rank, times)
        folded = _folded(rows, reads, outs, rank, times)
        if may_fold:
            choices.append((narrow, folded))
        else:
            products += narrow
    # Backward: two products for each of the two forward ones.
    attention = Attention(3 * shape.seen(lengths.pairs()), 3 * shape.kept(tokens))
    return Work(products, attention, tuple(choices))


def update(shape: Shape, rank: int, *, folds: bool) -> Work:
    """Count AdamW in float32.

    Weight, gradient and two moments read, three written, after the gradient's norm was taken.

    `folds`: the engine's copy of the weights is rebuilt with the adapter in it.
    """
    products: Counter[Product] = Counter()
    if folds:
        for reads, outs in shape.readers:
            for out in outs:
                products[Product(out, rank, reads, "made")] += shape.layers
    return Work(products, moved=32 * shape.adapter_entries(rank) + (8 * shape.entries if folds else 0))


def phases(shape: Shape, lengths: Lengths, rank: int, *, wide: bool) -> dict[str, Work]:
    """Return the work of the whole step by phase. `wide`: weights of 32 bit."""
    beside = 0 if wide else rank
    return {
        "prefill": prefill(shape, lengths, beside),
        "decode": decode(shape, lengths, beside),
        "training": training(shape, lengths, rank, may_fold=wide),
        "update": update(shape, rank, folds=wide),
    }


@dataclass(frozen=True, slots=True)
class Times:
    """The number of layers, and of those that pass a gradient on."""

    layers: int
    passing: int


def _forward(
    shape: Shape, rows: int, rank: int, readers: Sequence[tuple[int, tuple[int, ...]]] | None = None
) -> Counter[Product]:
    products: Counter[Product] = Counter()
    for reads, outs in shape.readers if readers is None else readers:
        products[Product(rows, reads, sum(outs))] += shape.layers
        for product in _thin(rows, reads, outs, rank):
            products[product] += shape.layers
    return products


def _thin(rows: int, reads: int, outs: Sequence[int], rank: int) -> Iterator[Product]:
    """Yield the forward products through the adapters of layers that read the same input."""
    if rank:
        yield Product(rows, reads, rank * len(outs))
        yield from (Product(rows, rank, out) for out in outs)


def _narrow(tokens: int, reads: int, outs: Sequence[int], rank: int, times: Times) -> Counter[Product]:
    """Count forward and backward with the adapter as two thin products beside the wide one."""
    products: Counter[Product] = Counter()
    for product in (Product(tokens, reads, sum(outs)), *_thin(tokens, reads, outs, rank)):
        products[product] += times.layers
    for out in outs:
        products[Product(tokens, out, rank, "input")] += times.layers
        products[Product(rank, tokens, reads, "made")] += times.layers
        products[Product(out, tokens, rank, "made")] += times.layers
    products[Product(tokens, sum(outs), reads, "input")] += times.passing
    products[Product(tokens, rank * len(outs), reads, "input")] += times.passing
    return products


def _folded(tokens: int, reads: int, outs: Sequence[int], rank: int, times: Times) -> Counter[Product]:
    """Count the same with the adapter added into the weight: wide products only, the sum's gradient in between."""
    products: Counter[Product] = Counter()
    products[Product(tokens, reads, sum(outs))] += times.layers
    products[Product(tokens, sum(outs), reads, "input")] += times.passing
    products[Product(sum(outs), tokens, reads, "made")] += times.layers
    for out in outs:
        products[Product(out, rank, reads, "made")] += times.layers
        products[Product(rank, out, reads, "made")] += times.layers
        products[Product(out, reads, rank, "made")] += times.layers
    return products
