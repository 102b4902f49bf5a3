"""The encoder stage: log-mel → encoder state. Its unit is windows: each is 1,500 positions, whatever its speech."""

from __future__ import annotations

import torch
from torch import Tensor

from serve_app.engine import memory, work
from serve_app.engine.checkpoint import Dims, load
from serve_app.engine.constants import WINDOW_SECONDS
from serve_app.engine.encoder import Encoder
from serve_app.engine.precision import Compute
from serve_app.settings import EncoderSettings, Settings, known
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
        windows = _plan_windows(stage, checkpoint.dims, compute)
        self._follow_load(settings.feedback, self.bounds(settings.feedback, least=1, most=windows))
        self.operations = work.encoder_operations(checkpoint.dims)
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


def _plan_windows(stage: EncoderSettings, dims: Dims, compute: Compute) -> int:
    """Of a batch, at most; on a GPU this takes the memory for them."""
    if compute.device.type == "cpu":
        return known(stage.budget_windows)
    share = memory.share_of(compute.device, known(stage.num_gpus), stage.memory_gib)
    number, waiting = compute.dtype.itemsize, (stage.ring_windows, stage.max_queued_windows)
    windows = memory.plan_windows(dims, number, share, *waiting, wanted=stage.budget_windows)
    need = memory.encoder_bytes(dims, number, windows, *waiting)
    memory.take_share(compute.device, share, need, what=f"an encoder with batches of {windows} windows")
    return windows
