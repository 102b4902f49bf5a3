"""The feature stage: samples → log-mel. Its unit is samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from serve_app.engine import memory, work
from serve_app.engine.checkpoint import load
from serve_app.engine.constants import SAMPLE_RATE, WINDOW_SAMPLES
from serve_app.engine.features import LogMel
from serve_app.engine.precision import Compute
from serve_app.settings import Settings, known
from serve_app.stages.replica import BatchStage
from serve_app.stages.threads import use_threads
from serve_app.stages.transport import Exporter, Input


class FeaturesStage(BatchStage):
    """Replica of the feature stage."""

    stage = "features"
    fills_gpu = False  # a batch's time is its copy on the host; the kernel's is less than a millisecond

    def __init__(self, settings: Settings):
        compute = Compute.resolve(settings.model.device, settings.model.compute)
        super().__init__(settings.features, compute.device)
        use_threads(settings.features.threads)
        stage, dims = settings.features, load(settings.model.source).dims
        bounds = self.bounds(settings.feedback, least=WINDOW_SAMPLES, most=stage.budget_samples)
        self._follow_load(settings.feedback, bounds)
        self.operations = work.features_operations(dims)
        if compute.device.type == "cuda":
            share = memory.share_of(compute.device, known(stage.num_gpus), stage.memory_gib)
            windows = stage.budget_samples // WINDOW_SAMPLES
            need = memory.features_bytes(dims, compute.dtype.itemsize, windows, stage.ring_windows)
            memory.take_share(compute.device, share, need, what="the feature stage")
        self.export = Exporter(compute.device, stage.ring_windows)
        self._log_mel = LogMel(dims.n_mels, compute)
        self._begin_observing(self._full_batch)

    def _full_batch(self) -> float:
        windows = int(self.budget) // WINDOW_SAMPLES
        self._log_mel([np.zeros(WINDOW_SAMPLES, np.int16)] * windows)
        torch.cuda.synchronize(self._log_mel.compute.device)
        return windows * WINDOW_SAMPLES / SAMPLE_RATE

    def _batch(self, inputs: list[Input]) -> Tensor:
        samples = [samples for samples in inputs if isinstance(samples, np.ndarray)]
        assert len(samples) == len(inputs)  # they come from a host
        return self._log_mel(samples)
