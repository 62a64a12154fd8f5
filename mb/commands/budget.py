"""`mb budget`: what a tenant's accounts may use, have set aside and have used."""

from mb.cli import LazyGroup

command = LazyGroup(
    "budget",
    verbs={
        "ls": ("mb.commands.budget_ls", "List accounts with what they use."),
        "show": ("mb.commands.budget_show", "One account: limits, use, and what is left."),
        "set": ("mb.commands.budget_set", "Set limits of an account, or make one."),
        "rm": ("mb.commands.budget_rm", "Remove an account that nothing uses."),
        "forecast": ("mb.commands.budget_forecast", "When does what run out at the present rate."),
        "prices": ("mb.commands.budget_prices", "What a unit costs; operators set it."),
    },
    help="Budgets: accounts of a tenant, their limits, and what they use.",
)
