"""Parameters of most tests: dtypes and activations."""

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "none")
dtype_name = lambda value: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None  # noqa: E731
