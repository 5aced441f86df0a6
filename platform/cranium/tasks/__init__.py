"""What is asked of a backbone: splits that cannot cheat, metrics that own up, statistics."""
