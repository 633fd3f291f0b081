"""``python -m klif_sj`` is ``klif-sj``."""

import sys

from .cli import main

sys.exit(main())
