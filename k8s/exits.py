"""How the controller ends: each status says what an operator has to look after."""

from __future__ import annotations

import logging
import os
import sys
from enum import IntEnum
from typing import NoReturn

logger = logging.getLogger(__name__)


class Exit(IntEnum):
    DONE = 0  # it was told to end
    FAILED = 1  # a mistake of the controller's own
    CONFIG = 2  # the configuration file, or its port
    FORBIDDEN = 3  # RBAC refuses what the controller needs
    NO_CRD = 4  # KubeRay's RayService is not known to the API server
    NO_PROMETHEUS = 5  # at the start Prometheus did not answer the controller's query
    API_LOST = 6  # the API server does not answer
    LEADERSHIP_LOST = 7  # the Lease could not be renewed, or another holds it


class Ending(Exception):
    """The process cannot go on."""

    def __init__(self, exit: Exit, why: str):
        super().__init__(why)
        self.exit = exit


def end_now(exit: Exit, why: str) -> NoReturn:
    """Ends the process from any of its threads, whatever the others do: who has lost the leadership must not ask
    Serve for anything any more."""
    logger.critical("%s: %s", exit.name.lower(), why)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(exit)
