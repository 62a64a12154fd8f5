"""Behind a choice: the best hosts with every term of their scores, what excludes the others, what would make it fit. PURE."""

from dataclasses import dataclass

import numpy as np

from fleet.model.assignment import RefusalReason
from fleet.model.explanation import ExcludedHosts, RankedHost, ScoreTerm
from scheduler.placement.columns import Ints
from scheduler.placement.demand import Wish
from scheduler.placement.neighbourhood import Neighbourhood
from scheduler.placement.refusals import FILTERS, first_excluding, look_at, refuse
from scheduler.placement.rows import Row

# Hosts that are told by name for one filter; the counts say how many there are.
EXCLUDED_MAX = 10


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is behind a decision: `ranking` is empty where there is a refusal, and then `reasons` say why."""

    considered: int
    able: int
    ranking: tuple[RankedHost, ...]
    excluded: tuple[ExcludedHosts, ...]
    reasons: tuple[RefusalReason, ...]


def explain(row: Row, near: Neighbourhood, wish: Wish, hosts_max: int) -> Explanation:
    """The `hosts_max` best hosts for a sandbox with every term, and each excluded host under its filter."""
    look = look_at(row, wish)
    first = first_excluding(look)
    able = look.places[first == len(FILTERS)]
    return Explanation(
        considered=len(look.places),
        able=len(able),
        ranking=_rank(row, near, wish, able, hosts_max),
        excluded=_excluded(row, wish, first),
        reasons=() if len(able) else refuse(row, wish),
    )


def _rank(row: Row, near: Neighbourhood, wish: Wish, able: Ints, hosts_max: int) -> tuple[RankedHost, ...]:
    terms: dict[str, Ints] = {}
    row.evaluate(able, terms)
    scores = near.scores(row, wish, able, terms)
    ids = row.hosts.ids
    best = sorted(range(len(able)), key=lambda at: (-int(scores[at]), int(able[at])))[:hosts_max]
    return tuple(
        RankedHost(
            ids[int(able[at])],
            int(scores[at]),
            tuple(ScoreTerm(name, int(values[at])) for name, values in sorted(terms.items()) if values.any()),
        )
        for at in best
    )


def _excluded(row: Row, wish: Wish, first: Ints) -> tuple[ExcludedHosts, ...]:
    look = look_at(row, wish)
    passes = np.array([one.passes(look) for one in FILTERS])
    failed = (~passes).sum(axis=0)
    found = []
    for number, one in enumerate(FILTERS):
        places = look.places[first == number]
        if len(places):
            only = int(((failed == 1) & ~passes[number]).sum())
            names = tuple(row.hosts.ids[place] for place in places[:EXCLUDED_MAX].tolist())
            found.append(ExcludedHosts(one.code, len(places), names, only))
    return tuple(found)
