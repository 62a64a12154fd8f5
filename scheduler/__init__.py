"""The scheduler: takes wishes in, places sandboxes on hosts, relays bytes. It keeps nothing that is not in the store."""
