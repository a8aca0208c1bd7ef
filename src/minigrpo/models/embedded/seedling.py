"""The embedded model: built from scratch on a CPU in about a minute, and an ordinary model folder afterwards.

A tokenizer is trained and a small decoder of a real architecture is initialised at random. It learns to add from
schoolbook texts and to answer from imperfect teachers (`wordproblem_demos`); a variant, the coder, learns to write
programs (`sudoku_demos`). The folder is kept in a cache; its name holds a hash of everything that shaped it. Only the
name `seedling` is special: whoever loads the folder finds an ordinary transformers model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from minigrpo.errors import ModelError
from minigrpo.models import sft
from minigrpo.models.chat_template import render
from minigrpo.models.embedded import program_bugs, program_phrases, sudoku_demos, sudoku_programs, wordproblem_demos
from minigrpo.models.embedded.program_phrases import find_phrases, remove_phrases
from minigrpo.models.sft import PassLimit, SftExample, SftSchedule, train_sft
from minigrpo.runs.rundir import complete_folder
from minigrpo.tasks.builtin import sudoku, wordproblems
from minigrpo.tasks.common import answers, code_task
from minigrpo.types import Message, Prompt
from minigrpo.ui.progress import Report, no_report
from minigrpo.utils.cache_dir import cache_dir
from minigrpo.utils.process import no_progress_bars

ARCHITECTURES = ("llama", "qwen2", "qwen3", "ministral3")
_DEFAULT_ARCHITECTURE = "qwen3"
CODER_PATH = "seedling:coder"
_CONTEXT_TOKENS = 1024
_THREADS = 1  # fixed, because the split of work changes the last digits; two are slow where cores are busy

_PAD_TOKEN, _TURN_TOKEN, _END_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Small batches and many steps: addition is learned suddenly, after a number of steps rather than an amount of data.
_SCHOOL_SCHEDULE = SftSchedule(steps=1000, rows=16, lr=3e-3, target_loss=0.02)
_IMITATION_SCHEDULE = SftSchedule(steps=450, rows=16, lr=1.5e-3)
_PROGRAMS_SCHEDULE = SftSchedule(steps=400, rows=16, lr=3e-3)
_UNREADABLE_ONE_IN = 32  # one lesson in 32
_PASS_LIMITS = PassLimit(
    tokens=16 * 160, logits=16 * 160
)  # a long lesson is a pass of its own, or it would pad the others


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Everything that shapes an embedded model, except the code."""

    architecture: str = _DEFAULT_ARCHITECTURE
    seed: int = 0
    hidden: int = 128
    layers: int = 3
    heads: int = 8  # with four heads sums are learned much later, or never without Qwen3's norms
    kv_heads: int = 4
    inner: int = 384
    vocabulary: int = 512  # at most; the tags come on top
    school: SftSchedule = _SCHOOL_SCHEDULE
    imitation: SftSchedule = _IMITATION_SCHEDULE
    learns: Literal["word problems", "programs"] = "word problems"

    @property
    def name(self) -> str:
        return "coder" if self.learns == "programs" else self.architecture


def is_seedling(path: str) -> bool:
    return path.partition(":")[0] == "seedling"


def resolve_seedling(path: str, seed: int, report: Report = no_report) -> Path:
    """Return the folder of `seedling`, `seedling:ARCHITECTURE` or `seedling:coder`; build it unless it is in
    the cache.
    """
    return build_cached(parse_blueprint(path, seed), report)


def parse_blueprint(path: str, seed: int) -> Blueprint:
    if path == CODER_PATH:
        return _make_coder_blueprint(seed)
    architecture = path.partition(":")[2] if ":" in path else _DEFAULT_ARCHITECTURE
    if architecture not in ARCHITECTURES:
        known = ", ".join(f"seedling:{name}" for name in ARCHITECTURES)
        raise ModelError(
            f"model.path {path!r} names no architecture that the embedded model can have. Use one of: {known}; or "
            f"{CODER_PATH}, which writes programs."
        )
    return Blueprint(architecture=architecture, seed=seed)


def _make_coder_blueprint(seed: int) -> Blueprint:
    """Return the coder's blueprint: programs in place of arithmetic lessons, and room for all of their words, so that
    none is spelled with the letters that are names.
    """
    return Blueprint(
        seed=seed,
        vocabulary=576,
        school=SftSchedule(steps=0, rows=1, lr=0.0),
        imitation=_PROGRAMS_SCHEDULE,
        learns="programs",
    )


def make_config_and_tokenizer(path: str, seed: int) -> tuple[Any, Any]:
    """Return (config, tokenizer) of the embedded model within seconds, whether it is built yet or not."""
    blueprint = parse_blueprint(path, seed)
    tokenizer = train_tokenizer(blueprint)
    with torch.device("meta"):
        return init_model(blueprint, tokenizer).config, tokenizer


def build_cached(blueprint: Blueprint, report: Report = no_report) -> Path:
    folder = cache_dir() / f"seedling-{blueprint.name}-{blueprint.seed}-{fingerprint(blueprint)}"
    if not folder.is_dir():
        with complete_folder(folder) as draft:
            build_seedling(blueprint, draft, report)
    return folder


def fingerprint(blueprint: Blueprint) -> str:
    """Return a hash of the blueprint, the code that reads it, and the versions of libraries that affect the files."""
    import tokenizers
    import transformers

    total = hashlib.sha256(json.dumps(asdict(blueprint), sort_keys=True).encode())
    for module in _SOURCES[blueprint.learns]:
        total.update(Path(str(module.__file__)).read_bytes())
    total.update(Path(__file__).read_bytes())
    total.update(f"{torch.__version__} {transformers.__version__} {tokenizers.__version__}".encode())
    return total.hexdigest()[:12]


_SOURCES: dict[str, tuple[ModuleType, ...]] = {
    "word problems": (wordproblem_demos, wordproblems, answers, sft),
    "programs": (sudoku_demos, sudoku_programs, program_bugs, program_phrases, code_task, sudoku, sft),
}


def build_seedling(blueprint: Blueprint, folder: Path, report: Report = no_report) -> None:
    """Fill the folder with tokenizer, weights and configurations. The same blueprint gives the same files."""

    before, total = blueprint.school.steps, blueprint.school.steps + blueprint.imitation.steps
    report(0, total, "training a tokenizer")
    tokenizer = train_tokenizer(blueprint)
    school, shown = _school_lessons(tokenizer, blueprint), _demonstration_lessons(tokenizer, blueprint)

    def report_school(done: int, loss: float) -> None:
        report(done, total, f"learning sums, loss {loss:.2f}")

    def report_imitation(done: int, loss: float) -> None:
        report(before + done, total, f"imitating imperfect answers, loss {loss:.2f}")

    with _fixed_randomness(blueprint.seed):
        model = init_model(blueprint, tokenizer)
        if school:
            train_sft(model, school, blueprint.school, seed=blueprint.seed, report=report_school)
        train_sft(model, shown, blueprint.imitation, seed=blueprint.seed, limit=_PASS_LIMITS, report=report_imitation)
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _fixed_randomness(seed: int) -> Iterator[None]:
    """Use a separate random stream and a fixed number of threads inside; restore both afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(_THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train_tokenizer(blueprint: Blueprint) -> Any:
    """Train a byte-level BPE tokenizer that splits texts as SmolLM's does, which llama.cpp knows: each digit is one
    token.

    The tags of word problems are one token each, and so are the phrases of programs, which may hold spaces and
    brackets, but no names of variables.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [_PAD_TOKEN, _TURN_TOKEN, _END_TOKEN]
    pairs = _demonstration_pairs(blueprint, 2000)
    texts = [text for messages, answer in pairs for text in (*(message["content"] for message in messages), answer)]
    phrases = find_phrases([answer for _, answer in pairs], special) if blueprint.learns == "programs" else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=blueprint.vocabulary - len(phrases),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(remove_phrases(["system\nuser\nassistant\n", *texts], phrases), trainer)
    # Not special: special tokens are dropped in decoding, and the grader would not find the tags.
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in phrases or answers.TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END_TOKEN,
        pad_token=_PAD_TOKEN,
        extra_special_tokens=[_TURN_TOKEN],
        model_max_length=_CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _demonstration_pairs(blueprint: Blueprint, size: int) -> list[tuple[tuple[Message, ...], str]]:
    """Return questions with the answers of imperfect teachers."""
    if blueprint.learns == "programs":
        return sudoku_demos.sudoku_demonstrations(blueprint.seed, size)
    return [(d.problem.messages, d.text) for d in wordproblem_demos.wordproblem_demonstrations(blueprint.seed, size)]


def _school_lessons(tokenizer: Any, blueprint: Blueprint) -> list[SftExample]:
    shown = wordproblem_demos.schoolbook_texts(blueprint.seed, blueprint.school.steps * blueprint.school.rows)
    if not shown:
        return []
    asked, worked = (
        tokenizer([f"{text}\n" for text in column], add_special_tokens=False)["input_ids"]
        for column in zip(*shown, strict=True)
    )
    return [SftExample(tuple(prompt), tuple(answer)) for prompt, answer in zip(asked, worked, strict=True)]


def _demonstration_lessons(tokenizer: Any, blueprint: Blueprint) -> list[SftExample]:
    size = blueprint.imitation.steps * blueprint.imitation.rows
    foreign = wordproblem_demos.unreadable_questions(
        blueprint.seed, 0 if blueprint.learns == "programs" else size // _UNREADABLE_ONE_IN
    )
    shown = [
        *_demonstration_pairs(blueprint, size - len(foreign)),
        *((wordproblems.question_messages(question), answer) for question, answer in foreign),
    ]
    return [
        SftExample(
            render(tokenizer, Prompt("", messages)).ids,
            (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id),
        )
        for messages, text in shown
    ]


def init_model(blueprint: Blueprint, tokenizer: Any) -> Any:
    """Return a model of the architecture with random weights, drawn from the global random stream."""
    from transformers import AutoConfig, AutoModelForCausalLM

    extra: dict[str, Any] = {}
    if blueprint.architecture == "ministral3":  # its attention reads these; a short context makes them matter
        extra["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": _CONTEXT_TOKENS // 4,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    config = AutoConfig.for_model(
        blueprint.architecture,
        vocab_size=len(tokenizer),
        hidden_size=blueprint.hidden,
        intermediate_size=blueprint.inner,
        num_hidden_layers=blueprint.layers,
        num_attention_heads=blueprint.heads,
        num_key_value_heads=blueprint.kv_heads,
        head_dim=blueprint.hidden // blueprint.heads,
        max_position_embeddings=_CONTEXT_TOKENS,
        initializer_range=blueprint.hidden**-0.5,  # the usual 0.02 suits thousands of channels; here it slows learning
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **extra,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
