"""Measured rates of a machine, in a file: `plan` on another machine predicts from them. No torch, no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from lasptrain.console.tables import figures
from lasptrain.cost.gpus import MEASURED, Rates
from lasptrain.cost.links import ASSUMED, Link, Links
from lasptrain.errors import RecipeError

LINKS = ("hop", "gather")


class MeasuredHardware(NamedTuple):
    """One kind of GPU, and the links between those of one machine, where it has several."""

    device: str
    rates: Rates
    hop: Link | None  # from one rank to another
    gather: Link | None  # of a state to all ranks

    @property
    def links(self) -> Links:
        """Links as measured inside a machine; those between machines are assumed."""
        inside = ASSUMED.inside if self.hop is None else self.hop
        return ASSUMED._replace(inside=inside, gather=self.gather)


def write(file: Path, measured: MeasuredHardware) -> None:
    """Write the measurement as JSON."""
    links = {name: link and link._asdict() for name, link in zip(LINKS, measured[2:], strict=True)}
    file.write_text(json.dumps({"device": measured.device, **measured.rates._asdict(), **links}, indent=1))


def read(file: Path) -> MeasuredHardware:
    """Read a file that `write` wrote. RecipeError where it is something else."""
    expected = "expected a file of plan --measure --rates FILE"
    try:
        found = json.loads(file.read_text())
        hop, gather = (found[name] and Link(*(float(found[name][key]) for key in Link._fields)) for name in LINKS)
        rates = Rates(float(found["products"]), float(found["copies"]), int(found["memory"]))
        return MeasuredHardware(str(found["device"]), rates, hop, gather)
    except OSError as error:
        raise RecipeError(f"--rates: {file}: {error.strerror}; {expected}") from None
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"--rates: {file}: holds no rates; {expected}") from None


def provenance(rates: Rates, links: Links, measured: MeasuredHardware | None) -> list[tuple[str, str, str]]:
    """Provenance of predictions: the name and value of each number, and `measured` or `assumed`."""
    device = MEASURED.get(rates) if measured is None else measured.device
    gpu = "assumed" if device is None else f"measured, {device}"
    hop = "assumed" if measured is None or measured.hop is None else f"measured, {measured.device}"
    gather = "as a hop" if links.gather is None else f"measured, {measured.device if measured else ''}"
    return [
        ("products", f"{figures(rates.products / 1e12)} TFLOP/s", gpu),
        ("copies", f"{figures(rates.copies / 1e12)} TB/s", gpu),
        ("memory", f"{rates.memory / 2**30:.1f} GiB", gpu),
        ("hop inside a machine", _link(links.inside), hop),
        ("gathering inside a machine", _link(links.gather or links.inside), gather),
        (f"hop between machines of {links.node}", _link(links.between), "assumed"),
    ]


def _link(link: Link) -> str:
    return f"{link.latency * 1e6:.1f} µs, {figures(link.bandwidth / 1e9)} GB/s"
