"""One module per verb; each exports `command`, and is imported only when its verb runs."""
