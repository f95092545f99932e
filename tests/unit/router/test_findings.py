"""How all of it is, from how each thing is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.checks import DISK, LAG, POOL
from router.findings import Condition, Finding, Report, Scale

_FINDINGS = st.lists(
    st.builds(Finding, st.sampled_from("abc"), st.sampled_from(["", "x"]), st.sampled_from(list(Condition)))
)


@given(_FINDINGS)
def test_the_whole_is_as_the_worst_of_what_is_known(findings: list[Finding]) -> None:
    known = [finding.condition for finding in findings if finding.condition is not Condition.UNKNOWN]
    assert Report.of(findings).overall is max(known, default=Condition.UNKNOWN)


@given(_FINDINGS)
def test_the_order_of_findings_does_not_depend_on_when_they_came(findings: list[Finding]) -> None:
    keys = [finding.key for finding in Report.of(reversed(findings)).findings]
    assert keys == [finding.key for finding in Report.of(findings).findings] == sorted(keys)


@pytest.mark.parametrize(
    ("scale", "figure", "expected"),
    [
        (DISK, 1.0, Condition.HEALTHY),
        (DISK, 0.101, Condition.HEALTHY),
        (DISK, 0.10, Condition.DEGRADED),
        (DISK, 0.051, Condition.DEGRADED),
        (DISK, 0.05, Condition.UNHEALTHY),
        (DISK, 0.0, Condition.UNHEALTHY),
        (POOL, 15 / 16, Condition.HEALTHY),
        (POOL, 1.0, Condition.DEGRADED),
        (LAG, 14_999, Condition.HEALTHY),
        (LAG, 15_000, Condition.DEGRADED),
        (LAG, 10_000_000, Condition.DEGRADED),
        (Scale(1, 2), 2, Condition.UNHEALTHY),
    ],
)
def test_where_a_figure_is_no_longer_well(scale: Scale, figure: float, expected: Condition) -> None:
    assert scale.condition(figure) is expected
