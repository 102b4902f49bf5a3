"""The encoder stage: log-mel → encoder state. Its unit is windows: each is 1,500 positions, whatever its speech."""

from __future__ import annotations

import torch
from torch import Tensor

from serve_app.engine import memory, work
from serve_app.engine.checkpoint import load
from serve_app.engine.constants import WINDOW_SECONDS
from serve_app.engine.encoder import Encoder
from serve_app.engine.precision import Compute
from serve_app.settings import Settings, known
from serve_app.stages.replica import BatchStage
from serve_app.stages.threads import use_threads
from serve_app.stages.transport import Exporter, Input, received_tensor


class EncoderStage(BatchStage):
    """Replica of the encoder stage."""

    stage = "encoder"

    def __init__(self, settings: Settings):
        compute = Compute.resolve(settings.model.device, settings.model.compute)
        super().__init__(settings.encoder, compute.device)
        use_threads(settings.encoder.threads)
        stage, checkpoint = settings.encoder, load(settings.model.source)
        windows = known(stage.budget_windows)
        self._follow_load(settings.feedback, self.bounds(settings.feedback, least=1, most=windows))
        self.operations = work.encoder_operations(checkpoint.dims)
        if compute.device.type == "cuda":
            share = memory.share_of(compute.device, known(stage.num_gpus), stage.memory_gib)
            need = memory.encoder_bytes(
                checkpoint.dims, compute.dtype.itemsize, windows, stage.ring_windows, stage.max_queued_windows
            )
            memory.take_share(compute.device, share, need, what=f"an encoder with batches of {windows} windows")
        self.export = Exporter(compute.device, stage.ring_windows)
        self._encoder = Encoder(checkpoint, compute, full=windows)
        self._begin_observing(self._full_batch)

    def _full_batch(self) -> float:
        windows, dims, compute = int(self.budget), self._encoder.dims, self._encoder.compute
        shape = windows, dims.n_mels, 2 * dims.n_audio_ctx
        self._encoder(torch.zeros(shape, device=compute.device, dtype=compute.dtype))
        torch.cuda.synchronize(compute.device)
        return windows * WINDOW_SECONDS

    def _batch(self, inputs: list[Input]) -> Tensor:
        device = self._encoder.compute.device
        # some may have come through the host
        log_mel = [
            features if features.is_cuda else features.to(device, non_blocking=True)
            for features in map(received_tensor, inputs)
        ]
        return self._encoder(torch.stack(log_mel))
