"""What the scaling policy is told by its operator."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Limits(BaseModel):
    """How many replicas a stage, or how many pods, there may be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(1, ge=0, description="0 only takes effect with zero_after_s")
    max_replicas: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        return self


class ScalingSettings(BaseModel):
    """Replicas that follow the load (docs/scaling.md says how)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(False, description="off: every deployment keeps the replicas that its settings name")
    topology: Literal["colocated", "split"] = Field(
        "colocated", description="colocated: all stages in each pod, one number of pods; split: a number for each stage"
    )
    pods: Limits = Field(Limits(), description="limits of the colocated topology")
    features: Limits = Field(Limits(), description="limits of the split topology, as are the next two")
    encoder: Limits = Limits()
    decoder: Limits = Limits()
    gpu_budget: float | None = Field(None, gt=0, description="GPUs that all replicas together may hold")

    sm_utilization: float = Field(
        0.75,
        gt=0.1,
        le=0.95,
        description="of a stage's own saturation point: above it replicas are added once batches cannot grow. With an "
        "hour of history the policy moves it to what that history asks for",
    )
    objective_wait_s: float = Field(2.0, gt=0, description="p99 of the wait that is aimed at")
    cold_start_s: float = Field(60.0, gt=0, description="from ordering a replica to its first batch, roughly")
    up_hold_s: float = Field(
        1.0, ge=0, description="how long more replicas must be wanted before they are ordered; in a burst at once"
    )
    down_hold_s: float | None = Field(
        None,
        gt=0,
        description="how long fewer replicas must suffice before they go; by default learned, between a quarter and "
        "three times the cold start",
    )
    panic_window_s: float = Field(60.0, gt=0, description="after a burst no replica goes for this long")
    stale_after_s: float = Field(5.0, gt=0, description="an older reading says nothing")
    zero_after_s: float | None = Field(
        None, gt=0, description="without work for this long, replicas go down to min_replicas even if that is 0"
    )
    decision_log: Path | None = Field(
        None,
        description="file on Serve's controller's machine to which all signals and decisions are appended",
    )

    def limits(self, unit: str) -> Limits:
        """Of a stage (split) or of ``pods`` (colocated)."""
        limits: Limits = getattr(self, unit)
        return limits
