"""Models and hardware: their data, and the time that loads and steps take."""
