"""The policy: a base model and what training changes in it. The one stateful class.

`logprobs(batch)` scores the tokens of a micro-batch under softmax(logits / temperature). Architectures whose attention
mask we control take the shared-prompt path (each prompt once, no padding); all others take the padded path,
one row per completion, with the same result.

Shapes: N scored tokens, T tokens of a row, B completions, V vocabulary, D hidden width.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigrpo.algorithms.packing import MicroBatch
from minigrpo.config.schema import Recipe, TrainConfig
from minigrpo.distributed.place import Place
from minigrpo.distributed.ranks import Ranks
from minigrpo.distributed.shards import (
    SHARDS,
    WEIGHT,
    read_shards,
    release_module,
    run_gathered,
    shard,
    slice_like,
    unite,
)
from minigrpo.errors import MinigrpoError, ModelError
from minigrpo.models import onednn
from minigrpo.models.attention import shared_prompt
from minigrpo.models.context_window import CAUSAL_DECODERS, text_config
from minigrpo.models.last_layer import skip_unread
from minigrpo.models.loading import TORCH_DTYPES, LoadedModel, adapter_base, open_model, pick_device
from minigrpo.models.logprobs import Float32Head, OutputHead, score_tokens
from minigrpo.models.lora import SeededDropout, add_lora, attach_adapter, load_adapter, own_model, save_adapter
from minigrpo.models.lora_linear import block_base_weights
from minigrpo.models.loss_scale import LossScale
from minigrpo.models.quantize import weight_bytes
from minigrpo.ui.progress import Report, no_report
from minigrpo.utils.memory import free_memory
from minigrpo.utils.paths import user_path
from minigrpo.utils.process import no_progress_bars
from minigrpo.utils.rng import mix, name_key
from minigrpo.utils.transfer import to_device


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of N tokens in nats: log-probability (differentiable) and entropy of the distribution of each.

    The entropy is differentiable only on request (`entropy_learns`).
    """

    logprobs_N: Tensor
    entropy_N: Tensor


class Policy:
    """A model in training, with its tokenizer. Everything else about a run is frozen data.

    `shards`: where the model is sharded over ranks, this rank's slice of each parameter, by name. `blocks_due`: whether
    the next pass that is trained on copies frozen weights into blocks (models/onednn.py); it changes no bit of it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        temperature: float,
        seed: int,
        backend: shared_prompt.AttentionBackend = shared_prompt.TORCH_BACKEND,
    ) -> None:
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.path = loaded.path
        self.warnings = loaded.warnings
        self.backend = backend
        self.temperature = temperature
        self.seed = seed
        self.device = device_of(self.model)
        self.dtype: torch.dtype = self.model.dtype
        self.shares_prompts = text_config(self.model.config).model_type in CAUSAL_DECODERS
        self.dropouts: list[SeededDropout] = []
        self.loss_scale = LossScale.of(self.dtype)
        self.frozen_copy: nn.Module | None = None
        self.starting_adapter: list[Tensor] | None = None
        self.blocks_due = False
        self.shards: dict[str, nn.Parameter] | None = None
        self._united: dict[str, Tensor] | None = None
        self._architecture = type(self.model)
        if self.shares_prompts:
            shared_prompt.register_shared_prompt_attention()
            self._set_attention(shared_prompt.SHARED_PROMPT_ATTENTION)
            skip_unread(decoder_of(self.model))
        elif self.model.config._attn_implementation == shared_prompt.TORCH_BACKEND.plain != backend.plain:
            self._set_attention(backend.plain)

    @property
    def reads_beginnings_once(self) -> bool:
        """Tell whether what all prompts of a pass begin with stands once in its row: so far on a CPU alone."""
        return self.shares_prompts and self.device.type in self.backend.segments_on

    @property
    def is_lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def is_sixteen_bit(self) -> bool:
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters_by_name().values() if parameter.requires_grad]

    @property
    def replicated(self) -> list[nn.Parameter]:
        """What is trained and lies whole on every rank, so that its gradients are still to be added up."""
        return [] if self.is_sharded else self.trainable

    @property
    def is_sharded(self) -> bool:
        return self.shards is not None

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters()) if self.shards is None else self.shards

    def shard(self, ranks: Ranks) -> None:
        """Keep only a slice of the model on this rank, and of its frozen copy beside it. All ranks call it."""
        self.shards = shard(self.model, _layers_of(self.model), ranks)
        if self.frozen_copy is not None and device_of(self.frozen_copy) == self.device:
            shard(self.frozen_copy, _layers_of(self.frozen_copy), ranks)

    def unite(self, ranks: Ranks) -> None:
        """Gather the whole model in the leading rank's main memory, for it to be saved. All ranks call it."""
        assert self.shards is not None, "only what is sharded can be united"
        self._united = unite(self.shards, ranks)

    def logprobs(self, batch: MicroBatch, *, step: int, entropy_learns: bool = False) -> TokenScores:
        """Score the micro-batch's N tokens, differentiably; the step seeds the dropout, if any."""
        for dropout in self.dropouts:
            dropout.step = step
        if self.blocks_due:
            self._copy_into_blocks()
        return self._score(self.model, batch, entropy_learns)

    def _copy_into_blocks(self) -> None:
        """Copy frozen weights into oneDNN's blocks, once: not before the first pass, so that rollouts need not wait."""
        self.blocks_due = False
        if onednn.gains_by_blocks(self.model.dtype, self.device.type):
            block_base_weights(self.model)
            onednn.keep_blocks_both_ways(filter(onednn.can_block, [self.model.get_output_embeddings()]))

    @torch.no_grad()
    def reference(self, batch: MicroBatch) -> Tensor:
        """Return logprobs_N under the model that training began with; dropout off.

        That is the frozen copy, the base under its warm adapter, or the base with its adapter off. A copy on another
        device computes there; only the N numbers are moved.
        """
        if self.frozen_copy is not None:
            return to_device(self._score(self.frozen_copy, batch).logprobs_N, self.device)
        if self.starting_adapter is not None:
            with self._dropout_off(), self.other_adapter(self.starting_adapter):
                return self._score(self.model, batch).logprobs_N
        with self._dropout_off(), self.adapter_off():
            return self._score(self.model, batch).logprobs_N

    @torch.no_grad()
    def present(self, batch: MicroBatch, temperature: float | None = None) -> TokenScores:
        """Score the micro-batch's N tokens under the model as it is now; dropout off. `temperature`: None, its own."""
        with self._dropout_off():
            return self._score(self.model, batch, temperature=temperature)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Switch the adapter off inside the block."""
        if not self.is_lora:
            raise ModelError("this policy has no adapter to switch off: all its parameters are trained")
        with self.model.disable_adapter():
            yield

    @contextmanager
    def sampling_mode(self) -> Iterator[None]:
        """Prepare the model for transformers' own generate inside the block: dropout off, plain attention."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self.plain_attention():
                yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """Use plain attention, one text a row, inside the block, with the adapter's dropout off."""
        if self.shares_prompts:
            self._set_attention(self.backend.plain)
        try:
            with self._dropout_off():
                yield
        finally:
            if self.shares_prompts:
                self._set_attention(shared_prompt.SHARED_PROMPT_ATTENTION)

    def _set_attention(self, name: str) -> None:
        """Set the decoder's attention implementation; a vision tower beside it keeps its own."""
        decoder_of(self.model).set_attn_implementation(name)  # type: ignore[operator]

    @contextmanager
    def other_adapter(self, tensors: list[Tensor]) -> Iterator[None]:
        """Put another adapter, as the tensors of `trainable`, into the place of this one inside the block.

        Storage is exchanged, not copied: what comes back is the same to the last bit, and a graph that still needs
        its backward pass finds its own tensors.
        """
        now = [parameter.data for parameter in self.trainable]
        for parameter, other in zip(self.trainable, tensors, strict=True):
            parameter.data = other
        try:
            yield
        finally:
            for parameter, data in zip(self.trainable, now, strict=True):
                parameter.data = data

    @contextmanager
    def _dropout_off(self) -> Iterator[None]:
        """Switch dropout off inside the block only: a later recomputing backward pass drops as before."""
        steps = [dropout.step for dropout in self.dropouts]
        for dropout in self.dropouts:
            dropout.step = None
        try:
            yield
        finally:
            for dropout, step in zip(self.dropouts, steps, strict=True):
                dropout.step = step

    def _score(
        self, model: nn.Module, batch: MicroBatch, entropy_learns: bool = False, temperature: float | None = None
    ) -> TokenScores:
        at = self.temperature if temperature is None else temperature
        return TokenScores(*run_gathered(model, lambda: self._pass_through(model, batch, entropy_learns, at)))

    def _pass_through(
        self, model: nn.Module, batch: MicroBatch, entropy_learns: bool, temperature: float
    ) -> tuple[Tensor, Tensor]:
        head = OutputHead.of(model, temperature)
        labels_N = to_device(torch.tensor(batch.labels), device_of(model))
        hidden_ND = self._shared_hidden(model, batch) if self.shares_prompts else self._padded_hidden(model, batch)
        on_gpu = hidden_ND.device.type not in self.backend.segments_on
        return score_tokens(hidden_ND, labels_N, head, entropy_learns=entropy_learns, on_gpu=on_gpu)

    def _shared_hidden(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return hidden states of the N scored positions, the last of one packed row."""
        device = device_of(model)
        layout = batch.layout(once=self.reads_beginnings_once)
        ids_T, positions_T = to_device(torch.tensor(batch.input_row(layout.common)), device)
        if self.dropouts:
            self._name_tokens(batch.token_names(layout.common)[None])
        hidden_1TD = decoder_of(model)(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            layout=layout,
            backend=self.backend,
        ).last_hidden_state
        return hidden_1TD[0, layout.shared_tokens :]

    def _padded_hidden(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return hidden states of the N scored positions, from one row per completion, padded on the right."""
        pairs = [(group, i) for group in batch.groups for i in range(len(group.siblings))]
        starts = torch.tensor([len(group.prompt_ids) - 1 for group, _ in pairs])[:, None]
        stops = starts + torch.tensor([group.lengths[i] for group, i in pairs])[:, None]
        longest = int(stops.max())
        position_T = torch.arange(longest)
        rows = [group.prompt_ids + group.completions[i][:-1] for group, i in pairs]
        ids_BT = torch.tensor([(*row, *[0] * (longest - len(row))) for row in rows])
        group_B1 = torch.tensor([group.index for group, _ in pairs])[:, None]
        sibling_B1 = torch.tensor([group.siblings[i] for group, i in pairs])[:, None]
        sibling_BT = torch.where(position_T < starts, -1, sibling_B1)
        if self.dropouts:
            group_BT = torch.where(position_T < batch.common, -1, group_B1)
            self._name_tokens(torch.stack([group_BT, sibling_BT, position_T.expand_as(ids_BT)], -1))
        device = device_of(model)
        hidden_BTD = decoder_of(model)(
            input_ids=to_device(ids_BT, device),
            attention_mask=to_device((position_T < stops).long(), device),
            use_cache=False,
        ).last_hidden_state
        scored = ((position_T >= starts) & (position_T < stops)).flatten().nonzero().flatten()
        return hidden_BTD.flatten(0, 1).index_select(0, to_device(scored, device))

    def _name_tokens(self, names: Tensor) -> None:
        """Give every dropout the keys of the next pass's tokens, made from their names [..., 3]."""
        names = to_device(names, self.device)
        keys = mix(mix(mix(names[..., 0] + name_key(self.seed, "dropout")) + names[..., 1]) + names[..., 2])
        for dropout in self.dropouts:
            dropout.token_keys = keys

    def save(self, folder: Path) -> None:
        """Save the adapter in PEFT's format, or the whole model where all of it is trained, with the tokenizer."""
        if self.is_lora:
            save_adapter(self.model, folder)
        elif self._united is not None:
            self.model.save_pretrained(folder, state_dict=self._united)
        else:
            assert not self.is_sharded, "what is sharded is united before it is saved"
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def begin_with(self, folder: Path, *, keep_reference: bool) -> None:
        """Load a warm adapter to begin training with; `keep_reference`: it stays the reference, whatever is restored.

        A copy costs the memory of the adapter once more, so it is only kept where a KL term needs it.
        """
        self.restore(folder)
        if keep_reference:
            self.starting_adapter = [parameter.detach().clone() for parameter in self.trainable]

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote, or the weights of a sharded checkpoint, bit for bit."""
        if self.is_lora:
            load_adapter(self.model, folder)
        elif (folder / SHARDS).is_dir():
            weights = {WEIGHT + name: weight.detach() for name, weight in self.parameters_by_name().items()}
            read_shards(folder / SHARDS, weights)
        else:
            with no_progress_bars():
                saved = self._architecture.from_pretrained(folder, dtype=self.dtype)
            self._copy_weights(saved)
        release_module(self.model)

    @torch.no_grad()
    def _copy_weights(self, saved: nn.Module) -> None:
        if self.shards is None:
            self.model.load_state_dict(saved.state_dict())
            return
        for name, weight in saved.named_parameters():
            self.shards[name].copy_(slice_like(self.shards[name], weight))


def decoder_of(model: Any) -> nn.Module:
    """Return the part below the output head: hidden states, no logits. Adapters inside it stay active."""
    below_head: nn.Module = own_model(model).get_decoder()
    return below_head


def _layers_of(model: Any) -> list[nn.Module]:
    return list(decoder_of(model).layers)  # type: ignore[arg-type]


def make_all_trainable(model: Any) -> None:
    """Make everything trainable that text passes through; a vision tower beside it stays frozen."""
    decoder_of(model).requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def open_policy(recipe: Recipe, report: Report = no_report) -> Policy:
    """Open the recipe's model, ready to train: with a fresh adapter, or with every parameter trainable."""
    check_full_training(recipe)
    policy = _open_without_adapter(recipe.model.path, recipe, report, trained=True)
    if recipe.train.full:
        _prepare_full_training(policy, recipe)
    else:
        policy.model.requires_grad_(False)
        policy.model, policy.dropouts = add_lora(policy.model, recipe.lora, seed=recipe.seed)
    if recipe.model.checkpointing == "on":
        recompute_activations(policy.model)
    return policy


def open_trained(path: str, recipe: Recipe) -> Policy:
    """Open a finished model: a folder, a Hub id, or an adapter folder (its base is read from it)."""
    folder = user_path(path)
    base = adapter_base(folder)
    if base is None:
        return _open_without_adapter(path, recipe)
    try:
        policy = _open_without_adapter(base, recipe)
    except MinigrpoError as fault:
        raise ModelError(f"{fault} It is the base that {folder / 'adapter_config.json'} names.") from fault
    policy.model = attach_adapter(policy.model, folder)
    return policy


def _open_without_adapter(path: str, recipe: Recipe, report: Report = no_report, *, trained: bool = False) -> Policy:
    """Open any model as a policy without an adapter, with the recipe's dtype, head and chat template."""
    device = pick_device(recipe.model.device)
    loaded = open_model(
        path,
        revision=recipe.model.revision,
        dtype=recipe.model.dtype,
        device=device,
        seed=recipe.seed,
        full=recipe.train.full,
        template=recipe.model.template,
        four_bit=recipe.model.quantize == "nf4",
        trained=trained,
        report=report,
    )
    if recipe.model.head_float32 and loaded.model.dtype != torch.float32:
        loaded.model.set_output_embeddings(Float32Head.of(loaded.model.get_output_embeddings()))
    return Policy(loaded, temperature=recipe.rollout.temperature, seed=recipe.seed)


def check_full_training(recipe: Recipe) -> None:
    """Raise ModelError where every parameter shall be trained, in a number type that is too coarse for it."""
    if recipe.train.full and TORCH_DTYPES.get(recipe.model.dtype, torch.float32) != torch.float32:
        raise ModelError(
            f"train.full needs float32 weights, and model.dtype is {recipe.model.dtype}: 16-bit weights round away "
            "updates as small as training makes them. Leave it at --model.dtype auto, or train an adapter: "
            "--train.full false"
        )


def _prepare_full_training(policy: Policy, recipe: Recipe) -> None:
    if recipe.objective.kl > 0:
        policy.frozen_copy = _frozen_copy(policy, _reference_device(policy, recipe.train))
    policy.model.requires_grad_(False)
    make_all_trainable(policy.model)


def _frozen_copy(policy: Policy, device: torch.device) -> nn.Module:
    """Copy the model on the device where the copy stays: a GPU without room for two never holds two."""
    policy.model.to(device)
    frozen = copy.deepcopy(policy.model).requires_grad_(False)
    policy.model.to(policy.device)
    return frozen


def _reference_device(policy: Policy, config: TrainConfig) -> torch.device:
    """Return the device of the frozen copy.

    "auto": the policy's, where gradients, Adam's two moments, the copy and as much again for a pass fit; else the CPU.
    """
    cpu = torch.device("cpu")
    # Ranks with more and with less room would answer "auto" differently, and a sharded copy is on all of them.
    may_shard = config.shard != "off" and Place.of(os.environ) is not None
    if config.reference != "auto" or policy.device.type != "cuda" or may_shard:
        return cpu if config.reference == "cpu" else policy.device
    free = free_memory(policy.device)
    weights = weight_bytes(policy.model)
    if config.memory is not None:
        free = min(free, int(config.memory * 1e9) - weights)
    return policy.device if free >= 5 * weights else cpu


def recompute_activations(model: Any) -> None:
    """Trade a third more time for activations of one layer at a time. transformers does so in training mode only."""
    # Its name until transformers 5.x, deprecated since.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
