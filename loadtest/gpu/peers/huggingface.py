"""transformers: ``generate`` of ``WhisperForConditionalGeneration``, as shipped and with a static cache."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from loadtest.gpu.work import NEW_TOKENS, Task
from serve_app.engine.checkpoint import Dims
from serve_app.engine.checkpoint.huggingface import stored_name
from serve_app.engine.tokens import Tokens


class Transformers:
    """Attention through PyTorch's ``scaled_dot_product_attention``, a cache that grows: the defaults."""

    name = "transformers"

    def load(self, dims: Dims, state_dict: dict[str, Tensor], device: torch.device) -> None:
        transformers: Any = import_module("transformers")
        with device:
            model = transformers.WhisperForConditionalGeneration(config(dims, transformers))
        model.to(state_dict["decoder.ln.weight"].dtype)
        named = {stored_name(name): tensor for name, tensor in state_dict.items()}
        incompatible = model.load_state_dict(named, strict=False)
        if incompatible.unexpected_keys or incompatible.missing_keys != ["proj_out.weight"]:
            raise ValueError(f"the weights do not fit the model: {incompatible}")
        model.tie_weights()
        model.generation_config = generation_config(dims, transformers)
        self._model = model.eval()

    def run(self, log_mel: Tensor) -> Tensor:
        tokens: Tensor = self._model.generate(log_mel, language="en", task="transcribe", max_new_tokens=NEW_TOKENS)
        return tokens


class TransformersStatic(Transformers):
    """A cache of fixed size, with which ``generate`` compiles the decoder by itself (mode ``reduce-overhead``): once
    for one window, once for any other number."""

    name = "transformers, static cache, compiled"

    def load(self, dims: Dims, state_dict: dict[str, Tensor], device: torch.device) -> None:
        super().load(dims, state_dict, device)
        self._model.generation_config.cache_implementation = "static"


def config(dims: Dims, transformers: Any) -> Any:
    return transformers.WhisperConfig(
        num_mel_bins=dims.n_mels,
        d_model=dims.n_audio_state,
        vocab_size=dims.n_vocab,
        max_source_positions=dims.n_audio_ctx,
        max_target_positions=dims.n_text_ctx,
        encoder_layers=dims.n_audio_layer,
        encoder_attention_heads=dims.n_audio_head,
        encoder_ffn_dim=4 * dims.n_audio_state,
        decoder_layers=dims.n_text_layer,
        decoder_attention_heads=dims.n_text_head,
        decoder_ffn_dim=4 * dims.n_text_state,
        attn_implementation="sdpa",
        **_special_tokens(dims),
    )


def generation_config(dims: Dims, transformers: Any) -> Any:
    """What the published checkpoints' ``generation_config.json`` says, with the work's suppressed tokens."""
    task = Task.of(dims)
    vocabulary = Tokens(dims).vocabulary
    _, _, transcribe, no_timestamps = task.prompt
    return transformers.GenerationConfig(
        **_special_tokens(dims),
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": token for code, token in vocabulary.languages.items()},
        task_to_id={"transcribe": transcribe, "translate": transcribe - 1},
        no_timestamps_token_id=no_timestamps,
        prev_sot_token_id=vocabulary.previous,
        return_timestamps=False,
        suppress_tokens=list(task.suppressed),
        begin_suppress_tokens=list(task.suppressed_first),
    )


def _special_tokens(dims: Dims) -> dict[str, int]:
    task = Task.of(dims)
    return {
        "bos_token_id": task.end,
        "eos_token_id": task.end,
        "pad_token_id": task.end,
        "decoder_start_token_id": task.prompt[0],
    }
