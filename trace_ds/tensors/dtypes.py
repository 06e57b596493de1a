"""What files, and we, call the types of elements."""

from __future__ import annotations

import torch

_KINDS = (  # in safetensors files, and the storages of torch.save's
    (torch.float64, "F64", "DoubleStorage"),
    (torch.float32, "F32", "FloatStorage"),
    (torch.float16, "F16", "HalfStorage"),
    (torch.bfloat16, "BF16", "BFloat16Storage"),
    (torch.int64, "I64", "LongStorage"),
    (torch.int32, "I32", "IntStorage"),
    (torch.int16, "I16", "ShortStorage"),
    (torch.int8, "I8", "CharStorage"),
    (torch.uint8, "U8", "ByteStorage"),
    (torch.bool, "BOOL", "BoolStorage"),
)
DTYPE_NAMES = {dtype: name for dtype, name, _ in _KINDS}
STORAGE_DTYPES = {storage: dtype for dtype, _, storage in _KINDS}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
WORDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
