"""What the controller is told: one YAML file, read again whenever it changes.

On Kubernetes the file is a ConfigMap that is mounted as a folder: kubelet swaps a link, so the file is compared by what
is in it and not by its time. A new file that is wrong changes nothing: what was read before stays in force.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from serve_app.scaling.config import ScalingSettings
from serve_app.scaling.readings import STAGES, Stage

FIXED = ("namespace", "rayservice", "lease", "metrics_port")
"""What a running controller cannot change: who it is."""

Name = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""Of an object of Kubernetes."""


class ConfigError(ValueError):
    """The file cannot be read, or says what cannot be."""


class ControllerSettings(BaseModel):
    """The controller's file. Every key but those without a default may be left out; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespace: Name = Field(description="of the RayService and of the Lease")
    rayservice: Name = Field(description="the RayService's name")
    lease: Name = Field(description="name of the Lease that the leader holds; one for each RayService")
    application: str = Field("whisper", min_length=1, description="Serve's name of the application")

    prometheus_url: str = Field(description="where Prometheus answers, /api/v1 left out")
    prometheus_selector: str = Field(
        "",
        description="label matchers that pick this release's series, as between the braces of PromQL: "
        'namespace="speech",job="whisper"',
    )
    dashboard_url: str = Field(
        "http://{service}.{namespace}.svc:8265",
        description="of the head's dashboard, which has Serve's API. {service}: the head's service in the active "
        "cluster; {namespace}: as above",
    )
    ray_token_file: Path | None = Field(
        None,
        description="file with Ray's authentication token (KubeRay's Secret, mounted); read for every request, so a "
        "new token needs no restart",
    )

    tick_s: float = Field(1.0, ge=0.1, le=60, description="how often the controller looks and decides")
    dry_run: bool = Field(False, description="decides, counts and tells, but asks Serve for nothing")
    signals: Literal["application", "dcgm"] = Field(
        "application",
        description="where SM and DRAM utilization come from: application, the replicas' own NVML gauges; dcgm, "
        "dcgm-exporter's DCGM_FI_PROF_SM_ACTIVE and DCGM_FI_PROF_DRAM_ACTIVE, joined by the GPU's UUID. Everything "
        "else is the application's in either case",
    )
    dcgm_selector: str = Field("", description="label matchers that pick dcgm-exporter's series")
    gpus: dict[Stage, Annotated[float, Field(ge=0)]] = Field(
        {"features": 0.1, "encoder": 0.4, "decoder": 0.5},
        description="share of a GPU that a replica of each stage holds; 0 on a CPU",
    )
    metrics_port: int = Field(9100, ge=0, le=65535, description="for /metrics and /healthz; 0: any free one, logged")
    scaling: ScalingSettings = Field(
        ScalingSettings(),
        description="topology, limits and thresholds (serve_app/scaling/config.py). enabled is not looked at: the "
        "controller runs, so it is. decision_log: a file in the controller's pod",
    )

    @field_validator("prometheus_url", "dashboard_url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url.replace("{", "").replace("}", ""))
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"{url!r} is no http or https URL")
        return url.rstrip("/")

    @field_validator("dashboard_url")
    @classmethod
    def _is_template(cls, url: str) -> str:
        names = {name for _, name, _, _ in string.Formatter().parse(url) if name is not None}
        if unknown := names - {"service", "namespace"}:
            raise ValueError(f"{{{unknown.pop()}}} is not known here: {{service}} and {{namespace}} are")
        return url

    @field_validator("prometheus_selector", "dcgm_selector")
    @classmethod
    def _is_bare(cls, selector: str) -> str:
        if selector.lstrip().startswith("{") or selector.rstrip().endswith("}"):
            raise ValueError("the matchers alone, without braces")
        return selector.strip().rstrip(",")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if set(self.gpus) != set(STAGES):
            raise ValueError(f"gpus names a share for each of {', '.join(STAGES)}")
        if self.dcgm_selector and self.signals != "dcgm":
            raise ValueError("dcgm_selector is for signals: dcgm")
        return self

    def dashboard(self, service: str) -> str:
        """The URL of a head's dashboard."""
        return self.dashboard_url.format(service=service, namespace=self.namespace)


def parse(text: str) -> ControllerSettings:
    """Raises ConfigError, with every mistake on a line of its own."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError("not a mapping of keys to values")
    try:
        return ControllerSettings.model_validate(values)
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise ConfigError("\n".join(lines)) from None


class ConfigFile:
    """The file, and what it last said that could be.

    settings: in force. error: why what the file says now is not; None where it is.
    """

    def __init__(self, path: Path):
        """Raises ConfigError where the file is not there or wrong: a controller does not start like that."""
        self._path = path
        self._text = self._read()
        self.settings = parse(self._text)
        self.error: str | None = None

    def reload(self) -> bool:
        """Looks at the file; have the settings in force changed?"""
        try:
            text = self._read()
            if text == self._text and self.error is None:
                return False
            settings = parse(text)
            for key in FIXED:
                if getattr(settings, key) != getattr(self.settings, key):
                    raise ConfigError(f"{key} cannot change while the controller runs: start it again")
        except ConfigError as error:
            self.error = str(error)
            return False
        changed = settings != self.settings
        self._text, self.settings, self.error = text, settings, None
        return changed

    def _read(self) -> str:
        try:
            return self._path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._path} cannot be read: {error}") from None
