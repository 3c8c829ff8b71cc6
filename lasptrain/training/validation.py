"""Loss on held-out windows: per token, per byte, and by position in the window."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lasptrain.data.loader import MicroBatch
from lasptrain.ops.cross_entropy import IGNORED
from lasptrain.parallel.collectives import all_reduce_sum
from lasptrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class Validation:
    """Means over all valid labels of the held-out windows."""

    loss: float  # nats per token
    bits_per_byte: float
    tokens: int
    by_position: dict[int, float]  # loss behind 2^i to 2^(i+1) − 1 tokens, key 2^i; the last behind 2^(i+1), too

    def scalars(self) -> dict[str, float]:
        """Return names and numbers for logs."""
        positions = {f"loss_at_{start}": loss for start, loss in self.by_position.items()}
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte, **positions}


def token_losses(model: nn.Module, segments: MicroBatch) -> Iterable[tuple[int, Tensor, Tensor]]:
    """Yield per segment its number, labels [B, T] and losses [B, T] of this rank's slice."""
    carry = None
    for m, piece in enumerate(segments):
        out = model(
            piece.tokens, piece.labels, piece.doc_ids, carry, output_final_state=m + 1 < len(segments), per_token=True
        )
        carry = out.final_state
        yield m, piece.labels, out.loss.view_as(piece.labels)


@torch.no_grad()
def validate(
    model: nn.Module, micro_batches: Iterable[MicroBatch], mesh: Mesh, window: int, token_bytes: Tensor
) -> Validation:
    """Evaluate on all ranks together.

    Args:
        micro_batches: this rank's slices, as `SliceLoader.validation_slices` gives them, on the model's device.
        token_bytes: [vocab] int64 on the same device, bytes of text each token stands for.
    """
    buckets = (window - 1).bit_length()  # the last token of a window of 2^n has none to itself: one number is noise
    sp, sp_rank = mesh.length("sp"), mesh.rank("sp")
    table: Tensor | None = None  # rows: loss, tokens, bytes; columns: buckets
    for segments in micro_batches:
        for m, labels, losses in token_losses(model, segments):
            length = labels.shape[1]
            position = (m * sp + sp_rank) * length + torch.arange(1, length + 1, device=labels.device)
            bucket = position.double().log2().floor().long().clamp(max=buckets - 1).expand_as(labels).flatten()
            valid = labels.flatten() != IGNORED
            size = token_bytes[labels.flatten().clamp(min=0)]
            rows = torch.stack([losses.flatten().double(), valid.double(), size.double()]) * valid
            counted = torch.zeros(3, buckets, dtype=torch.float64, device=labels.device).index_add_(1, bucket, rows)
            table = counted if table is None else table + counted
    assert table is not None
    sums = all_reduce_sum(table)
    loss, tokens, size_total = (float(row.sum()) for row in sums)
    return Validation(
        loss=loss / tokens,
        bits_per_byte=loss / math.log(2) / size_total,
        tokens=int(tokens),
        by_position={2**i: float(sums[0, i] / sums[1, i]) for i in range(buckets) if sums[1, i] > 0},
    )
