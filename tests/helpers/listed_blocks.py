"""Code blocks of the pages that are not run, with the reason, and what holds them: tests/architecture/test_blocks.py.

A new block that is neither run nor listed here fails that test, and so does a row that no page needs any more.
"""

from __future__ import annotations

import re

NOT_RUN = {
    r"gsm8k-(?!tiny)|sudoku-(coder|ministral)|Qwen/|me/mine-lora|FOLDER": "a real model, gigabytes from the Hub",
    r"--nproc": "starts processes that load torch anew: tests/distributed trains with them",
    r"minigrpo view": "stays until it is stopped, and opens a browser: tests/view",
    r"device mps": "a Mac",
    r"--format FP8": "llm-compressor, in an environment of its own: tests/delivery, where MINIGRPO_COMPRESSOR names it",
    r"--engine vllm": "vLLM: tests/delivery serves with a stand-in, and with vLLM where MINIGRPO_VLLM names it",
    r"--track\.to": "the trackers, each an extra: tests/runs trains with those that are installed",
    r"--served": "asks a server that runs",
    r"~/llama\.cpp": "a clone of llama.cpp",
    r"--task\.name gsm8k": "GSM8K's data",
    r"run (gsm8k|sudoku)-tiny|preflight gsm8k-tiny": "minutes: tests/pipeline and the notebooks run these recipes",
}
"""Commands of minigrpo that are parsed only, by a part of their words, with the reason."""

LONG = re.compile(
    "|".join(
        (
            r"minigrpo quickstart|runs/first|preflight (my|mine)\.|train (my\.yaml --(lora|samples|task|warmup))",
            r"train (quickstart --task|runs/r16)|warmup my\.yaml --warmup\.steps 60$|plan .*quantize",
            r"launch (skypilot|ssh)",
            r"fork (?!.*(dry-run|--times 5))|inspect .*(entropy|json|--step 2)|audit (?!.*--steps 0)",
            r"replay .*(--group|--steps)|--attack$|evaluate \S+ --(split|recipe)|merge .*--dtype|export .*(F16|BF16)",
            r"verify \S+ --serve|watch .*[>-]|report .*--out|doctor --json",
        )
    )
)
"""Commands that run in `make prove`: each takes seconds, and another of its kind runs in `make test`."""

OTHER_TOOLS = {
    r"^make ": "a target of the Makefile: that it is there is tested",
    r"^python -m benchmarks": "minutes; tests/benchmarks runs them small. Module and options are looked up",
    r"^(compressor/bin/)?pip install |^python -m venv ": "the package index",
    r"^hf ": "the Hub",
    r"^(VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 )?vllm serve ": "vLLM",
    r"^tensorboard ": "a server of TensorBoard's; tests/runs reads what it is given",
    r"^torchrun ": "two machines; the command of minigrpo at its end is parsed",
    r"^export [A-Z_]+=": "a variable of the shell",
}
"""Commands of other programs, by their beginning, with what they need."""

PRINTED = {
    ("attack.md", "planted.py:anywhere"): "tests/evaluation attacks the same grader and finds the same ways",
    ("audit.md", "audit of runs/quickstart"): "printed by the quickstart's run; its words are the package's",
    ("audit.md", "quickstart-GGUF"): "as above, for what was published",
    ("fork.md", "task.weights.correct=0"): "the run that the page describes; its words are the package's",
    ("fork.md", "task.weights.decoy=0"): "as above",
    ("fork.md", "The unchanged twin from step 10"): "as above; tests/pipeline forks without a change",
    ("publish.md", "me/quickstart-run: 57 files"): "the quickstart's run; its words are the package's",
    ("replay.md", "done again                steps 51 to 63"): "the quickstart's run; its words are the package's",
    ("replay.md", "doing 99 steps again"): "as above",
    ("replay.md", "done again                steps 51 to 75"): "as above",
    ("replay.md", "done again                steps 51 to 55"): "as above, on two threads",
    ("replay.md", "what can be done again"): "as above",
    ("scale.md", "has not been heard of"): "tests/distributed stops a rank; its words are the package's",
}
"""What commands printed, by page and words of the block, with how it is known to be true. The figures are
measured; most of the letters must stand in the package's source, or the page shows what is not printed any more."""

KNOWN_WORDS = 0.5
"""Of the letters of printed text at least so many, half, stand in texts of the package: the rest are names, and answers
of models. Prose of these pages has 0.07 to 0.12."""

DRAWN = {
    ("CONTRIBUTING.md", "0  types.py"): "the floors: tests/architecture/test_layout.py holds the imports to them",
    ("delivery.md", "KL(merged || trained)"): "a formula: tests/delivery holds merges to it",
    ("objectives.md", "Σ_tokens"): "a formula: tests/algorithms compares each objective with it",
    ("vllm.md", "--hf-overrides"): "an option for the command above it: tests/rollouts holds it to what minigrpo sets",
}
"""Blocks that are neither code nor printed."""

MADE_PAGES = {"commands.md": "text", "python.md": "python"}
"""Pages that docs/generate.py writes, and the language of their blocks that show signatures: test_release.py compares
them with the code."""
