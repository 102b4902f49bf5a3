"""Where the engine runs, and in what precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Compute:
    """device: where the engine runs. dtype: of the matrix products' operands; they accumulate in float32, and the
    residual stream, normalisation and softmax are float32 whatever it is."""

    device: torch.device
    dtype: torch.dtype

    @property
    def has_kernels(self) -> bool:
        """Do the CUDA kernels compute here? They take FP16; other precisions run in plain PyTorch, for comparison."""
        return self.device.type == "cuda" and self.dtype == torch.float16

    @classmethod
    def resolve(cls, device: str = "auto", dtype: str = "auto") -> Compute:
        """Turns settings into what this machine can do; what it cannot do is an error."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("model.device is cuda, but PyTorch finds no CUDA GPU here")
        if dtype == "auto":
            dtype = "float16" if device == "cuda" else ("bfloat16" if has_bfloat16_products() else "float32")
        if device == "cpu" and dtype == "float16":
            raise RuntimeError(
                "model.compute is float16, which PyTorch computes slowly on a CPU: take bfloat16 or float32"
            )
        if device == "cuda" and dtype == "float32":
            # PyTorch's convolutions would round to ten bits of mantissa; who asks for float32 wants its tokens
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        # with its number: several of PyTorch's calls take no other
        where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        return cls(where, DTYPES[dtype])


def has_bfloat16_products() -> bool:
    """Has the CPU matrix instructions for bfloat16 (AMX)? Without them bfloat16 is slower than float32."""
    return bool(torch.cpu._is_amx_tile_supported())
