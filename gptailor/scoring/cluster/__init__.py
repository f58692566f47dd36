"""Many devices for one search: Dask workers that score trials, here, elsewhere or as jobs of a cluster.

The engine stays the only one that asks SMAC and writes the run's store. A worker opens the run's family once, is sent
plans and numbers of examples, and sends back what each example gave: a few kilobytes either way. Queueing, lost workers
and their tasks, workers that come and go are Dask's; nothing else in gptailor imports it.
"""
