"""The egress gateway, a process of its own: what a sandbox may reach is reached through it, and nothing else is."""
