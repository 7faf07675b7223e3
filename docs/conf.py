"""How Sphinx builds the documentation: run `tools/docs`."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import pyopt

project = "pyopt"
version = release = pyopt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "docstrings"]

# What pages are made of. Links to headings are those that a repository's own view has too.
myst_heading_anchors = 3
default_role = "py:obj"
smartquotes = False
highlight_language = "none"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# The bridges to them are described without them too.
autodoc_mock_imports = [name for name in ("jax", "sklearn", "thinc", "srsly", "mpi4py") if find_spec(name) is None]

# How they look.
html_theme = "furo"
html_title = "pyopt"
html_static_path = ["style"]
html_css_files = ["pyopt.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
