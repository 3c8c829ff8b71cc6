"""Known rates of GPUs, by the whole name that the driver gives: nearly the same name may be another card, and one with
MIG in it is a part of a card. No torch, no GPU.
"""

from typing import NamedTuple


class Rates(NamedTuple):
    """Rates that a GPU sustains: matrix products in FLOP/s, copies in bytes/s, memory in bytes."""

    products: float
    copies: float
    memory: int


class Card(NamedTuple):
    """Rates of a card. `peak`: dense bf16 matrix products by the data sheet, FLOP/s, which MFU is relative to.

    `sustained`: the rates that predictions are made from. None where unknown.
    """

    peak: float | None = None
    sustained: Rates | None = None


H200 = Rates(products=685e12, copies=4.2e12, memory=140 * 2**30)
H100 = Rates(products=650e12, copies=3.0e12, memory=79 * 2**30)
A100 = Rates(products=250e12, copies=1.6e12, memory=79 * 2**30)
PLANNED = {"h200": H200, "h100": H100, "a100": A100}  # by the names of `plan --gpu`
MEASURED = {H200: "NVIDIA H200"}  # and on which card; the others are assumed

CARDS = {
    "NVIDIA B200": Card(2250e12),
    "NVIDIA H200": Card(989e12, H200),
    "NVIDIA H200 NVL": Card(835e12),
    "NVIDIA H100 80GB HBM3": Card(989e12, H100),
    "NVIDIA H100 NVL": Card(835e12),
    "NVIDIA H100 PCIe": Card(756e12),
    "NVIDIA A100-SXM4-80GB": Card(312e12, A100),
    "NVIDIA A100-SXM4-40GB": Card(312e12),
    "NVIDIA A100 80GB PCIe": Card(312e12),
    "NVIDIA A100-PCIE-40GB": Card(312e12),
    "NVIDIA L40S": Card(362e12),
    "NVIDIA A40": Card(149.7e12),
    "NVIDIA A10": Card(125e12),
    "NVIDIA L4": Card(121e12),
}


def of(device: str) -> Card:
    """Return the card of that name; nothing is known of one that is not listed."""
    return CARDS.get(device, Card())
