"""Many sandboxes of one spec: what they are called, and that each has its answer."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from fleet.errors import BedplateError, InvalidSpecError, UnavailableError
from fleet.model.admission import GROUP_SIZE_MAX, refusals
from fleet.model.assignment import Sandbox
from fleet.model.ids import SandboxId, is_sandbox_id
from fleet.model.sandbox import Agent, Placement, SandboxSpec
from mb.copies import Creation, copies_of, create_copies
from tests.unit.mb.build import sandbox

FIRST = SandboxId("abcdefghijkl")
SPEC = SandboxSpec("box", agents=(Agent("one", "custom", ("true",)),))


def test_copies_are_numbered_and_their_ids_follow_from_the_first() -> None:
    """The same request has the same names and ids; another number of them begins with the same ones."""
    made = copies_of(SPEC, FIRST, 3, is_gang=False)
    assert [spec.name for _, spec in made] == ["box-0", "box-1", "box-2"]
    assert made == copies_of(SPEC, FIRST, 5, is_gang=False)[:3]
    ids = {sandbox_id for sandbox_id, _ in made}
    assert len(ids) == 3
    assert all(map(is_sandbox_id, ids))


def test_a_gang_is_one_group_that_is_admitted() -> None:
    """All are of the group and say its size, up to the largest there is."""
    made = copies_of(SPEC, FIRST, GROUP_SIZE_MAX, is_gang=True)
    assert {spec.placement for _, spec in made} == {Placement(group=f"up-{FIRST}", group_size=GROUP_SIZE_MAX)}
    assert [refusals(spec) for _, spec in made] == [()] * GROUP_SIZE_MAX


@pytest.mark.parametrize(
    ("spec", "number", "code"),
    [
        (replace(SPEC, name="x" * 62), 3, "name_too_long"),
        (SPEC, GROUP_SIZE_MAX + 1, "group_too_large"),
        (replace(SPEC, placement=Placement(group="own", group_size=2)), 2, "group_named"),
    ],
)
def test_what_cannot_be_a_gang(spec: SandboxSpec, number: int, code: str) -> None:
    """Each limit is told before anything is sent, with what to do."""
    with pytest.raises(InvalidSpecError) as caught:
        copies_of(spec, FIRST, number, is_gang=True)
    assert caught.value.code == code
    assert caught.value.next_step


class Flaky:
    """A client whose first call is lost, whose second answers for some, and whose third answers for all."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def create_sandboxes(self, creations: Sequence[Creation]) -> list[Sandbox | BedplateError]:
        self.asked.append(len(creations))
        if len(self.asked) == 1:
            raise UnavailableError("unreachable", "nobody is there", "try again")
        lost = UnavailableError("no_leader", "nobody leads", "try again")
        taken = BedplateError("name_taken", "box-1 is taken", "choose another")
        answers: list[Sandbox | BedplateError] = [sandbox(sandbox_id=one) for one, _ in creations]
        if len(self.asked) == 2:
            answers[0], answers[1] = lost, taken
        return answers


async def test_only_what_has_no_answer_is_asked_for_again() -> None:
    """Lost calls and answers that mean "later" are asked for again; what is refused is not, and each answer is in its place."""
    client, said = Flaky(), list[str]()
    creations = copies_of(SPEC, FIRST, 3, is_gang=False)
    made = await create_copies(client, creations, (0.0, 0.0, 0.0), said.append)  # type: ignore[arg-type]
    assert client.asked == [3, 3, 1]
    assert isinstance(made[1], BedplateError)
    assert [one.sandbox_id for one in made if isinstance(one, Sandbox)] == [creations[0][0], creations[2][0]]
    assert said == ["nobody is there; asking again", "nobody leads; asking again"]
