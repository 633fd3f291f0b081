"""Write README.md and the pictures from the results beside this file: ``python docs/reproduction/page.py``."""

from __future__ import annotations

from pathlib import Path

from klif_sj.training.reports.reproduction_page import write_page

if __name__ == "__main__":
    write_page(Path(__file__).parent)
