"""Every knob, once. Flags, environment, YAML files and Helm values all end up here.

Order of precedence: arguments, environment (``WHISPER_SERVE_ENCODER__REPLICAS=2``), the YAML file named by
``WHISPER_SERVE_CONFIG``, defaults. An unknown name is an error, in every source.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from serve_app.batching.feedback import FeedbackSettings
from serve_app.scaling.config import ScalingSettings

ENV_PREFIX = "WHISPER_SERVE_"
CONFIG_FILE_VARIABLE = "WHISPER_SERVE_CONFIG"

MiB = 2**20
WINDOW_SAMPLES = 30 * 16_000


T = TypeVar("T")


def known(value: T | None) -> T:
    """A setting whose default depends on the machine, after ``Settings.filled``."""
    assert value is not None, "Settings.filled has not been called"
    return value


MOST_API_REPLICAS = 12
"""By default: so many keep an H100 at work."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Section):
    """Which Whisper, and how it computes."""

    source: str = Field(
        "embedded:base",
        description="embedded:base, embedded:tiny.en, a checkpoint's path (OpenAI .pt, Hugging Face or CTranslate2 "
        "folder), or a model name that openai-whisper can download",
    )
    served_name: str | None = Field(None, description="name in /v1/models; by default derived from the source")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the matrix products; auto takes the fastest that keeps the error rate"
    )


class AudioSettings(Section):
    """What is taken from strangers. Caps apply while decoding, so that nothing larger is ever held."""

    max_upload_bytes: int = Field(256 * MiB, gt=0)
    max_seconds: float = Field(4 * 3600.0, gt=0, description="longest recording")
    max_channels: int = Field(8, gt=0)
    min_sample_rate: int = Field(4_000, gt=0)
    max_sample_rate: int = Field(192_000, gt=0)
    max_decoded_bytes: int = Field(
        24 * 1024 * MiB, gt=0, description="as decoded, before resampling, over the whole recording"
    )
    worker_memory_bytes: int = Field(
        1024 * MiB, gt=0, description="address space of the process that decodes one recording"
    )
    worker_cpu_seconds: float = Field(600, gt=0, description="CPU time of that process")
    stall_timeout_s: float = Field(30, gt=0, description="longest wait for that process's next output")
    workers: int = Field(2, gt=0, description="recordings decoded at once by one API replica")


class VadSettings(Section):
    """Voice activity, in frames of 32 ms (silero-vad)."""

    threshold: float = Field(0.5, gt=0, lt=1, description="speech begins at or above this probability")
    min_speech_s: float = Field(0.25, ge=0, description="shorter speech is taken for noise")
    min_silence_s: float = Field(0.1, ge=0, description="shorter pauses do not end speech")
    pad_s: float = Field(0.4, ge=0, description="kept before and after speech")
    max_pause_s: float = Field(2.0, gt=0, description="a longer pause ends a window, and is itself not decoded")


class PlacedSettings(Section):
    """On which of a cluster's nodes a deployment's replicas run."""

    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="custom resources of Ray that a replica reserves: it runs only on nodes that have them",
    )
    max_replicas_per_node: int | None = Field(None, ge=1, le=100, description="by default as many as fit")


class StageSettings(PlacedSettings):
    """A stage's replicas and what each takes at a time."""

    replicas: int = Field(1, ge=1, description="with scaling.enabled as many at the start, within its limits")
    num_cpus: float = Field(0.0, ge=0, description="Ray's logical CPUs a replica reserves")
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="share of a GPU a replica reserves; by default 0.1, 0.4, 0.5 of one where there are GPUs",
    )
    memory_gib: float | None = Field(
        None, gt=0, description="GPU memory a replica may take, CUDA's own included; by default num_gpus of the GPU's"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of the engine; by default half of the machine's cores, at most 8"
    )
    max_queued_windows: int = Field(256, ge=1, description="windows a replica holds waiting before it refuses more")
    warm_up_s: float = Field(
        1.0,
        ge=0,
        description="seconds of full batches at a replica's start on a GPU, to learn the SM utilization they reach; "
        "0: none, and full utilization is taken for that",
    )


class BatchStageSettings(StageSettings):
    ring_windows: int = Field(
        64, ge=1, description="results that wait in GPU memory for a replica of the next stage on the same GPU"
    )


class FeaturesSettings(BatchStageSettings):
    budget_samples: int = Field(16 * WINDOW_SAMPLES, ge=WINDOW_SAMPLES, description="audio in one batch")


class EncoderSettings(BatchStageSettings):
    # more than other stages: what waits elsewhere for it keeps a place in the features' ring
    max_queued_windows: int = Field(1024, ge=1, description="windows a replica holds waiting before it refuses more")
    budget_windows: int | None = Field(
        None,
        ge=1,
        description="windows in one batch: each is 1,500 positions whatever its speech; by default 4, on a GPU as many "
        "as its memory holds, up to 16",
    )


class DecoderSettings(StageSettings):
    slots: int | None = Field(
        None,
        ge=1,
        description="windows decoded at once; by default 16, on a GPU as many as its memory holds, up to 256",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of one window, whose text ends there; by default, and at most, half of the decoder's "
        "context, as in openai-whisper: 224",
    )
    state_bits: Literal[8, 16] = Field(
        16,
        description="of a number of the encoder states in the slots; 8, for GPUs alone, halves what a step reads of "
        "each window",
    )


class RequestSettings(Section):
    timeout_s: float = Field(3600, gt=0, description="deadline of a request that names none")
    max_active: int = Field(256, ge=1, description="recordings one API replica works on at once; more get 429")
    windows_in_flight: int = Field(
        32, ge=1, description="windows of one recording under way at once; bounds its memory"
    )


class HttpSettings(PlacedSettings):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    replicas: int | None = Field(
        None,
        ge=1,
        description="API replicas; by default one for a CPU, and for a GPU three quarters of this machine's cores, at "
        f"most {MOST_API_REPLICAS}",
    )
    api_keys: list[str] = Field(default_factory=list, description="bearer keys; empty and no file: no authentication")
    api_keys_file: Path | None = Field(None, description="one key a line")


class MetricsSettings(Section):
    port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="metrics port of the Ray node that whisper-serve starts; by default any free one. Where Ray runs "
        "already, its own `ray start --metrics-export-port` says which",
    )


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    app_name: str = Field("whisper", min_length=1)
    model: ModelSettings = ModelSettings()
    audio: AudioSettings = AudioSettings()
    vad: VadSettings = VadSettings()
    features: FeaturesSettings = FeaturesSettings()
    encoder: EncoderSettings = EncoderSettings()
    decoder: DecoderSettings = DecoderSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    scaling: ScalingSettings = ScalingSettings()
    request: RequestSettings = RequestSettings()
    http: HttpSettings = HttpSettings()
    metrics: MetricsSettings = MetricsSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.audio.min_sample_rate > self.audio.max_sample_rate:
            raise ValueError("audio.min_sample_rate is above audio.max_sample_rate")
        if self.decoder.state_bits == 8 and (
            self.model.device == "cpu" or self.model.compute not in ("auto", "float16")
        ):
            raise ValueError("decoder.state_bits is 8, which needs a GPU and float16")
        return self

    def filled(self, *, on_gpu: bool) -> Settings:
        """With the defaults that depend on where the stages run. The decoder's slots and the encoder's batch on a GPU
        stay open until a replica knows its GPU's memory."""
        if self.decoder.state_bits == 8 and not on_gpu:
            raise ValueError("decoder.state_bits is 8, which needs a GPU: there is none")
        shares = {"features": 0.1, "encoder": 0.4, "decoder": 0.5}
        defaults: dict[str, dict[str, object]] = {
            name: {"num_gpus": share if on_gpu else 0.0} for name, share in shares.items()
        }
        defaults["encoder"]["budget_windows"] = None if on_gpu else 4
        defaults["decoder"]["slots"] = None if on_gpu else 16
        cores = len(os.sched_getaffinity(0))
        defaults["http"] = {"replicas": max(1, min(MOST_API_REPLICAS, cores * 3 // 4)) if on_gpu else 1}
        filled = {}
        for name, values in defaults.items():
            section: Section = getattr(self, name)
            filled[name] = section.model_copy(update={k: v for k, v in values.items() if getattr(section, k) is None})
        return self.model_copy(update=filled)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = os.environ.get(CONFIG_FILE_VARIABLE)
        if path is None:
            return init_settings, env_settings
        if not Path(path).is_file():
            raise FileNotFoundError(f"{CONFIG_FILE_VARIABLE} names {path}, which is not a file")
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=path)
