from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from k8s.cluster import ApiUnreachable
from k8s.exits import Ending, Exit
from k8s.leader import GIVE_UP_S, KEPT, LEASE_S, RENEW_S, Elector
from tests.k8s.apiserver import CONTROLLER, LEASES, ApiServer
from tests.k8s.controller import LEASE, NAMESPACE, RULES, Operator
from tests.k8s.test_apiserver import connected


@dataclass
class Candidates:
    """Electors of one Lease, each with a clock of its own that goes at the same pace."""

    api: client.ApiClient
    now: float = 1000.0
    ended: list[tuple[Exit, str]] = field(default_factory=list)

    def __call__(self, name: str, *, ahead: float = 0.0) -> Elector:
        return Elector(
            api=self.api,
            namespace=NAMESPACE,
            lease=LEASE,
            identity=name,
            ended=lambda exit, why: self.ended.append((exit, why)),
            clock=lambda: self.now + ahead,
        )


@pytest.fixture
def candidates(server: ApiServer, tmp_path: Path) -> Candidates:
    return Candidates(connected(server, tmp_path, CONTROLLER))


def test_the_first_leads_and_renews_the_second_waits(candidates: Candidates, operator: Operator) -> None:
    one, two = candidates("one"), candidates("two", ahead=5000.0)
    assert (one.attempt(), two.attempt()) == ("leading", "standby")
    assert (one.leading, two.leading) == (True, False)
    acquired = operator.lease()["spec"]
    for _ in range(3 * LEASE_S):
        candidates.now += RENEW_S
        assert (one.attempt(), two.attempt()) == ("leading", "standby")
    spec = operator.lease()["spec"]
    assert spec["holderIdentity"] == "one"
    assert (spec["acquireTime"], spec["leaseTransitions"]) == (acquired["acquireTime"], 0)
    assert spec["renewTime"] > acquired["renewTime"]


def test_who_does_not_renew_is_followed_after_the_lease_not_before(candidates: Candidates, operator: Operator) -> None:
    one, two = candidates("one"), candidates("two")
    one.attempt()
    one.keep("what was learned")
    one.attempt()
    seconds = 0.0
    while two.attempt() != "leading":
        assert one.leading or seconds >= LEASE_S
        candidates.now += RENEW_S
        seconds += RENEW_S
    assert LEASE_S <= seconds <= LEASE_S + 2 * RENEW_S
    assert (one.leading, two.leading) == (False, True)
    assert two.kept == "what was learned"
    lease = operator.lease()
    assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]) == ("two", 1)
    assert lease["metadata"]["annotations"] == {KEPT: "what was learned"}
    assert one.attempt() == "standby"  # it comes back and finds another


def test_a_lease_that_is_given_back_is_taken_at_once(candidates: Candidates, operator: Operator) -> None:
    one, two = candidates("one"), candidates("two")
    one.start()
    assert two.attempt() == "standby"
    one.stop()
    assert not one.leading
    assert operator.lease()["spec"]["holderIdentity"] == ""
    assert two.attempt() == "leading"
    assert candidates.ended == []


def test_who_was_slower_in_taking_it_waits(candidates: Candidates, server: ApiServer, operator: Operator) -> None:
    one, two = candidates("one"), candidates("two")
    # both have seen that there is none
    read = two._read
    assert read() is None
    one.attempt()
    two._read = lambda: None  # type: ignore[method-assign]
    assert two.attempt() == "conflict"
    two._read = read  # type: ignore[method-assign]
    assert two.attempt() == "standby"
    assert operator.lease()["spec"]["holderIdentity"] == "one"


def test_a_lease_that_was_made_by_hand_is_taken(candidates: Candidates, operator: Operator) -> None:
    operator("create", LEASES, "leases", body={"metadata": {"name": LEASE}})
    assert candidates("one").attempt() == "leading"


def test_without_permission_or_server_it_says_so(candidates: Candidates, server: ApiServer, operator: Operator) -> None:
    server.rules = [rule for rule in RULES if rule.resource != "leases"]
    with pytest.raises(Ending, match="cannot get resource") as ending:
        candidates("one").attempt()
    assert ending.value.exit is Exit.FORBIDDEN
    server.rules = list(RULES)
    server.fall("failing")
    with pytest.raises(ApiUnreachable, match="503"):
        candidates("one").attempt()
    server.stop()
    with pytest.raises(ApiUnreachable, match=LEASE):
        candidates("one").attempt()


Step = tuple[int, Literal["attempt", "wait", "fall", "rise", "steal"], float]
STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["attempt"] * 6 + ["wait"] * 3 + ["fall", "rise", "steal"]),
              st.floats(0.1, 2 * LEASE_S)),
    max_size=20,
)  # fmt: skip


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_never_do_two_lead(server: ApiServer, candidates: Candidates, operator: Operator, steps: list[Step]) -> None:
    """Whatever the order in which they try, time passes, the API fails and others write."""
    operator.forget_lease()
    server.fall(None)
    electors = [candidates(f"{number}", ahead=1000.0 * number) for number in range(3)]
    for who, what, seconds in steps:
        match what:
            case "attempt":
                attempt(electors[who])
            case "wait":
                candidates.now += seconds
            case "fall":
                server.fall("failing")
            case "rise":
                server.fall(None)
            case "steal":
                operator.touch_lease()
        assert sum(elector.leading for elector in electors) <= 1
    # and once all is well one of them does
    server.fall(None)
    for _ in range(2):
        for elector in electors:
            attempt(elector)
        candidates.now += LEASE_S + RENEW_S
    for elector in electors:
        attempt(elector)
    assert sum(elector.leading for elector in electors) == 1


def attempt(elector: Elector) -> Any:
    try:
        return elector.attempt()
    except (ApiUnreachable, ApiException) as error:
        return error


def test_times_leave_no_gap_for_two() -> None:
    """Who gives up has ended before another may lead, and another leads within ten seconds of a death."""
    assert GIVE_UP_S + RENEW_S < LEASE_S
    assert LEASE_S + 2 * RENEW_S + 1 < 10
