"""Compare the settings of a run's processes, and end them all when one of them fails or is lost."""
