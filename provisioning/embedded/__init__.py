"""A whole Bedplate on one machine, in private namespaces, that leaves no trace: for the demo, for tests, for a first look."""
