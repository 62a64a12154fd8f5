"""The agent inside each guest: first process of the real root, Python standard library only (docs/guest-link.md).

    __main__ -> loop -> guest -> workload, workspace, artifact, machine -> configuration, state -> link, fault

It imports little and keeps records in plain classes: on an emulated CPU `dataclasses` and `typing` alone cost 0.4 s of each boot.
"""

# Told in `hello`; the same as the distribution's, which a test compares.
VERSION = "0.1.0"
# User and group of every agent: `agent` of provisioning/recipes/base.toml.
AGENT_ID = 1001
