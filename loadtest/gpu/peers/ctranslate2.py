"""CTranslate2, faster-whisper's engine: ``Whisper.generate`` over a folder that its own serialiser writes."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loadtest.gpu.work import NEW_TOKENS, Task
from serve_app.engine.checkpoint import Dims


class CTranslate2:
    name = "CTranslate2"

    def load(self, dims: Dims, state_dict: dict[str, Tensor], device: torch.device) -> None:
        ctranslate2: Any = import_module("ctranslate2")
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), dims, state_dict)
            compute = str(state_dict["decoder.ln.weight"].dtype).removeprefix("torch.")
            self._model = ctranslate2.models.Whisper(folder, device=device.type, compute_type=compute)
        self._view = ctranslate2.StorageView
        self._task = Task.of(dims)

    def run(self, log_mel: Tensor) -> Tensor:
        features = self._view.from_array(log_mel if log_mel.is_cuda else log_mel.numpy())
        results = self._model.generate(
            features,
            [list(self._task.prompt)] * len(log_mel),
            beam_size=1,
            # NOTES: it chooses half as many tokens as this says, of which the start sequence is no part.
            max_length=2 * NEW_TOKENS,
            suppress_tokens=[-1, self._task.end],
        )
        return torch.tensor([result.sequences_ids[0] for result in results])


def write_folder(folder: Path, dims: Dims, state_dict: dict[str, Tensor]) -> None:
    """A model folder as ``ct2-transformers-converter`` would write it: projections of one input fused, zeros for the
    bias that keys lack, the output projection an alias of the embedding."""
    from whisper.tokenizer import get_tokenizer

    specs: Any = import_module("ctranslate2.specs")
    spec = specs.WhisperSpec(dims.n_audio_layer, dims.n_audio_head, dims.n_text_layer, dims.n_text_head)
    tensors = {name: tensor.cpu() for name, tensor in state_dict.items()}
    no_bias = torch.zeros(dims.n_text_state, dtype=tensors["decoder.ln.bias"].dtype)

    def norm(layer: Any, name: str) -> None:
        layer.gamma, layer.beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]

    def linear(layer: Any, *names: str) -> None:
        layer.weight = torch.cat([tensors[f"{name}.weight"] for name in names])
        layer.bias = torch.cat([tensors.get(f"{name}.bias", no_bias) for name in names])

    linear(spec.encoder.conv1, "encoder.conv1")
    linear(spec.encoder.conv2, "encoder.conv2")
    norm(spec.encoder.layer_norm, "encoder.ln_post")
    norm(spec.decoder.layer_norm, "decoder.ln")
    spec.decoder.embeddings.weight = tensors["decoder.token_embedding.weight"]
    # NOTES: replaced by the alias below; the serialiser's own search for equal arrays would compare all with all.
    spec.decoder.projection.weight = no_bias
    for side, part in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        part.position_encodings.encodings = tensors[f"{side}.positional_embedding"]
        for index, layer in enumerate(part.layer):
            block = f"{side}.blocks.{index}"
            norm(layer.self_attention.layer_norm, f"{block}.attn_ln")
            linear(layer.self_attention.linear[0], *(f"{block}.attn.{name}" for name in ("query", "key", "value")))
            linear(layer.self_attention.linear[1], f"{block}.attn.out")
            if side == "decoder":
                norm(layer.attention.layer_norm, f"{block}.cross_attn_ln")
                linear(layer.attention.linear[0], f"{block}.cross_attn.query")
                linear(layer.attention.linear[1], f"{block}.cross_attn.key", f"{block}.cross_attn.value")
                linear(layer.attention.linear[2], f"{block}.cross_attn.out")
            norm(layer.ffn.layer_norm, f"{block}.mlp_ln")
            linear(layer.ffn.linear_0, f"{block}.mlp.0")
            linear(layer.ffn.linear_1, f"{block}.mlp.2")

    # It looks up the special tokens by name; the others' names are never used.
    names = [f"token {index}" for index in range(dims.n_vocab)]
    special = get_tokenizer(dims.multilingual, num_languages=dims.num_languages).special_tokens
    for name, index in special.items():
        names[index] = name
    spec.register_vocabulary(names)
    task = Task.of(dims)
    spec.config.suppress_ids = [token for token in task.suppressed if token != task.end]
    spec.config.suppress_ids_begin = list(task.suppressed_first)
    spec.config.alignment_heads = [[dims.n_text_layer - 1, 0]]  # for word timestamps, which are not asked for
    spec.config.lang_ids = [index for name, index in special.items() if index == task.prompt[1]]
    spec.validate()
    spec.decoder.projection.weight = "decoder/embeddings/weight"
    spec.save(str(folder))
