"""The tables of worth say what a walk over all shapes says."""

from hypothesis import given
from hypothesis import strategies as st

from scheduler.placement.demand import DEVICE_MILLI, Shape
from scheduler.placement.fragmentation import POPULARITY, DeviceKind, Values

KIND = DeviceKind("A", 16_000, True)
shapes = st.builds(
    Shape,
    vcpu_milli=st.sampled_from([500, 1000, 4000, 8000]),
    memory_mib=st.just(0),
    gpus=st.integers(0, 4),
    gpu_milli=st.sampled_from([100, 250, 500, 1000]),
    gpu_models=st.sampled_from([(), ("A",), ("B",)]),
    gpu_memory_mib=st.sampled_from([0, 40_000]),
)


def usable(shape: Shape, vcpu_milli: int, free: list[int]) -> list[int]:
    """What of each idle device a shape could use on a host, by its definition."""
    able = [one for one in free if one >= shape.gpu_milli]
    is_apt = shape.gpu_models in ((), ("A",)) and not shape.gpu_memory_mib
    can_run = shape.gpus and is_apt and vcpu_milli >= shape.vcpu_milli and len(able) >= shape.gpus
    return able if can_run else []


# Of up to 19 shapes, each asked for once, no part of 95 % leaves one out.
@given(
    st.lists(shapes.filter(lambda shape: shape.gpus <= 1 or shape.gpu_milli == DEVICE_MILLI), max_size=19, unique=True),
    st.integers(0, 9_000),
    st.lists(st.sampled_from([0, 100, 250, 400, 500, 1000]), max_size=8),
)
def test_worth_is_popularity_times_what_is_usable(kinds: list[Shape], vcpu_milli: int, free: list[int]) -> None:
    """For every shape that can run on the host, its popularity times the idle parts that it could use, in millionths."""
    values = Values([(shape, 1) for shape in kinds], (DeviceKind("", -1, False), KIND))
    each = POPULARITY // max(1, len(kinds))
    wanted = sum(one * each // DEVICE_MILLI for shape in kinds for one in usable(shape, vcpu_milli, free))
    assert values.of_host(1, values.level_of(vcpu_milli), free) == wanted
    assert values.of_host(0, values.level_of(vcpu_milli), free) == 0
