"""Pure value types: ids, units, sandboxes, hosts and assignments. Standard library only."""
