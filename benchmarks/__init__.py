"""What is measured, and how: one module each, run by `./dev bench NAME`. Figures are stated as measured, never asserted."""
