"""The command line: turns a jcard into a spec, asks a scheduler for a sandbox, shows what came of it."""
