"""Temperature schedules: fixed values, limits and validation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core import TemperatureSchedule
from dmtg_core.training.settings import FAMILIES

# family → values from 4 to 1 at progress 0, 1/4, 1/2, 1
TABLE = {
    "constant": (4.0, 4.0, 4.0, 4.0),
    "linear": (4.0, 3.25, 2.5, 1.0),
    "cosine": (4.0, 3.560660, 2.5, 1.0),  # 1 + 1.5 · (1 + cos(π/4))
    "exponential": (4.0, 2.828427, 2.0, 1.0),  # 4 · (1/4)^t
}


@pytest.mark.parametrize("family", FAMILIES)
def test_values_at_fixed_moments(family):
    schedule = TemperatureSchedule(family, 4.0, 1.0)
    assert [schedule(t) for t in (0, 0.25, 0.5, 1)] == pytest.approx(TABLE[family], abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_warmup_keeps_the_start_and_then_reaches_the_end(family):
    schedule = TemperatureSchedule(family, 4.0, 1.0, warmup=0.5)
    assert [schedule(t) for t in (0, 0.3, 0.5)] == [4.0] * 3
    assert schedule(0.75) == pytest.approx(TABLE[family][2])
    assert schedule(1.0) == pytest.approx(TABLE[family][3])


@pytest.mark.parametrize("family", FAMILIES)
def test_progress_outside_the_run_is_clamped(family):
    schedule = TemperatureSchedule(family, 4.0, 1.0)
    assert schedule(-3) == schedule(0)
    assert schedule(7) == schedule(1)


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    ends=st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)),
    warmup=st.floats(0, 0.95),
    moments=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_temperature_is_monotone_and_stays_between_its_ends(family, ends, warmup, moments):
    start, end = ends
    schedule = TemperatureSchedule(family, start, end, warmup)
    early, late = (schedule(t) for t in sorted(moments))
    slack = 1e-9 * max(ends)
    assert min(ends) - slack <= early <= max(ends) + slack
    assert (late - early) * (end - start) >= -slack * 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "step"}, "unknown temperature schedule 'step'.*constant"),
        ({"start": 0.0}, "must be positive, got start=0.0"),
        ({"end": -1.0}, "must be positive.*end=-1.0"),
        ({"start": float("nan")}, "must be positive"),
        ({"warmup": 1.0}, r"\[0, 1\), got 1.0"),
        ({"warmup": -0.1}, r"\[0, 1\), got -0.1"),
    ],
)
def test_impossible_schedules_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TemperatureSchedule(**values)
