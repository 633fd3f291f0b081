"""What several trainings say together: a comparison of neurons, and the reproduction of a paper's tables."""
