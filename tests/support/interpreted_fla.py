"""python -m tests.support.interpreted_fla FOLDER RUN: `convert.verify` where flash-linear-attention has no GPU.

Its kernels run in Triton's interpreter (TRITON_INTERPRET=1), which can time none, so each takes its first
configuration; over few tokens, because that is slow.
"""

import sys
from typing import Any

from triton.runtime.autotuner import Autotuner

from lasptrain.convert import verify


def first(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())


Autotuner.run = first
verify.LENGTH, verify.PREFIX, verify.PIECES, verify.SHORT, verify.GREEDY = 9, 5, (3, 1, 3, 2), 6, 2
verify.CHUNK = 0

if __name__ == "__main__":
    verify.main(*sys.argv[1:])
