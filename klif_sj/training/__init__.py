"""Training, comparing and reproducing. Needs the ``train`` extra, but for what the command line reads first.

That is light to import: :mod:`.recipe`, :mod:`.data.catalogue` and :mod:`.reports.paper_tables`.
"""
