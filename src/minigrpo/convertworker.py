"""Runs llama.cpp's own converter with its own gguf-py beside it. Started by path, so it imports nothing of the package.

    python -P convertworker.py LLAMA_CPP PRE_TOKENIZER FOLDER OUTTYPE FILE NAME

Two things of it are replaced. It knows pre-tokenizers by a hash of what they make of one text, and so refuses every
tokenizer that is not on its list, however plain; the name is found from the pattern itself before. And it asks for
sentencepiece even where there is no sentencepiece model.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any


def main(root: str, kind: str, folder: str, outtype: str, file: str, name: str) -> None:
    sys.path[:0] = [root, f"{root}/gguf-py"]
    base: Any = importlib.import_module("conversion.base")
    if kind:
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: kind
    if not (Path(folder) / "tokenizer.model").is_file():

        def absent(self: Any, *args: Any, **options: Any) -> None:
            raise FileNotFoundError("tokenizer.model")

        base.TextModel._set_vocab_sentencepiece = absent
    script = f"{root}/convert_hf_to_gguf.py"
    sys.argv = [script, folder, "--outtype", outtype, "--outfile", file, "--model-name", name]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
