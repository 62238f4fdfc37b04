"""Every tolerance beside what its check sees where nothing is wrong, and of planted faults."""
