"""Run llama.cpp's own converter with its own gguf-py. Started by path, so this file imports nothing of the package.

    python -P gguf/converter_worker.py LLAMA_CPP PRE_TOKENIZER FOLDER OUTTYPE FILE NAME

It ends when its standard input does, so that a killed export leaves no converter that goes on writing.

Three parts of the converter are replaced. It identifies pre-tokenizers by a hash of their output for one text, and so
refuses every tokenizer that is not on its list, however plain; here the name was found from the pattern before. It asks
for sentencepiece even where there is no sentencepiece model. And it uses an architecture's own tokenizer class, which
may add tokens.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import threading
from pathlib import Path
from typing import Any


def exit_with_parent() -> None:
    """Exit when standard input closes: a pipe that the parent holds open and never writes to."""

    def wait() -> None:
        os.read(0, 1)  # not through Python's stdin, whose lock would block the interpreter's exit
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _main(root: str, kind: str, folder: str, *words: str) -> None:
    sys.path[:0] = [root, f"{root}/gguf-py"]
    base: Any = importlib.import_module("conversion.base")
    if kind:
        # An architecture's own tokenizer class may add tokens beyond the model's vocabulary.
        transformers = importlib.import_module("transformers")
        setattr(transformers, "AutoTokenizer", transformers.PreTrainedTokenizerFast)  # noqa: B010 (a lazy module)
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: kind
    if not (Path(folder) / "tokenizer.model").is_file():

        def absent(self: Any, *args: Any, **options: Any) -> None:
            raise FileNotFoundError("tokenizer.model")

        base.TextModel._set_vocab_sentencepiece = absent
    outtype, file, name = words
    script = f"{root}/convert_hf_to_gguf.py"
    sys.argv = [script, folder, "--outtype", outtype, "--outfile", file, "--model-name", name]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    exit_with_parent()
    _main(*sys.argv[1:])
