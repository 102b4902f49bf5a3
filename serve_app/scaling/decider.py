"""The policy with its state and its decision log: what both mounts hold."""

from __future__ import annotations

from serve_app.scaling.config import ScalingSettings
from serve_app.scaling.load import Signals
from serve_app.scaling.policy import Decision, State, carried, decide
from serve_app.scaling.replay import Begin, DecisionLog, Entry


class Decider:
    """state: where the policy starts from. For one thread."""

    def __init__(self, config: ScalingSettings, state: State | None = None):
        self._config = config
        self.state = State() if state is None else state
        self._log: DecisionLog | None = None

    def decide(self, signals: Signals, now: float) -> Decision:
        """Also appends to the log that the settings name. Raises OSError where that cannot be written, and as
        ``policy.decide``."""
        path = self._config.decision_log
        if self._log is None and path is not None:
            self._log = DecisionLog(path, Begin(self._config, self.state))
        self.state, decision = decide(self._config, self.state, signals, now)
        if self._log is not None:
            self._log.write(Entry(now, signals, decision))
        return decision

    def reconfigure(self, config: ScalingSettings) -> None:
        """Other settings from now on; what was learned is kept where it still holds."""
        self.state = carried(self.state, self._config, config)
        self._config = config
        if self._log is not None:
            self._log.close()
            self._log = None
