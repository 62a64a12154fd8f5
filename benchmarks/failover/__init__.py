"""`./dev bench failover`: a fleet of real processes on machines of their own, hurt in every way, round after round."""
