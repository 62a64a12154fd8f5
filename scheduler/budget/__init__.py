"""Budgets: who pays for a sandbox, what accounts may use at once and in total, and what they have used."""
