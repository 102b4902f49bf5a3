"""The decision log: what the policy was told and what it decided, as JSON lines; and whether the pure policy, told the
same again, decides the same::

    python -m serve_app.scaling.replay LOG

A line is a ``Begin``, where a policy starts or its configuration changes, or an ``Entry``, a decision. Ends with status
1 where a decision differs, with 2 where the file is no such log.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from serve_app.scaling.config import ScalingSettings
from serve_app.scaling.load import Signals
from serve_app.scaling.policy import Decision, State, decide


@dataclass(frozen=True, slots=True)
class Begin:
    """What follows is decided by this configuration, from this state."""

    config: ScalingSettings
    state: State = field(default_factory=State)


@dataclass(frozen=True, slots=True)
class Entry:
    """now: Unix time."""

    now: float
    signals: Signals
    decision: Decision


@dataclass(frozen=True, slots=True)
class Difference:
    """line: of the log, from 1."""

    line: int
    recorded: Decision
    replayed: Decision


_LINE: TypeAdapter[Begin | Entry] = TypeAdapter(Begin | Entry)


class DecisionLog:
    """Appends to the file, which is made where it is missing. Raises OSError where it cannot be written."""

    def __init__(self, path: Path, begin: Begin):
        self._file = path.open("ab")
        self.write(begin)

    def write(self, line: Begin | Entry) -> None:
        self._file.write(_LINE.dump_json(line) + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Iterator[Begin | Entry]:
    """Raises OSError where the file cannot be read, ValueError with the number of a line that is none of a log."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield _LINE.validate_json(line)
            except ValidationError:
                raise ValueError(f"{path}, line {number}: not a line of a decision log") from None


def replay(path: Path) -> tuple[int, list[Difference]]:
    """How many decisions the log has, and those that the policy does not make from its signals. Raises as ``read``."""
    config: ScalingSettings | None = None
    state, count, differences = State(), 0, []
    for number, line in enumerate(read(path), start=1):
        if isinstance(line, Begin):
            config, state = line.config, line.state
            continue
        if config is None:
            raise ValueError(f"{path}, line {number}: a decision, but no configuration before it")
        state, decision = decide(config, state, line.signals, line.now)
        count += 1
        if decision != line.decision:
            differences.append(Difference(number, line.decision, decision))
    return count, differences


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m serve_app.scaling.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("log", type=Path)
    options = parser.parse_args()
    try:
        count, differences = replay(options.log)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for each in differences:
        print(f"line {each.line}:\n  recorded {each.recorded}\n  replayed {each.replayed}")
    print(f"{count - len(differences)} of {count} decisions are the same")
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
