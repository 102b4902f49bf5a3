"""Writes Grafana's dashboards into the chart's folder; a test holds what lies there against what this writes."""

from __future__ import annotations

from pathlib import Path

from loadtest.dashboards.boards import boards

FOLDER = Path(__file__).resolve().parents[2] / "helm" / "whisper-serve" / "dashboards"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    written = boards()
    for old in FOLDER.glob("*.json"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
