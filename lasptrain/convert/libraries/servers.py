"""Programs that serve exports: commands that keep states, decays and steps in fp32, and what is in the way of all.

What is said of vLLM and SGLang was read in the sources of these releases, which did not run here; what is said of
llama.cpp was run in its release, by `lasptrain.convert.gguf`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lasptrain.convert.target import Service

VLLM, SGLANG, LLAMA_CPP = "vLLM", "SGLang", "llama.cpp"
SOURCES = {
    VLLM: "0.33.0, its source read and not run",
    SGLANG: "0.5.23, its source read and not run",
    LLAMA_CPP: "as in llama-cpp-python 0.3.36, run on a CPU with small models of random weights",
}
BYTES = "bytes"  # the tokenizer that has no file
PIECES = ".model"  # the end of a sentencepiece tokenizer's name

Reasons = Callable[[Any, str], Iterator[str]]


def nothing(model: Any, tokenizer: str) -> Iterator[str]:
    """Yield no reason: every model of the target is served."""
    return iter(())


def vllm(rounded: str, reasons: Reasons = nothing) -> Service:
    """vLLM; `rounded`: what it keeps in the model's dtype, whatever a file has."""

    def commands(folder: str, tokenizer: str) -> list[str]:
        return [f"vllm serve {folder} --dtype float32 --mamba-ssm-cache-dtype float32{_tokens(tokenizer)}"]

    return Service(VLLM, commands, reasons, f"Without `--dtype float32` {rounded}; states too without the other.")


def sglang(rounded: str, reasons: Reasons = nothing) -> Service:
    """SGLang; `rounded`: what it keeps in the model's dtype, whatever a file has."""

    def commands(folder: str, tokenizer: str) -> list[str]:
        start = f"SGLANG_MAMBA_CONV_DTYPE=float32 python -m sglang.launch_server --model-path {folder}"
        return [f"{start} --dtype float32 --mamba-ssm-dtype float32{_tokens(tokenizer)}"]

    remark = f"Without `--dtype float32` {rounded}, in fp16 if the file is fp32; the variable is for convolutions."
    return Service(SGLANG, commands, reasons, remark)


def _tokens(tokenizer: str) -> str:
    return " --skip-tokenizer-init" if tokenizer == BYTES else ""


def llama_cpp(reasons: Reasons, *, flags: str = "", pieces: bool = False) -> Service:
    """llama.cpp; `flags` of its converter, which takes sentencepiece models if `pieces`."""

    def commands(folder: str, tokenizer: str) -> list[str]:
        file = f"{Path(folder).name}.gguf"
        convert = f"python llama.cpp/convert_hf_to_gguf.py {folder} --outtype f32 --outfile {file}{flags}"
        serve = f"llama-server -m {file} --cache-type-k f32 --cache-type-v f32"
        if not tokenizer.endswith(PIECES):
            return [convert, f"{serve} --override-kv tokenizer.ggml.add_bos_token=bool:true"]
        if pieces:
            return [convert, f"{serve} --override-kv tokenizer.ggml.add_space_prefix=bool:false"]
        return [f"python -m lasptrain.convert.gguf {folder} llama.cpp --out {file}", serve]

    def refused(model: Any, tokenizer: str) -> Iterator[str]:
        yield from reasons(model, tokenizer)
        if tokenizer == BYTES:
            yield "it has no tokenizer of bytes"

    def proviso(tokenizer: str) -> str:
        return "" if tokenizer.endswith(PIECES) else "if its converter knows the tokenizer"

    remark = "States, decays and steps are fp32 whatever the file's type is; `llama.cpp` is a checkout."
    return Service(LLAMA_CPP, commands, refused, remark, tuple(flags.split()), proviso)


def unserved(server: str, reason: str) -> Service:
    """Return the service of a server that takes no model of a target."""
    return Service(server, lambda folder, tokenizer: [], lambda model, tokenizer: iter([reason]))
