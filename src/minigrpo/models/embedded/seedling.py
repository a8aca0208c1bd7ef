"""The embedded model: built from nothing on a CPU in about a minute, and from then on a model folder like any other.

A tokenizer is trained and a small decoder of a real architecture is drawn at random. It learns to add from a schoolbook
and to answer from imperfect teachers (`demonstrations`); its sibling, the coder, learns to write programs (`coder`).
The folder is kept in a cache; its name holds a hash of everything that shaped it. Only its name is special: whoever
loads the folder finds an ordinary transformers model.
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
from minigrpo.models import sft as imitation
from minigrpo.models.chat_template import render
from minigrpo.models.embedded import program_bugs, sudoku_demos, sudoku_programs, wordproblem_demos
from minigrpo.models.sft import PassLimit, SftExample, SftSchedule, train_sft
from minigrpo.runs.rundir import complete_folder
from minigrpo.tasks.builtin import sudoku, wordproblems
from minigrpo.tasks.common import answers, code_task
from minigrpo.types import Message, Prompt
from minigrpo.ui.progress import Report, no_report
from minigrpo.utils.cache_dir import cache_dir
from minigrpo.utils.process import no_progress_bars

ARCHITECTURES = ("llama", "qwen2", "qwen3", "ministral3")
DEFAULT_ARCHITECTURE = "qwen3"
CODER = "seedling:coder"
CONTEXT = 1024  # tokens
THREADS = 1  # a fixed number, for the split of work changes last digits; and two crawl where cores are busy

PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Small batches and many steps: a sum of digits is learned suddenly, after so many steps rather than so much data.
SCHOOL = SftSchedule(steps=1000, rows=16, lr=3e-3, target_loss=0.02)
IMITATION = SftSchedule(steps=450, rows=16, lr=1.5e-3)
PROGRAMS = SftSchedule(steps=400, rows=16, lr=3e-3)
UNREADABLE = 32  # one lesson in so many
ROOM = PassLimit(tokens=16 * 160, logits=16 * 160)  # a long lesson is a pass of its own: it would pad the others


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Everything that shapes a seedling, the code aside."""

    architecture: str = DEFAULT_ARCHITECTURE
    seed: int = 0
    hidden: int = 128
    layers: int = 3
    heads: int = 8  # four heads learn sums much later, or never without the norms of Qwen3
    kv_heads: int = 4
    inner: int = 384
    vocabulary: int = 512
    school: SftSchedule = SCHOOL
    imitation: SftSchedule = IMITATION
    learns: Literal["word problems", "programs"] = "word problems"

    @property
    def name(self) -> str:
        return "coder" if self.learns == "programs" else self.architecture


def is_seedling(path: str) -> bool:
    return path.partition(":")[0] == "seedling"


def resolve(path: str, seed: int, report: Report = no_report) -> Path:
    """The folder of `seedling`, `seedling:ARCHITECTURE` or `seedling:coder`, built unless it is in the cache."""
    return cached(blueprint_of(path, seed), report)


def blueprint_of(path: str, seed: int) -> Blueprint:
    if path == CODER:
        return coder_blueprint(seed)
    architecture = path.partition(":")[2] if ":" in path else DEFAULT_ARCHITECTURE
    if architecture not in ARCHITECTURES:
        known = ", ".join(f"seedling:{name}" for name in ARCHITECTURES)
        raise ModelError(
            f"model.path {path!r} names no architecture that the embedded model can have. Use one of: {known}; or "
            f"{CODER}, which writes programs."
        )
    return Blueprint(architecture=architecture, seed=seed)


def coder_blueprint(seed: int) -> Blueprint:
    """It needs no school, for it does not reckon; its words are whole pieces of programs, so it has more of them."""
    return Blueprint(
        seed=seed, vocabulary=768, school=SftSchedule(steps=0, rows=1, lr=0.0), imitation=PROGRAMS, learns="programs"
    )


def sketch(path: str, seed: int) -> tuple[Any, Any]:
    """(config, tokenizer) of the embedded model, whether it is built yet or not: seconds."""
    blueprint = blueprint_of(path, seed)
    tokenizer = train_tokenizer(blueprint)
    with torch.device("meta"):
        return decoder(blueprint, tokenizer).config, tokenizer


def cached(blueprint: Blueprint, report: Report = no_report) -> Path:
    folder = cache_dir() / f"seedling-{blueprint.name}-{blueprint.seed}-{fingerprint(blueprint)}"
    if not folder.is_dir():
        with complete_folder(folder) as draft:
            build(blueprint, draft, report)
    return folder


def fingerprint(blueprint: Blueprint) -> str:
    """Of the blueprint, of the code that reads it, and of the libraries whose arithmetic or file formats matter."""
    import tokenizers
    import transformers

    total = hashlib.sha256(json.dumps(asdict(blueprint), sort_keys=True).encode())
    for module in SOURCES[blueprint.learns]:
        total.update(Path(str(module.__file__)).read_bytes())
    total.update(Path(__file__).read_bytes())
    total.update(f"{torch.__version__} {transformers.__version__} {tokenizers.__version__}".encode())
    return total.hexdigest()[:12]


SOURCES: dict[str, tuple[ModuleType, ...]] = {
    "word problems": (wordproblem_demos, wordproblems, answers, imitation),
    "programs": (sudoku_demos, sudoku_programs, program_bugs, code_task, sudoku, imitation),
}


def build(blueprint: Blueprint, folder: Path, report: Report = no_report) -> None:
    """Fill the folder with tokenizer, weights and configurations. The same blueprint gives the same files."""

    before, total = blueprint.school.steps, blueprint.school.steps + blueprint.imitation.steps
    report(0, total, "training a tokenizer")
    tokenizer = train_tokenizer(blueprint)
    school, shown = school_lessons(tokenizer, blueprint), demonstration_lessons(tokenizer, blueprint)

    def at_school(done: int, loss: float) -> None:
        report(done, total, f"learning sums, loss {loss:.2f}")

    def imitating(done: int, loss: float) -> None:
        report(before + done, total, f"imitating imperfect answers, loss {loss:.2f}")

    with repeatable(blueprint.seed):
        model = decoder(blueprint, tokenizer)
        if school:
            train_sft(model, school, blueprint.school, seed=blueprint.seed, report=at_school)
        train_sft(model, shown, blueprint.imitation, seed=blueprint.seed, limit=ROOM, report=imitating)
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Own random numbers and a fixed number of threads inside; both as before afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train_tokenizer(blueprint: Blueprint) -> Any:
    """Byte-level BPE over the stories, each digit a token, each tag a token that decoding keeps; or over programs."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    programs = blueprint.learns == "programs"
    apart: Any = pre_tokenizers.Digits(individual_digits=True)
    if programs:  # its merges may cross blanks and brackets, but not names and the beginnings of lines
        apart = pre_tokenizers.Split(Regex(sudoku_demos.pattern()), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [apart, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not programs)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=blueprint.vocabulary,
        special_tokens=[PAD, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["system\nuser\nassistant\n", *sample_texts(blueprint)], trainer)
    if not programs:
        # Not special: a special token would vanish when the answer is decoded, and the grader would look in vain.
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in answers.TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[TURN],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def sample_texts(blueprint: Blueprint) -> list[str]:
    """Questions and answers from which the tokenizer learns what is frequent."""
    return [
        text
        for messages, answer in answered(blueprint, 2000)
        for text in (*(message["content"] for message in messages), answer)
    ]


def answered(blueprint: Blueprint, size: int) -> list[tuple[tuple[Message, ...], str]]:
    """Questions and what an imperfect teacher says."""
    if blueprint.learns == "programs":
        return sudoku_demos.demonstrations(blueprint.seed, size)
    return [(d.problem.messages, d.text) for d in wordproblem_demos.demonstrations(blueprint.seed, size)]


def school_lessons(tokenizer: Any, blueprint: Blueprint) -> list[SftExample]:
    shown = wordproblem_demos.schooling(blueprint.seed, blueprint.school.steps * blueprint.school.rows)
    if not shown:
        return []
    asked, worked = (
        tokenizer([f"{text}\n" for text in column], add_special_tokens=False)["input_ids"]
        for column in zip(*shown, strict=True)
    )
    return [SftExample(tuple(prompt), tuple(answer)) for prompt, answer in zip(asked, worked, strict=True)]


def demonstration_lessons(tokenizer: Any, blueprint: Blueprint) -> list[SftExample]:
    size = blueprint.imitation.steps * blueprint.imitation.rows
    foreign = wordproblem_demos.unreadable(blueprint.seed, 0 if blueprint.learns == "programs" else size // UNREADABLE)
    shown = [
        *answered(blueprint, size - len(foreign)),
        *((wordproblems.asked(question), answer) for question, answer in foreign),
    ]
    return [
        SftExample(
            render(tokenizer, Prompt("", messages)).ids,
            (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id),
        )
        for messages, text in shown
    ]


def decoder(blueprint: Blueprint, tokenizer: Any) -> Any:
    """A model of the architecture with random weights, drawn from the ambient random stream."""
    from transformers import AutoConfig, AutoModelForCausalLM

    extra: dict[str, Any] = {}
    if blueprint.architecture == "ministral3":  # its attention reads these; a short context keeps them at work
        extra["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": CONTEXT // 4,
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
        max_position_embeddings=CONTEXT,
        initializer_range=blueprint.hidden**-0.5,  # the usual 0.02 suits thousands of channels; here it learns late
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **extra,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
