"""Looks at a shard or the cluster to draw from."""

from hypothesis import strategies as st

from common.vitals import Vitals

SHARE = st.floats(0, 1)
ANY_VITALS = st.builds(
    Vitals,
    error_rate=SHARE,
    p99_latency_s=st.floats(0, 5),
    shed_share=SHARE,
    open_breakers=SHARE,
    pool_use=SHARE,
    cpu=SHARE,
    memory=SHARE,
    writes_down=st.booleans(),
)
