"""One of several controllers acts: it holds a Lease.

The algorithm is that of client-go's leader election. Its port in the ``kubernetes`` package (37) does not fit: it
writes local times without a zone, cannot give the Lease back, and when the API server goes its ``run`` raises while the
work goes on in another thread.

Times of other machines are not compared with this one's: a Lease has expired when it has been seen unchanged for as
long as it says. So clocks may differ.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from k8s.cluster import ApiUnreachable, called, micro_time
from k8s.exits import Ending, Exit

logger = logging.getLogger(__name__)

LEASE_S = 6
"""A leader that has not renewed the Lease for this long is none."""
RENEW_S = 1.0
"""How often the leader renews it, and the others look. So another takes over some 8 s after a leader's death."""
GIVE_UP_S = 4.0
"""A controller that has not reached the API server for this long ends; well before another could lead."""
TIMEOUT_S = 1.5
KEPT = "whisper-serve/policy"
"""Annotation of the Lease: what the leader leaves to the next one."""

Attempt = Literal["leading", "standby", "conflict"]


class Elector:
    """Takes the Lease, or waits for it, on a thread of its own.

    ended: called once, with what has happened, where the leadership or the API server is lost; it ends the process.
    """

    def __init__(
        self,
        *,
        api: client.ApiClient,
        namespace: str,
        lease: str,
        identity: str,
        ended: Callable[[Exit, str], object],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._leases = client.CoordinationV1Api(api)
        self._namespace, self._name, self._identity = namespace, lease, identity
        self._ended, self._now = ended, clock
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elector", daemon=True)
        self._seen: tuple[object, ...] | None = None  # the Lease as another holds it
        self._seen_at = 0.0
        self._reached_at = clock()
        self._renewed_at: float | None = None
        self._keep: str | None = None
        self._kept: str | None = None

    def start(self) -> None:
        """Raises Ending or ApiUnreachable where the first look at the Lease fails."""
        self.attempt()
        self._thread.start()

    @property
    def leading(self) -> bool:
        """Does this controller hold the Lease, for certain? Ask right before anything that only the leader may do."""
        return self._renewed_at is not None and self._now() - self._renewed_at < LEASE_S

    @property
    def kept(self) -> str | None:
        """What the leader before has left. Known once ``leading``."""
        return self._kept

    def keep(self, text: str) -> None:
        """Leaves it to the next leader, with the next renewal."""
        self._keep = text

    def stop(self) -> None:
        """Gives the Lease back, so that another can take it at once."""
        self._stopped.set()
        self._thread.join(timeout=2 * TIMEOUT_S + RENEW_S)
        if self.leading:
            self._renewed_at = None
            try:
                lease = self._read()
                if lease is not None and _spec(lease).holder_identity == self._identity:
                    _spec(lease).holder_identity = ""
                    self._write(lease)
            except (Ending, ApiUnreachable, ApiException) as error:
                logger.warning("the Lease was not given back: %s", error)

    def attempt(self) -> Attempt:
        """Takes, renews or looks at the Lease, once. Raises Ending, ApiUnreachable or ApiException."""
        asked_at = self._now()
        lease = self._read()
        try:
            if lease is None:
                self._create()
            elif _spec(lease).holder_identity == self._identity:
                _spec(lease).renew_time = micro_time()
                self._write(lease)
            elif not self._has_expired(lease, asked_at):
                self._reached_at = asked_at
                return "standby"
            else:
                self._kept = _annotations(lease).get(KEPT)
                lease.spec = self._held(1 + (_spec(lease).lease_transitions or 0))
                self._write(lease)
        except ApiException as error:
            if error.status != 409:
                raise
            self._reached_at = asked_at
            return "conflict"  # another was quicker; what it wrote is looked at next time
        if self._renewed_at is None:
            logger.info("%s leads", self._identity)
        self._reached_at = self._renewed_at = asked_at
        return "leading"

    def _run(self) -> None:
        while not self._stopped.wait(RENEW_S):
            led = self._renewed_at is not None
            why = "the Lease was not renewed"
            try:
                if self.attempt() == "standby" and led:
                    return self._end(Exit.LEADERSHIP_LOST, "another controller holds the Lease")
            except Ending as error:
                return self._end(error.exit, str(error))
            except (ApiUnreachable, ApiException) as error:
                why = str(error)
                logger.warning("%s", why)
            except Exception as error:  # a leader whose renewals have stopped must not go on
                logger.exception("a mistake in the election")
                return self._end(Exit.FAILED, str(error))
            now = self._now()
            if now - self._reached_at > GIVE_UP_S:
                return self._end(Exit.API_LOST, f"the API server has not answered for {GIVE_UP_S:g} s: {why}")
            if self._renewed_at is not None and now - self._renewed_at > GIVE_UP_S:
                return self._end(Exit.LEADERSHIP_LOST, why)

    def _end(self, exit: Exit, why: str) -> None:
        if not self._stopped.is_set():
            self._renewed_at = None
            self._ended(exit, why)

    def _has_expired(self, lease: client.V1Lease, now: float) -> bool:
        """Is it nobody's, or has it been seen unchanged for as long as its holder had?"""
        spec = _spec(lease)
        if not spec.holder_identity:
            return True
        seen = (spec.holder_identity, spec.renew_time, spec.lease_transitions)
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        return now - self._seen_at > (spec.lease_duration_seconds or LEASE_S)

    def _held(self, transitions: int) -> client.V1LeaseSpec:
        now = micro_time()
        return client.V1LeaseSpec(
            holder_identity=self._identity,
            lease_duration_seconds=LEASE_S,
            acquire_time=now,
            renew_time=now,
            lease_transitions=transitions,
        )

    def _read(self) -> client.V1Lease | None:
        try:
            return called(
                f"reading the Lease {self._namespace}/{self._name}",
                lambda: self._leases.read_namespaced_lease(self._name, self._namespace, _request_timeout=TIMEOUT_S),
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    def _create(self) -> None:
        lease = client.V1Lease(
            metadata=client.V1ObjectMeta(name=self._name, namespace=self._namespace), spec=self._held(0)
        )
        called(
            f"creating the Lease {self._namespace}/{self._name}",
            lambda: self._leases.create_namespaced_lease(self._namespace, lease, _request_timeout=TIMEOUT_S),
        )

    def _write(self, lease: client.V1Lease) -> None:
        """With the version that was read: where another has written since, the API server answers 409."""
        if self._keep is not None:
            _annotations(lease)[KEPT] = self._keep
        called(
            f"updating the Lease {self._namespace}/{self._name}",
            lambda: self._leases.replace_namespaced_lease(
                self._name, self._namespace, lease, _request_timeout=TIMEOUT_S
            ),
        )


def _spec(lease: client.V1Lease) -> client.V1LeaseSpec:
    """The Lease's own, made where it has none."""
    if lease.spec is None:
        lease.spec = client.V1LeaseSpec()
    return lease.spec


def _annotations(lease: client.V1Lease) -> dict[str, str]:
    """As ``_spec``."""
    assert lease.metadata is not None  # it was read
    if lease.metadata.annotations is None:
        lease.metadata.annotations = {}
    return lease.metadata.annotations
