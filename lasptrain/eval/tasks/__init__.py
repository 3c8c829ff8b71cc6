"""Tasks by name: each makes sample number `index` of a length, from a seed of its own and nothing else.

RULER-style (arXiv:2404.06654) with keys from our own word lists, so numbers are not those of its files; to compare with
published ones, run its files themselves (`lasptrain.eval.tasks.files`). Where a definition asks for essays and no text
is given, the haystack is RULER's noise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lasptrain.eval.tasks import counting, needle, recall, tracing
from lasptrain.eval.tasks.sample import Sample, SampleRequest

Task = Callable[[SampleRequest], Sample]

TASKS: dict[str, Task] = {
    "passkey": recall.passkey,
    "niah_single_1": partial(needle.niah, "niah_single_1"),
    "niah_single_2": partial(needle.niah, "niah_single_2", hay="text"),
    "niah_single_3": partial(needle.niah, "niah_single_3", hay="text", values="uuids"),
    "niah_multikey_1": partial(needle.niah, "niah_multikey_1", hay="text", keys=4),
    "niah_multikey_2": partial(needle.niah, "niah_multikey_2", hay="needles"),
    "niah_multikey_3": partial(needle.niah, "niah_multikey_3", hay="needles", names="uuids", values="uuids"),
    "niah_multivalue": partial(needle.niah, "niah_multivalue", hay="text", values_per_key=4),
    "niah_multiquery": partial(needle.niah, "niah_multiquery", hay="text", keys=4, queries=4),
    "vt": tracing.variables,
    "cwe": counting.common_words,
    "fwe": counting.frequent_words,
    "kv_retrieval": recall.key_values,
    "pairs": recall.pairs,
    "copy": recall.copy,
    "mqar": recall.mqar,
}
