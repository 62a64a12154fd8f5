"""The user's `jcard.toml`, read here and nowhere else: what is wrong in it, and the spec it becomes."""
