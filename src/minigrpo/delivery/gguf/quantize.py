"""Quantise a GGUF file: with llama.cpp's own tool where it is found, else with xllamacpp's library.

Which tensor gets which type follows llama.cpp's rule for dense models: more bits for the output, for values, and for
the first, last and every third of the layers' down projections. Rows that do not divide by 256 fall back to types with
blocks of 32.

Shapes: R rows of a tensor, W its width.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigrpo.delivery.gguf.llamacpp import find_library
from minigrpo.delivery.gguf.writer import report_full_disk
from minigrpo.errors import ArtifactError, MinigrpoError, install_hint

FLOAT_FORMATS = ("F32", "F16", "BF16")
BUILT_IN_FORMATS = {
    **{"Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q4_0": "Q4_0", "Q5_0": "Q5_0"},
    **{"Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K", "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q3_K_M": "Q3_K", "Q3_K_S": "Q3_K"},
}
"""Formats that can be made without llama-quantize -> the type of most of their tensors."""
TOOL_FORMATS = (
    "Q2_K",
    "Q2_K_S",
    "Q3_K_L",
    "Q4_1",
    "Q5_1",
    "IQ4_NL",
    "IQ4_XS",
    "IQ3_M",
    "IQ3_S",
    "IQ3_XS",
    "TQ1_0",
    "TQ2_0",
)
"""Formats that only llama-quantize makes."""
FORMATS = (*FLOAT_FORMATS, *BUILT_IN_FORMATS, *TOOL_FORMATS)
FALLBACK_TYPES = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
FILE_TYPES = {name: f"MOSTLY_{name}" for name in BUILT_IN_FORMATS}
BLOCK_SIZES = {"Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256}
MAX_QUANT_ERRORS = {
    "Q8_0": 0.008,
    "Q6_K": 0.03,
    "Q5_K": 0.05,
    "Q5_0": 0.06,
    "Q5_1": 0.06,
    "Q4_K": 0.1,
    "Q4_0": 0.12,
    "Q3_K": 0.2,
}
"""Largest relative error of a type on normal numbers, half as large again as observed: the self-test's limit."""
MAX_LAYERS = 80
"""Number of layers from which llama.cpp has further rules, which are not implemented here."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised file. `by`: the program. `bits`: a weight, over the whole file. `types`: number of tensors of each
    type."""

    by: str
    bits: float
    types: dict[str, int]


def quantise(source: Path, target: Path, kind: str, tools: Path | None) -> Quantised:
    """Quantise a file. `tools`: a folder of llama.cpp. Raises MinigrpoError where nothing here can make that format."""
    tool = find_llama_quantize(tools)
    if tool:
        _quantise_with_tool(tool, source, target, kind)
        by = f"llama-quantize ({tool})"
    elif kind in BUILT_IN_FORMATS:
        by = "gguf" if kind == "Q8_0" else "xllamacpp"
        _quantise_here(source, target, kind)
    else:
        raise MinigrpoError(
            f"Only llama.cpp's own llama-quantize makes {kind}. Build it and say where: --llama-cpp DIR"
        )
    return Quantised(by, *measure_file(target))


def find_llama_quantize(tools: Path | None) -> Path | None:
    """Find the llama-quantize program: in the folder given, or on the PATH; None where there is none."""
    places = [tools / part / "llama-quantize" for part in ("", "build/bin", "bin")] if tools else []
    packed = next((place for place in places if place.is_file()), None)
    other = shutil.which("llama-quantize")
    return packed or (Path(other) if other else None)


def _quantise_with_tool(tool: Path, source: Path, target: Path, kind: str) -> None:
    ended = subprocess.run([tool, source, target, kind], capture_output=True, text=True, errors="replace")
    if ended.returncode or not target.is_file():
        target.unlink(missing_ok=True)
        words = " ".join((ended.stderr or ended.stdout).split())[-300:]
        raise ArtifactError(f"{tool} failed on {kind} with code {ended.returncode}: {words}")


def measure_file(file: Path) -> tuple[float, dict[str, int]]:
    """Return (bits a weight, number of tensors of each type)."""
    import gguf

    tensors = gguf.GGUFReader(file).tensors
    types: dict[str, int] = {}
    for tensor in tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    count = sum(int(tensor.n_elements) for tensor in tensors)
    return 8 * sum(int(tensor.n_bytes) for tensor in tensors) / count, types


def choose_tensor_type(name: str, shape: tuple[int, ...], kind: str, *, layers: int, tied: bool) -> str | None:
    """Return the type that a tensor becomes; None where it stays. `shape`: its width last."""
    if len(shape) < 2 or not name.endswith("weight") or "_norm.weight" in name:
        return None
    default, width = BUILT_IN_FORMATS[kind], shape[-1]
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        chosen = "Q8_0" if default == "Q8_0" or width % BLOCK_SIZES.get(default, 32) else "Q6_K"
    else:
        chosen = _layer_tensor_type(name, kind, default, layers)
    if width % BLOCK_SIZES.get(chosen, 32):
        chosen = FALLBACK_TYPES.get(chosen, chosen)
    return "F16" if width % BLOCK_SIZES.get(chosen, 32) else chosen


def _layer_tensor_type(name: str, kind: str, default: str, layers: int) -> str:
    place = re.match(r"blk\.(\d+)\.(attn_v|ffn_down|attn_output)\.weight", name)
    if place is None:
        return default
    layer, part = int(place[1]), place[2]
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    early = layer < (4 if part == "attn_v" else layers // 8)
    if part == "attn_output":
        return "Q4_K" if kind == "Q3_K_M" else default
    if kind in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more else default
    if kind == "Q4_K_S":
        return "Q5_K" if early else default
    if kind == "Q3_K_M":
        first = layer < (2 if part == "attn_v" else layers // 16)
        return "Q5_K" if first else "Q4_K"
    return default


def _quantise_here(source: Path, target: Path, kind: str) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    layers, tied = _layers_and_tied(reader)
    if layers >= MAX_LAYERS:
        raise MinigrpoError(f"For {layers} layers llama.cpp has rules of its own. Use its tool: --llama-cpp DIR")
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch)
    try:
        _copy_keys(reader, writer, kind)
        kinds = {}
        for tensor in reader.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            new = choose_tensor_type(tensor.name, shape, kind, layers=layers, tied=tied) or tensor.tensor_type.name
            kinds[tensor.name] = new
            quant = gguf.GGMLQuantizationType[new]
            stored_shape = gguf.quants.quant_shape_to_byte_shape(shape, quant) if new not in ("F32", "F16") else shape
            size = math.prod(stored_shape) * {"F32": 4, "F16": 2}.get(new, 1)
            writer.add_tensor_info(tensor.name, stored_shape, _numpy_type(new), size, quant)
        quantise_block = BlockQuantizer(set(kinds.values()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with report_full_disk():
            for tensor in reader.tensors:
                same = kinds[tensor.name] == tensor.tensor_type.name
                values = tensor.data if same else quantise_block(_dequantise(tensor), kinds[tensor.name])
                writer.write_tensor_data(values)
    finally:
        writer.close()


def _layers_and_tied(reader: Any) -> tuple[int, bool]:
    arch = reader.fields["general.architecture"].contents()
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return int(reader.fields[f"{arch}.block_count"].contents()), tied


def _copy_keys(reader: Any, writer: Any, kind: str) -> None:
    import gguf

    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if name == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)


def _numpy_type(kind: str) -> Any:
    import numpy as np

    return np.dtype({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))


def _dequantise(tensor: Any) -> Any:
    import gguf

    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


class BlockQuantizer:
    """Quantizes [R, W] in float32 to the bytes of a type. Types that the `gguf` package cannot make are made by
    xllamacpp's library, after a self-test on numbers of ours."""

    def __init__(self, kinds: set[str]) -> None:
        needed = sorted(kind for kind in kinds if kind.endswith("_K"))
        self._quantize_chunk: Any = _load_quantize_chunk() if needed else None
        for kind in needed:
            self._test(kind)

    def __call__(self, values_RW: Any, kind: str) -> Any:
        import gguf
        import numpy as np

        quant = gguf.GGMLQuantizationType[kind]
        if not kind.endswith("_K"):
            return gguf.quants.quantize(values_RW, quant)
        values_RW = np.ascontiguousarray(values_RW, dtype=np.float32)
        shape = gguf.quants.quant_shape_to_byte_shape(values_RW.shape, quant)
        packed = np.zeros(shape, dtype=np.uint8)
        rows = values_RW.size // values_RW.shape[-1]
        pointers = values_RW.ctypes.data_as(ctypes.c_void_p), packed.ctypes.data_as(ctypes.c_void_p)
        size = self._quantize_chunk(int(quant), *pointers, 0, rows, values_RW.shape[-1], None)
        if size != packed.nbytes:
            raise MinigrpoError(
                f"xllamacpp's library made {size} bytes of {kind} where {packed.nbytes} are due. {TESTED_VERSION_HINT}"
            )
        return packed

    def _test(self, kind: str) -> None:
        import gguf
        import numpy as np

        values_RW = np.random.default_rng(0).standard_normal((4, 512), dtype=np.float32)
        back_RW = gguf.quants.dequantize(self(values_RW, kind), gguf.GGMLQuantizationType[kind])
        error = float(np.linalg.norm(back_RW - values_RW) / np.linalg.norm(values_RW))
        if not error < MAX_QUANT_ERRORS[kind] or np.any(
            self(np.zeros((1, 256), np.float32), kind).view(np.uint8)[..., -2:]
        ):
            raise MinigrpoError(
                f"xllamacpp's library fails its test: {kind} is off by {error:.0%}. {TESTED_VERSION_HINT}"
            )


TESTED_VERSION_HINT = f"Install the tested version: {install_hint('gguf')}"


def _load_quantize_chunk() -> Any:
    file = find_library()
    try:
        if file is None:
            raise OSError("it is not installed")
        function = ctypes.CDLL(str(file)).ggml_quantize_chunk
    except (OSError, AttributeError) as fault:
        raise MinigrpoError(
            f"K-quants need the library of xllamacpp ({fault}) or llama-quantize. {install_hint('gguf')}, or "
            "--llama-cpp DIR"
        ) from None
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function
