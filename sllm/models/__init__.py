"""Models and hardware: what they are, and what they cost."""
