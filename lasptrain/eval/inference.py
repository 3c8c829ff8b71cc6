"""Inference is the training scan: a prompt is read in segments, spread over ranks; then tokens come one at a time.

Memory does not grow with the prompt: only each layer's final state is kept of it, at least fp32. Softmax layers that
see all are the exception: they keep keys and values, on every rank, in blocks that are joined as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.models.language_model import LanguageModel, on_meta
from lasptrain.models.mixer import State
from lasptrain.ops.cross_entropy import IGNORED
from lasptrain.parallel import place, prefix
from lasptrain.parallel.collectives import all_reduce_sum, broadcast
from lasptrain.parallel.mesh import Mesh
from lasptrain.parallel.place import Edge
from lasptrain.parallel.prefix import Prefix
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS

SCORED = 2048  # tokens of a batch whose logits exist at a time


class Snapshot(NamedTuple):
    """The model's state after the tokens read so far. Never written to, so any number of texts may continue from it."""

    carry: list[State]  # per layer; every tensor starts with B
    logits: Tensor  # fp32 [B, vocab] of the next token
    length: int  # tokens read

    def pick(self, rows: Sequence[int]) -> Snapshot:
        """Return the state of some texts, in this order; one may be there several times."""
        index = torch.tensor(rows, device=self.logits.device)
        carry = [tuple(_picked(part, index) for part in state) for state in self.carry]
        return Snapshot(carry, self.logits[index], self.length)


def join(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Join snapshots into one batch. States have one shape whatever was read, but for the prefix of a softmax layer."""
    sizes = [len(one.logits) for one in snapshots]
    carry = [
        tuple(_joined(parts, sizes, snapshots[0].logits.device) for parts in zip(*states, strict=True))
        for states in zip(*(one.carry for one in snapshots), strict=True)
    ]
    return Snapshot(carry, torch.cat([one.logits for one in snapshots]), max(one.length for one in snapshots))


def _picked(part: Any, index: Tensor) -> Any:
    """Return some rows of what a snapshot carries."""
    match part:
        case Tensor():
            return part[index]
        case Prefix() | Edge():
            return part.pick(index)
    return None


def _joined(parts: Sequence[Any], sizes: Sequence[int], device: torch.device) -> Any:
    """Return one of what snapshots carry for texts of `sizes` rows each, for all of them."""
    match parts[0]:
        case Tensor():
            return torch.cat(list(parts))
        case Prefix():
            return prefix.together(parts)
        case Edge():
            return place.together(parts, sizes, device)
    return None


class Reader:
    """Reads texts of any length with a model, together with the other ranks of the mesh's sp group.

    Args:
        model: whole on this rank; its weights are used where they are.
        mesh: its dp × sp ranks; every rank is given the same texts. None: this rank alone.
        segment: tokens that each rank processes at a time.
        scan: the scan that carries states across ranks.
        fuse: compile the model for whole segments, as `train.compile` does; it takes a minute the first time.
        told: called with tokens read and tokens to read at every segment of a text.
    """

    def __init__(
        self,
        model: LanguageModel,
        mesh: Mesh | None = None,
        segment: int = 8192,
        scan: str = "all_gather",
        fuse: bool = False,
        told: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.model, self.mesh, self.told = model, mesh, told
        self.sp, self.rank = (1, 0) if mesh is None else (mesh.length("sp"), mesh.rank("sp"))
        self.segment = segment * self.sp
        self.device = model.embed.weight.device
        self.spread = model
        if mesh is not None and self.sp > 1:
            kernel = model.attention.kernel
            self.spread = twin(model, ShardedRecurrence(kernel, SCANS[scan](mesh.sp_group, self.device)))
        self.whole = twin(model, self.spread.attention) if fuse else self.spread  # for whole segments
        if fuse:
            for block in self.whole.blocks:
                block.compile_parts()

    @torch.no_grad()
    def read(self, tokens: Tensor, past: Snapshot | None = None, padding: Sequence[int] | None = None) -> Snapshot:
        """Read int64 tokens [B, N], N ≥ 1, after `past`. Every rank runs the last few tokens.

        Texts of different lengths stand at the right: of row b the first `padding[b]` tokens belong to no text. They
        are a document of their own, so that nothing of them reaches the text.
        """
        tokens, shared = self._ready(tokens), self._shared(tokens.shape[1] - 1)
        carry = None if past is None else past.carry
        for start, length in self._segments(shared):
            self.told(start, tokens.shape[1])
            piece = self._slice(tokens, start, length)
            doc_ids = self._doc_ids(padding, start + self.rank * length, length)
            carry = self._reads(length)(piece, doc_ids=doc_ids, carry=carry, output_final_state=True).final_state
        if shared:
            carry = self._everywhere(carry)
        rest, doc_ids = tokens[:, shared:].to(self.device), self._doc_ids(padding, shared, tokens.shape[1] - shared)
        x, final_state = self.model.hidden(rest, doc_ids, carry=carry, output_final_state=True)
        logits = self.model.logits(x[:, -1])
        return Snapshot(final_state, logits, tokens.shape[1] + (0 if past is None else past.length))

    @torch.no_grad()
    def losses(self, tokens: Tensor, past: Snapshot | None = None) -> Tensor:
        """Return the losses of tokens [N] after the first, each given all before: nats [N − 1], fp64 on the CPU."""
        count = len(tokens) - 1
        shared = self._shared(count)
        tokens = self._ready(tokens)
        inputs, labels = tokens[None, :-1], tokens[None, 1:]
        found = torch.zeros(count, dtype=torch.float64, device=self.device)
        carry = None if past is None else past.carry
        for start, length in self._segments(shared):
            self.told(start, count)
            own = slice(start + self.rank * length, start + (self.rank + 1) * length)
            out = self._reads(length)(
                self._slice(inputs, start, length),
                self._slice(labels, start, length),
                carry=carry,
                output_final_state=True,
                per_token=True,
            )
            carry = out.final_state
            assert out.loss is not None
            found[own] = out.loss.double()
        if self.sp > 1 and self.mesh is not None:
            found = all_reduce_sum(found) / self.mesh.length("dp")
        if shared < count:
            carry = self._everywhere(carry) if shared else carry
            tail = (inputs[:, shared:].to(self.device), labels[:, shared:].to(self.device))
            found[shared:] = self.model(*tail, carry=carry, per_token=True).loss.double()
        return found.cpu()

    @torch.no_grad()
    def score(self, past: Snapshot, inputs: Sequence[int], labels: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the nats (fp64), given the past, of labels that are not IGNORED, and true where one is the likeliest.

        labels[0] should follow the past, labels[j + 1] should follow inputs[j].
        """
        found, carry = [past.logits[: int(labels[0] != IGNORED)]], past.carry
        for start in range(0, len(inputs), self.segment):
            piece = torch.tensor([list(inputs[start : start + self.segment])], device=self.device)
            x, carry = self.model.hidden(piece, carry=carry, output_final_state=True)
            asked = torch.tensor(labels[start + 1 : start + 1 + self.segment], device=self.device) != IGNORED
            found.append(self.model.logits(x[0, asked]))
        logits = torch.cat(found)
        target = torch.tensor([label for label in labels if label != IGNORED], device=self.device)
        nats = F.cross_entropy(logits.double(), target, reduction="none")
        return nats.cpu(), (logits.argmax(-1) == target).cpu()

    @torch.no_grad()
    def score_batch(self, past: Snapshot, continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """Return ln p of each continuation, of a token or more, given its row of the past; true if greedy gives it.

        All are run together, the shorter ones padded at their end.
        """
        longest = max(map(len, continuations))
        labels = torch.tensor([[*ids, *[IGNORED] * (longest - len(ids))] for ids in continuations], device=self.device)
        logs = torch.zeros(len(continuations), dtype=torch.float64, device=self.device)
        greedy = torch.ones(len(continuations), dtype=torch.bool, device=self.device)
        logits, carry = past.logits[:, None], past.carry
        step = max(1, SCORED // len(continuations))
        for start in range(0, longest, step):
            piece, logits = labels[:, start : start + step], logits[:, -1:]
            inputs = piece if start + step < longest else piece[:, :-1]
            if inputs.shape[1]:
                x, carry = self.model.hidden(inputs.clamp(min=0), carry=carry, output_final_state=True)
                logits = torch.cat([logits, self.model.logits(x)], dim=1)
            found = logits[:, : piece.shape[1]].double().transpose(1, 2)
            logs -= F.cross_entropy(found, piece, reduction="none", ignore_index=IGNORED).sum(1)
            greedy &= ((found.argmax(1) == piece) | (piece == IGNORED)).all(1)
        return list(zip(logs.tolist(), greedy.tolist(), strict=True))

    def _doc_ids(self, padding: Sequence[int] | None, start: int, length: int) -> Tensor | None:
        """Number the documents of tokens [start, start + length): a text that begins among them is a new one."""
        if padding is None:
            return None
        first = torch.tensor(padding, device=self.device)[:, None]
        places = torch.arange(start, start + length, device=self.device)
        return ((places >= first) & (first >= start)).int()

    def _shared(self, count: int) -> int:
        """Number of the first `count` tokens that ranks read together, in equal slices."""
        return count // self.sp * self.sp

    def _segments(self, tokens: int) -> list[tuple[int, int]]:
        """The start of each segment of the first `tokens` tokens, and the length of each rank's slice of it."""
        starts = range(0, tokens, self.segment)
        return [(start, min(self.segment, tokens - start) // self.sp) for start in starts]

    def _reads(self, length: int) -> LanguageModel:
        """Return the model for slices of `length` tokens: the compiled one takes whole segments only."""
        return self.whole if length * self.sp == self.segment else self.spread

    def _ready(self, tokens: Tensor) -> Tensor:
        """Pin tokens, so that a GPU fetches slices without making the host wait."""
        return tokens.pin_memory() if self.device.type == "cuda" and not tokens.is_cuda else tokens

    def _slice(self, tokens: Tensor, start: int, length: int) -> Tensor:
        begin = start + self.rank * length
        return tokens[:, begin : begin + length].to(self.device, non_blocking=True)

    def _everywhere(self, carry: list[State] | None) -> list[State] | None:
        """Broadcast the last segment's final states to every rank: a scan promises them to the first one only.

        Prefixes are the same on all.
        """
        if carry is None or self.mesh is None or self.sp == 1:
            return carry
        mesh = self.mesh
        return [tuple(broadcast(s, mesh.sp_group) if isinstance(s, Tensor) else s for s in state) for state in carry]


def twin(model: LanguageModel, attention: ShardedRecurrence) -> LanguageModel:
    """Return the same model, sharing its weights in memory, with another recurrence."""
    other = on_meta(model.cfg, model.window, attention, dtype=model.dtype, loss_chunk=model.loss_chunk)
    other.load_state_dict(model.state_dict(), assign=True)
    return other
