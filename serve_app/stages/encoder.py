"""The encoder stage: log-mel → encoder state. Its unit is windows: each is 1,500 positions, whatever its speech."""

from __future__ import annotations

import torch

from serve_app.engine.checkpoint import load
from serve_app.engine.encoder import Encoder
from serve_app.engine.precision import Compute
from serve_app.settings import Settings
from serve_app.stages.replica import Array, BatchStage
from serve_app.stages.threads import use_threads
from serve_app.stages.transport import Descriptor, as_tensor, export


class EncoderStage(BatchStage):
    """Replica of the encoder stage."""

    def __init__(self, settings: Settings):
        super().__init__(settings.encoder)
        use_threads(settings.encoder.threads)
        self.budget = settings.encoder.budget_windows
        compute = Compute.resolve(settings.model.device, settings.model.compute)
        self._encoder = Encoder(load(settings.model.source), compute)

    def _batch(self, inputs: list[Array]) -> list[Descriptor]:
        states = self._encoder(torch.stack([as_tensor(array) for array in inputs]))
        return [export(state) for state in states]
