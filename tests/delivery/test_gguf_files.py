"""Parts of the GGUF export: the tokenizer in the file, llama.cpp as reference, the official converter, Ollama's
Modelfile."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.config.schema import Recipe
from minigrpo.delivery.gguf import converter, writer
from minigrpo.delivery.gguf.export import export
from minigrpo.delivery.gguf.llamacpp import LlamaCpp
from minigrpo.delivery.gguf.modelfile import find_template_parts, probe_conversations, render_modelfile
from minigrpo.delivery.gguf.pretokenizer import pretokenizer_name, token_faults
from minigrpo.delivery.gguf.quantize import BUILT_IN_FORMATS, BlockQuantizer, find_llama_quantize, quantise
from minigrpo.delivery.hub.contents import ollama_files
from minigrpo.errors import ArtifactError, MinigrpoError, ModelError
from minigrpo.models.chat_template import PROBE_QUESTION, render, render_text
from minigrpo.models.embedded import seedling
from minigrpo.rollouts.groups import prompts_of
from minigrpo.tasks.registry import open_task
from tests.helpers.delivered import FAMILIES, edit_json
from tests.helpers.exported import TAG, bpe_tokenizer, merged_run, model_folder
from tests.helpers.models import OWN_WORDS
from tests.helpers.served import gone
from tests.helpers.tiny import TEMPLATE, build_tokenizer

pytestmark = pytest.mark.extra("gguf")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Path]:
    """Return (folder, model, F32 file)."""
    folder = tmp_path_factory.mktemp("gguf") / "qwen"
    model = model_folder(folder, "qwen2")
    writer.write_gguf(folder, folder.with_name("qwen.gguf"), "F32", "qwen")
    return folder, model, folder.with_name("qwen.gguf")


def test_llama_cpp_continues_as_transformers_does(qwen: Any) -> None:
    _, model, file = qwen
    ids = list(range(10, 50))
    with LlamaCpp(file, context=64) as llama:
        said = llama.greedy(ids, 12)
        found_NV = llama.logprobs([*ids, *said], len(ids) - 1)
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 40:]
    assert list(said) == theirs.tolist()
    assert found_NV.shape == (len(said) + 1, model.config.vocab_size)
    assert tuple(found_NV.argmax(-1)[:-1].tolist()) == said


def test_llama_cpp_reports_in_a_sentence_what_it_cannot_do(qwen: Any, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(qwen[2].read_bytes()[:5000])
    for file in (tmp_path / "x.gguf", tmp_path / "nowhere.gguf"):
        with pytest.raises(ArtifactError, match=f"llama.cpp refuses .*{file.name}"):
            LlamaCpp(file, context=64)
    with LlamaCpp(qwen[2], context=64) as llama:
        with pytest.raises(ArtifactError, match="could not read 400 tokens"):
            llama.logprobs([5] * 400, 0)
        assert llama.logprobs([5] * 4, 0).shape[0] == 4  # it still works after a refusal
        llama._process.kill()
        llama._process.wait()  # so that its end of the pipe is certainly closed
        with pytest.raises(ArtifactError, match=r"llama\.cpp ended with code -9"):
            llama.greedy([5], 1)


def test_the_embedded_models_tokenizer_is_kept_to_the_last_id(tmp_path: Path) -> None:
    blueprint = seedling.Blueprint(hidden=32, layers=1, inner=64)
    tokenizer = seedling.train_tokenizer(blueprint)
    tokenizer.save_pretrained(tmp_path)
    seedling.init_model(blueprint, tokenizer).save_pretrained(tmp_path)
    assert pretokenizer_name(tmp_path) == "smollm"
    writer.write_gguf(tmp_path, tmp_path / "x.gguf", "F32", "x")
    task = open_task(Recipe())
    prompts = prompts_of(task, "test", 200)
    with LlamaCpp(tmp_path / "x.gguf", context=512) as llama:
        for prompt in prompts:
            text = render_text(tokenizer, prompt.messages, opened=True)
            assert llama.tokenize(text, special=True) == render(tokenizer, prompt).ids
            gold = task.gold(prompt) if task.gold else ""
            assert llama.tokenize(gold) == tuple(tokenizer(gold, add_special_tokens=False)["input_ids"])
        assert not list(token_faults(llama, tokenizer, [prompt.messages for prompt in prompts[:8]]))


def test_a_tag_that_is_a_token_is_one_in_the_file_and_no_control_token(qwen: Any) -> None:
    with LlamaCpp(qwen[2], context=64) as llama:
        (token,) = llama.tokenize(TAG)
        assert token not in llama.facts.ends
    assert bpe_tokenizer().convert_ids_to_tokens(token) == TAG


@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [
        (bpe_tokenizer(template=TEMPLATE.replace("assistant", "model")), "chat template in the file is not"),
        (bpe_tokenizer(bos=True), None),
        (bpe_tokenizer(r"\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]"), "Token .* of .* differs"),
    ],
)
def test_faults_of_tokens_and_template_are_named(qwen: Any, tokenizer: Any, told: str | None) -> None:
    with LlamaCpp(qwen[2], context=64) as llama:
        faults = list(token_faults(llama, tokenizer, [[PROBE_QUESTION]]))
    assert bool(faults) is (told is not None)
    if told:
        assert any(re.search(told, fault) for fault in faults)


def test_a_second_beginning_of_text_is_named(qwen: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen[0], tmp_path / "m")
    bpe_tokenizer(bos=True).save_pretrained(folder)
    writer.write_gguf(folder, tmp_path / "x.gguf", "F32", "x")
    with LlamaCpp(tmp_path / "x.gguf", context=64) as llama:
        assert llama.facts.adds_bos
        faults = list(token_faults(llama, bpe_tokenizer(), [[PROBE_QUESTION]]))
        begun = bpe_tokenizer(bos=True, template="{{ bos_token }}" + TEMPLATE)
        assert not [fault for fault in token_faults(llama, begun, [[PROBE_QUESTION]]) if "BOS" in fault]
    assert [fault for fault in faults if fault.startswith("Double or foreign BOS")]


def test_an_end_that_llama_cpp_would_not_stop_at_is_named(qwen: Any, tmp_path: Path) -> None:
    other = bpe_tokenizer()
    other.eos_token = "<|pad|>"
    with LlamaCpp(qwen[2], context=64) as llama:
        faults = " ".join(token_faults(llama, other, [[PROBE_QUESTION]]))
    assert "end-of-text token is 3 in the file and 0 in the tokenizer" in faults
    assert "would not stop" in faults


def test_tokenizers_without_an_equal_in_llama_cpp_are_refused(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no byte-level BPE with merges"):
        pretokenizer_name(tmp_path)
    bpe_tokenizer().save_pretrained(tmp_path)
    assert pretokenizer_name(tmp_path) == "qwen2"
    edit_json(tmp_path / "tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(ModelError, match="changes text first \\(Lowercase\\)"):
        pretokenizer_name(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="missing or damaged"):
        pretokenizer_name(tmp_path)


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_the_quantizing_library_is_tested_before_it_is_used(kind: str) -> None:
    import numpy as np

    quantizer = BlockQuantizer({kind})
    quantizer._test(kind)
    quantizer._quantize_chunk = lambda *args: (
        args[2].value and claim_bytes_without_writing(args[2].value, args[4] * args[5])
    )
    with pytest.raises(MinigrpoError, match=r"made .* bytes|is off by"):
        quantizer._test(kind)
    assert np.isfinite(BlockQuantizer(set())(np.ones((1, 32), np.float32), "Q8_0")).all()


def claim_bytes_without_writing(place: int, numbers: int) -> int:
    return numbers


def test_formats_that_only_llama_cpps_tool_makes_are_told_so(qwen: Any, tmp_path: Path) -> None:
    with pytest.raises(MinigrpoError, match=r"llama-quantize makes IQ4_XS.*--llama-cpp DIR"):
        quantise(qwen[2], tmp_path / "x.gguf", "IQ4_XS", None)
    tool = tmp_path / "build" / "bin" / "llama-quantize"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho no such type >&2\nexit 3\n")
    tool.chmod(0o755)
    with pytest.raises(ArtifactError, match="failed on IQ4_XS with code 3: no such type"):
        quantise(qwen[2], tmp_path / "x.gguf", "IQ4_XS", tmp_path)


def test_ollamas_template_says_what_the_chat_template_says(qwen: Any) -> None:
    tokenizer = bpe_tokenizer()
    turns = find_template_parts(tokenizer)
    assert turns is not None
    for messages in probe_conversations():
        assert turns.render(messages) == render_text(tokenizer, messages, opened=True)
    text = render_modelfile("x-Q8_0.gguf", qwen[0], tokenizer, 0.7)
    assert text.startswith("FROM ./x-Q8_0.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    sampling = ("temperature 0.7", "top_k 0", "top_p 1", "min_p 0", "repeat_penalty 1")
    assert text.endswith("".join(f"PARAMETER {each}\n" for each in sampling))
    assert 'eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>' in text


def test_ollama_gets_the_system_message_of_training_or_else_the_templates_own(qwen: Any) -> None:
    text = render_modelfile("x.gguf", qwen[0], bpe_tokenizer(), 1.0, "Think first.\nThen answer.")
    assert 'SYSTEM """Think first.\nThen answer."""\n' in text
    assert ollama_files(text)["system"] == "Think first.\nThen answer."
    params = json.loads(ollama_files(text)["params"])
    assert params == {"stop": ["<|im_end|>"], "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1}
    assert "range .Messages" in ollama_files(text)["template"]
    helpful = render_modelfile("x.gguf", qwen[0], bpe_tokenizer(template=OWN_WORDS), 1.0)
    assert 'SYSTEM """You are small."""\n' in helpful
    assert "SYSTEM" not in render_modelfile("x.gguf", qwen[0], bpe_tokenizer(), 1.0)


def test_a_template_that_reads_the_clock_freezes_no_date(qwen: Any) -> None:
    dated = OWN_WORDS.replace("You are small.", "Today is {{ strftime_now('%d %b %Y') }}.")
    text = render_modelfile("x.gguf", qwen[0], bpe_tokenizer(template=dated), 1.0)
    assert "SYSTEM" not in text
    assert "Today" not in text


def test_a_date_beside_every_system_message_is_frozen_neither(qwen: Any) -> None:
    dated = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + TEMPLATE
    tokenizer = bpe_tokenizer(template=dated)
    for system in (None, "Think first."):
        text = render_modelfile("x.gguf", qwen[0], tokenizer, 1.0, system)
        assert "Today" not in text
        assert "TEMPLATE" not in text
        assert ("SYSTEM" in text) == (system is not None)
    fixed = bpe_tokenizer(template=dated.replace("strftime_now('%d %b %Y')", "'1 May 2026'"))
    assert "TEMPLATE" in render_modelfile("x.gguf", qwen[0], fixed, 1.0)


def test_a_template_that_ollama_cannot_say_is_left_out_with_a_remark(qwen: Any) -> None:
    tokenizer = bpe_tokenizer(template="{% if messages|length > 3 %}long{% endif %}" + OWN_WORDS)
    text = render_modelfile("x.gguf", qwen[0], tokenizer, 1.0)
    assert "TEMPLATE" not in text
    assert "cannot be said in Ollama's language" in text


def test_a_converter_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGRPO_CACHE", str(tmp_path))
    with pytest.raises(ArtifactError, match="not in the cache, and this session is offline"):
        converter.fetch_converter()
    folder = tmp_path / "m"
    model_folder(folder, "qwen2")
    assert "own writer" in converter.find_converter(folder, None).name
    with pytest.raises(ModelError, match="offline"):
        converter.find_converter(folder, None, "official")


@pytest.fixture(scope="module")
def official() -> Path:
    """Return the official converter, from the cache of whoever runs the tests, or downloaded."""
    kept = {name: os.environ.pop(name, None) for name in converter.OFFLINE_VARIABLES}
    try:
        return converter.fetch_converter()
    finally:
        os.environ.update({name: value for name, value in kept.items() if value is not None})


@pytest.mark.long
@pytest.mark.network
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_our_writer_and_llama_cpps_converter_make_the_same_file(
    tmp_path: Path, official: Path, family: str, kind: str
) -> None:
    run = merged_run(tmp_path / "mine", family, tied=family in ("qwen2", "ministral3"))
    files = {}
    for name, root in (("ours", None), ("theirs", official)):
        files[name] = tmp_path / f"{name}.gguf"
        converter.Converter(root).convert(run.merged, files[name], kind, "mine")
    ours, theirs = (contents(file) for file in files.values())
    assert ours[1] == theirs[1]
    assert ours[0] == theirs[0]


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (keys, tensors as type and hash), without what the converter guesses about the model's family and
    author."""
    import gguf

    guessed = ("GGUF.", "general.size_label", "general.basename", "general.finetune", "general.version", "general.samp")
    keys = {name: value for name, value in writer.read_keys(file) if not name.startswith(guessed)}
    tensors = gguf.GGUFReader(file).tensors
    return keys, {
        t.name: (t.tensor_type.name, tuple(t.shape.tolist()), hashlib.sha256(t.data.tobytes()).hexdigest())
        for t in tensors
    }


@pytest.mark.long
@pytest.mark.needs("llama-quantize")
@pytest.mark.parametrize("width", [256, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_our_quantiser_and_llama_quantize_make_the_same_file(
    tmp_path: Path, family: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use nine layers, so that llama.cpp's rules for the first, the last and every third all apply."""
    tool = find_llama_quantize(None)
    assert tool is not None
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 9}
    run = merged_run(tmp_path / "mine", family, tied=family in ("qwen2", "ministral3"), **size)
    writer.write_gguf(run.merged, tmp_path / "x.gguf", "F32", "mine")
    monkeypatch.setenv("PATH", "")
    differing = []
    for kind in BUILT_IN_FORMATS:
        for name, tools in (("ours", None), ("theirs", tool.parent)):
            found = quantise(tmp_path / "x.gguf", tmp_path / f"{name}.gguf", kind, tools)
            assert found.by.startswith("llama-quantize") == (name == "theirs")
        if contents(tmp_path / "ours.gguf") != contents(tmp_path / "theirs.gguf"):
            differing.append(kind)
    assert not differing


@pytest.mark.long
@pytest.mark.network
def test_the_official_converter_passes_the_same_proof(tmp_path: Path, official: Path) -> None:
    run = merged_run(tmp_path / "mine", "ministral3")
    found = export(run, ["F32", "Q4_K_M"], llama_cpp=official, quiet=True)
    assert [file.verdict for file in found.files] == ["proved", "measured"]
    assert str(official) in found.converter


WRITES = "import pathlib, sys, time\npathlib.Path(sys.argv[5]).write_text(str(__import__('os').getpid()))\n"


def pretended(root: Path, script: str) -> Path:
    """Write a converter of our own, for faults that the real one rarely shows."""
    (root / "conversion").mkdir(parents=True)
    (root / "conversion" / "base.py").write_text("class TextModel: pass")
    (root / "convert_hf_to_gguf.py").write_text(script)
    return root


def test_a_converter_ends_with_the_export_that_is_killed(tmp_path: Path) -> None:
    """Otherwise it would go on writing beside the next one."""
    root, file = pretended(tmp_path / "llama.cpp", WRITES + "time.sleep(600)"), tmp_path / "x.gguf"
    code = (
        "import sys; from pathlib import Path; from minigrpo.delivery.gguf.converter import Converter\n"
        "Converter(Path(sys.argv[1])).convert(Path(sys.argv[2]), Path(sys.argv[3]), 'F16', 'x')"
    )
    with subprocess.Popen([sys.executable, "-c", code, root, tmp_path, file]) as parent:
        while not (file.exists() and file.read_text()):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
    assert gone([int(file.read_text())])


def test_a_converter_without_room_is_told_as_a_full_disk(tmp_path: Path) -> None:
    said = "OSError(28, 'No space left on device')"
    for fault in (said, "OSError('9 requested and 4 written')"):
        root = pretended(tmp_path / str(len(fault)), f"raise {fault}")
        with pytest.raises(OSError, match="No space left on device") as told:
            converter.Converter(root).convert(tmp_path, tmp_path / "x.gguf", "F16", "x")
        assert told.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            "raise NotImplementedError('Model FooForCausalLM is not supported')",
            "not know the architecture FooForCausalLM",
        ),
        ("raise ValueError(\"Can not map tensor 'x.y'\")", "no place for its tensor x.y"),
        ("import not_there_at_all", "needs the Python package not_there_at_all, which is not installed"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("raise RuntimeError('odd: ' + __file__)", r"not known here \(RuntimeError: odd: convert_hf_to_gguf.py\)"),
    ],
)
def test_why_a_converter_failed_is_told_in_our_words_without_its_paths(tmp_path: Path, script: str, told: str) -> None:
    root, folder = pretended(tmp_path / "llama.cpp", script), tmp_path / "m"
    model_folder(folder, "qwen2")
    with pytest.raises(
        ModelError, match=rf"m was not written as GGUF: .*{told}.*--llama-cpp DIR.*--writer own"
    ) as fault:
        converter.Converter(root).convert(folder, tmp_path / "x.gguf", "F16", "x")
    assert str(root) not in str(fault.value)
    edit_json(folder / "config.json", model_type="mamba")
    with pytest.raises(ModelError, match=r"--llama-cpp DIR$"):  # where ours would be refused, it is not advised
        converter.Converter(root).convert(folder, tmp_path / "x.gguf", "F16", "x")


def test_a_split_that_the_converter_does_not_know_either_is_told_as_ours_is(tmp_path: Path) -> None:
    said = f"raise NotImplementedError({converter.UNKNOWN_SPLIT!r})"
    root, folder = pretended(tmp_path / "llama.cpp", said), tmp_path / "m"
    model_folder(folder, "qwen2")
    bpe_tokenizer(r"\p{L}+|\p{N}+|.").save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"no pre-tokenizer that is known to cut as .*m/tokenizer.json does.*--llama-cpp"
    ):
        converter.Converter(root).convert(folder, tmp_path / "x.gguf", "F16", "x")


@pytest.mark.needs("file_size_limit")
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    model_folder(tmp_path / "m", "qwen2")
    code = (
        "import io, resource, signal, sys, tempfile; from pathlib import Path\n"
        "from minigrpo.cli.main import main\n"
        "tempfile.TemporaryFile = lambda **_: io.BytesIO()\n"  # the proof's own notes have another disk
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))\n"
        "main(['export', sys.argv[1], '--format', 'F16', '--format', 'F32', '--writer', 'own'])"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "Formats that are there are whole" in ended.stderr
    left = {file.name for file in (tmp_path / "m-gguf").iterdir()}
    assert left <= {"m-F16.gguf", "m-F16.Modelfile", "made.json"}
    assert "m-F16.gguf" in left
    assert json.loads((tmp_path / "m-gguf" / "made.json").read_text())["files"].keys() == {"m-F16.gguf"}
