"""openai-whisper: its ``decode``, as ``whisper.load_model`` leaves the model."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from loadtest.gpu.work import NEW_TOKENS, Task
from serve_app.engine.checkpoint import Dims


class OpenAIWhisper:
    name = "openai-whisper"

    def load(self, dims: Dims, state_dict: dict[str, Tensor], device: torch.device) -> None:
        from whisper.decoding import DecodingOptions
        from whisper.model import ModelDimensions, Whisper

        with device:
            self._model = Whisper(ModelDimensions(**asdict(dims)))
        # NOTES: the parameters stay float32, as load_model has them, and are cast in every product.
        self._model.load_state_dict(state_dict)
        self._model.eval()
        self._options = DecodingOptions(
            language="en",
            without_timestamps=True,
            sample_len=NEW_TOKENS,
            suppress_tokens=[-1, Task.of(dims).end],
            fp16=state_dict["decoder.ln.weight"].dtype == torch.float16,
        )

    def run(self, log_mel: Tensor) -> Tensor:
        return torch.tensor([result.tokens for result in self._model.decode(log_mel, self._options)])
