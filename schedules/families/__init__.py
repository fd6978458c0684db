"""The families of schedules, one per file: a builder and, below it, its `Family`."""
