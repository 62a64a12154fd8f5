"""The whole control plane in one process, on virtual time and with faults, from one seed: docs/simulation.md. Not shipped."""
