"""Training and comparing neurons. Needs the ``train`` extra, except for :mod:`klif_sj.training.settings`."""
