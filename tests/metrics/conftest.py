from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.metrics.replayed import RECORDINGS, Recording, replayed


@pytest.fixture(scope="session", params=RECORDINGS, ids=lambda path: path.name)
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    """Each of the recordings, in a Prometheus of its own."""
    with replayed(request.param, tmp_path_factory.mktemp("recording")) as found:
        yield found
