"""How things look to people: 80 columns, no colour unless a terminal asks for it, nothing of a guest's reaches a terminal raw."""
