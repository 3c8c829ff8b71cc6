"""The dtypes behind the names of precisions, and what keeps lengths from zero."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
UNIT_EPS = 1e-6  # inside of the root of a vector's length
