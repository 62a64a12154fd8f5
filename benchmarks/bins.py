"""The fewest hosts that carry a set of sandboxes, by CP-SAT. Run by optimum.py in an environment of its own.

Reads {"bin": [whole of each dimension], "demands": [[need of each dimension], …], "at_most": hosts, "timeout_s": seconds} from
stdin; prints {"bins": hosts of the best packing found, "bound": hosts without which none can do, "seconds": …}.
"""

import json
import sys
from typing import Any

from ortools.sat.python import cp_model

# The packings found are the same on every run.
SEED = 1


def main() -> int:
    """Solves one instance."""
    print(json.dumps(solve(json.load(sys.stdin))))
    return 0


def solve(instance: dict[str, Any]) -> dict[str, Any]:
    """One variable for each sandbox and host; hosts are used from the first on, the sandboxes' order breaks what is symmetric."""
    demands, whole, most = instance["demands"], instance["bin"], instance["at_most"]
    model = cp_model.CpModel()
    used = [model.new_bool_var(f"used-{host}") for host in range(most)]
    # The first sandbox is on the first host, the second on one of the first two, and so on.
    on = [[model.new_bool_var("") if host <= number else 0 for host in range(most)] for number in range(len(demands))]
    for row in on:
        model.add_exactly_one([one for one in row if not isinstance(one, int)])
    for host in range(most):
        for dimension, amount in enumerate(whole):
            load = sum(demand[dimension] * on[number][host] for number, demand in enumerate(demands))
            model.add(load <= amount * used[host])
        if host:
            model.add_implication(used[host], used[host - 1])
    model.minimize(sum(used))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = instance["timeout_s"]
    solver.parameters.random_seed = SEED
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise RuntimeError(f"CP-SAT found no packing: {solver.status_name(status)}")
    bound = -(-round(solver.best_objective_bound * 1000) // 1000)
    return {"bins": round(solver.objective_value), "bound": bound, "seconds": round(solver.wall_time, 2)}


if __name__ == "__main__":
    sys.exit(main())
