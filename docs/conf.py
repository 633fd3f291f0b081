"""Sphinx's settings: ``make docs`` builds the pages of this folder and the API reference into docs/_build/html."""

from __future__ import annotations

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import klif_sj

project = "klif_sj"
version = release = klif_sj.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
exclude_patterns = ["_build", "reproduction/results"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
maximum_signature_line_length = 90
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"klif_sj {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"


def mathml(latex: str, display: str) -> str:
    # The converter prints the backslash of an escaped underscore.
    return latex2mathml.converter.convert(latex.replace(r"\_", "_"), display=display)


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    latex = node.astext().strip()
    if "&" in latex:
        latex = rf"\begin{{align*}} {latex} \end{{align*}}"
    self.body.append(f'<div class="math">{mathml(latex, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register MathML, which every browser draws by itself: the pages need neither a script nor a font."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
