"""An export in llama.cpp: converted by its own converter, and compared with our model in float64.

python -m lasptrain.convert.gguf EXPORT LLAMA_CPP [--out FILE]      LLAMA_CPP: a checkout of ggml-org/llama.cpp

The checkout need not be built: the model runs in the package llama-cpp-python. Without that the file is written, and
that nothing was compared is said.

A sentencepiece tokenizer is written by the converter's own code for such, and with what its model says of spaces at the
beginning of a text: alone, the converter demands a byte-level BPE tokenizer that it knows of some classes, and writes
nothing of spaces.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_tools.fast_tokenizer import protocol
from data_tools.tokenizer import load_tokenizer
from lasptrain.convert import restore, targets, tokenizer, verify
from lasptrain.convert.libraries.servers import LLAMA_CPP
from lasptrain.errors import ConvertError, LaspError

CONVERTER, PACKAGE = "convert_hf_to_gguf.py", "llama-cpp-python"
PIECES, GREEDY, LINES = (70, 1, 29), 24, 300  # tokens read at once, then chosen one by one; lines for the tokenizer
BEGINS = {"tokenizer.ggml.add_bos_token": True}  # a prompt, as documents do; tokenizers of others may not say so
FP32 = 0  # GGML_TYPE_F32
SENTENCEPIECE = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
from conversion.base import TextModel
theirs = TextModel._set_vocab_sentencepiece

def write(self, *_):
    theirs(self)
    self.gguf_writer.add_add_space_prefix(%r)

TextModel._set_vocab_sentencepiece = TextModel._set_vocab_gpt2 = write
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Comparison(NamedTuple):
    """The largest error of logits, in pieces and one by one; how many of GREEDY tokens and of LINES lines are equal."""

    scale: float
    error: float
    greedy: int
    lines: int

    def __str__(self) -> str:
        return (
            f"largest error of logits up to {self.scale:.1f}: {self.error:.1e}; "
            f"{self.greedy} of {GREEDY} greedy tokens equal; {self.lines} of {LINES} lines have the same ids"
        )

    @property
    def equal(self) -> bool:
        """True within tolerance."""
        within = self.error <= verify.TOLERANCE * max(1.0, self.scale)
        return within and (self.greedy, self.lines) == (GREEDY, LINES)


def convert(export: Path, checkout: Path, out: Path, flags: Sequence[str] = ()) -> None:
    """Write the export as the fp32 file `out` by the converter of a checkout. ConvertError with its last line."""
    converter = checkout / CONVERTER
    if not converter.is_file():
        raise ConvertError(f"{checkout}: holds no {CONVERTER}; expected a checkout of ggml-org/llama.cpp")
    pieces = export / "tokenizer.model"
    prefix = pieces.is_file() and protocol.ModelProto.FromString(pieces.read_bytes()).normalizer_spec.add_dummy_prefix
    stub = ["-c", SENTENCEPIECE % prefix] if pieces.is_file() else []
    command = [sys.executable, *stub, str(converter), str(export), "--outtype", "f32", "--outfile", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConvertError(f"{converter}: cannot convert {export}: {reason}")


@torch.no_grad()
def compare(export: Path, weights: restore.Weights, file: Path) -> Comparison:
    """Compare `file` in llama-cpp-python with the weights of the export that it was made of, in float64."""
    from llama_cpp import Llama

    ours = verify.logits_of(weights.origin.model, weights.origin.window, weights.empty.state_dict(), weights.read)
    length = sum(PIECES)
    theirs = Llama(
        str(file),
        kv_overrides=BEGINS,
        n_ctx=length + GREEDY,
        logits_all=True,
        type_k=FP32,
        type_v=FP32,
        verbose=False,
    )
    rows = len(weights.empty.embed.weight)
    text = torch.randint(rows, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    for piece in torch.tensor(text).split(list(PIECES)):
        theirs.eval(piece.tolist())
    for _ in range(GREEDY):
        text.append(int(_logits(theirs)[-1].argmax()))
        theirs.eval(text[-1:])
    want, got = ours(torch.tensor([text]))[0], _logits(theirs)
    chosen = want[length - 1 : -1].argmax(-1).tolist()
    same = [one == other for one, other in zip(text[length:], chosen, strict=True)]
    equal = GREEDY if all(same) else same.index(False)
    return Comparison(float(want.abs().max()), float((got - want).abs().max()), equal, _equal_lines(export, theirs))


def _logits(model: Any) -> Tensor:
    return torch.from_numpy(model.scores[: model.n_tokens]).double()


def _equal_lines(export: Path, model: Any) -> int:
    """Return how many lines that are hard to tokenize have the same ids in llama.cpp."""
    own = load_tokenizer(str(restore.tokenizer_of(export)))
    return sum(
        model.tokenize(line.encode(), add_bos=True, special=False) == [own.bos, *own.encode(line)]
        for line in tokenizer.lines(LINES)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert and compare; return the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m lasptrain.convert.gguf", description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--out", type=Path, help="keep the file")
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _run(given.export, given.llama_cpp, given.out or Path(folder, "model.gguf"))
    except LaspError as error:
        sys.stderr.write(f"{error}\n")
        return error.code


def _run(export: Path, checkout: Path, file: Path) -> int:
    weights = restore.open_weights(export)
    service = targets.served(weights.origin.model, str(restore.tokenizer_of(export)))[LLAMA_CPP]
    if isinstance(service, str):
        raise ConvertError(f"{export}: llama.cpp cannot take it: {service}")
    convert(export, checkout, file, service.flags)
    if not verify.installed("llama_cpp"):
        sys.stdout.write(f"converted; not compared: {PACKAGE} is not installed (pip install {PACKAGE})\n")
        return 0
    found = compare(export, weights, file)
    sys.stdout.write(f"{found}\n")
    return 0 if found.equal else ConvertError.code


if __name__ == "__main__":
    sys.exit(main())
