"""A sentencepiece BPE model as the `tokenizer.json` of Hugging Face's tokenizers, which fast tokenizers read."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from lasptrain.errors import DataError

protocol: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # whose classes have no types

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces


def tokenizer_json(path: Path) -> str:
    """Convert a sentencepiece model to the text of a tokenizer.json that puts BOS before every text.

    Merges are every way to make a piece of two others, best piece first, which is the order in which sentencepiece
    joins. Raises DataError for a model that is not BPE, or that changes text before it cuts it.
    """
    model = protocol.ModelProto.FromString(path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise DataError(f"{path}: no BPE model; expected one, others do not convert with the same ids")
    if normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        raise DataError(f"{path}: changes text before it cuts it; expected none of that, it does not convert")
    pieces = [piece.piece for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    bos = trainer.bos_piece
    parsed: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, piece, special=kind == CONTROL)
            for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
            if kind in (CONTROL, USER)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos), _sequence("A", 0)],
            "pair": [_special(bos), _sequence("A", 0), _special(bos), _sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [pieces.index(bos)], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": trainer.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": trainer.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(pieces, kinds),
        },
    }
    return json.dumps(parsed, ensure_ascii=False)


def _merges(pieces: list[str], kinds: list[int]) -> list[list[str]]:
    ids = {piece: i for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)) if kind in (NORMAL, UNUSED)}
    return [
        [piece[:cut], piece[cut:]]
        for piece in sorted(ids, key=lambda piece: ids[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]


def _added(i: int, piece: str, special: bool) -> dict[str, Any]:
    strips = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": piece, "special": special, **strips}


def _special(piece: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": 0}}


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}
