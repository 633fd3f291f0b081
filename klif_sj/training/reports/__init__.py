"""Reports on several trainings: a comparison of neurons, and the reproduction of a paper's tables."""
