"""A harness that times one neuron layer, or a whole training step, with every provider that can run it.

A workload is run by a provider, checked by ``correctness``, timed by ``timing`` and written down by ``rows``. A suite
is a list of jobs, each of which says what to measure of a workload.
"""
