"""A harness that times one neuron layer, or a whole training step, for every provider of it that there is.

workload -> provider -> correctness -> timing -> rows. A suite is a list of jobs: a workload, and what to measure of it.
"""
