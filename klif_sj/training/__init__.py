"""Train networks, compare neurons and reproduce results. The package needs the ``train`` extra.

The command line reads :mod:`.recipe`, :mod:`.data.catalogue` and :mod:`.reports.paper_tables` first. These modules are
imported quickly and do not need the extra.
"""
