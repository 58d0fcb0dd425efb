"""Sphinx configuration: MyST pages, the API from its docstrings, warnings are errors."""

import sys
from pathlib import Path

import vrep

sys.path.insert(0, str(Path(__file__).parent))
from generate import write_pages

project = "vrep"
author = "the vrep maintainers"
project_copyright = "the vrep maintainers"
version = release = vrep.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["internals/model/*"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "vrep"

write_pages(Path(__file__).parent)

# Attributes named `bytes` make the builtin of that name ambiguous to Sphinx.
suppress_warnings = ["ref.python"]
