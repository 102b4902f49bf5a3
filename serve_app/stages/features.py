"""The feature stage: samples → log-mel. Its unit is samples."""

from __future__ import annotations

from serve_app.engine.checkpoint import load
from serve_app.engine.features import LogMel
from serve_app.engine.precision import Compute
from serve_app.settings import Settings
from serve_app.stages.replica import Array, BatchStage
from serve_app.stages.threads import use_threads
from serve_app.stages.transport import Descriptor, export


class FeaturesStage(BatchStage):
    """Replica of the feature stage."""

    def __init__(self, settings: Settings):
        super().__init__(settings.features)
        use_threads(settings.features.threads)
        self.budget = settings.features.budget_samples
        compute = Compute.resolve(settings.model.device, settings.model.compute)
        self._log_mel = LogMel(load(settings.model.source).dims.n_mels, compute.device)

    def _batch(self, inputs: list[Array]) -> list[Descriptor]:
        return [export(features) for features in self._log_mel(inputs)]
