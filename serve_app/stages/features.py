"""The feature stage: samples → log-mel. Its unit is samples."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from serve_app.engine import memory
from serve_app.engine.checkpoint import load
from serve_app.engine.constants import WINDOW_SAMPLES
from serve_app.engine.features import LogMel
from serve_app.engine.precision import Compute
from serve_app.settings import Settings, known
from serve_app.stages.replica import BatchStage
from serve_app.stages.threads import use_threads
from serve_app.stages.transport import Exporter, Input


class FeaturesStage(BatchStage):
    """Replica of the feature stage."""

    def __init__(self, settings: Settings):
        compute = Compute.resolve(settings.model.device, settings.model.compute)
        super().__init__(settings.features, compute.device)
        use_threads(settings.features.threads)
        stage, dims = settings.features, load(settings.model.source).dims
        self.budget = stage.budget_samples
        if compute.device.type == "cuda":
            share = memory.share_of(compute.device, known(stage.num_gpus), stage.memory_gib)
            windows = stage.budget_samples // WINDOW_SAMPLES
            need = memory.features_bytes(dims, compute.dtype.itemsize, windows, stage.ring_windows)
            memory.take_share(compute.device, share, need, what="the feature stage")
        self.export = Exporter(compute.device, stage.ring_windows)
        self._log_mel = LogMel(dims.n_mels, compute)

    def _batch(self, inputs: list[Input]) -> Tensor:
        samples = [samples for samples in inputs if isinstance(samples, np.ndarray)]
        assert len(samples) == len(inputs)  # they come from a host
        return self._log_mel(samples)
