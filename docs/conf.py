"""The site: `python -m sphinx -W -b html docs docs/_build/html` (the extra `docs`)."""

import pathlib
import sys
import tomllib

DOCS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import pages  # noqa: E402

import wsparse  # noqa: E402

metadata = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
project = metadata["name"]
author = copyright = "The wsparse developers"
release = version = wsparse.__version__
html_title = f"{project} {release}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
highlight_language = "none"

# Headings are linked to as on the repository's web view.
myst_heading_anchors = 3
# Tests run the notebooks; `-D nb_execution_mode=force` puts their outputs on the site.
nb_execution_mode = "off"

# What stands between single backticks in a docstring is a name of the package where there is one.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False
# A public name is also that of the module that defines it: types may be either.
suppress_warnings = ["ref.python"]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True


def setup(app):
    """Writes the pages that are made from the package, and has links lead to pages of the site."""
    site = pages.Site(DOCS.parent, metadata["urls"]["Repository"])
    app.connect("builder-inited", lambda app: site.write())
    app.connect("source-read", lambda app, name, source: site.read(name, source))
    app.connect("autodoc-process-docstring", pages.without_docstring)
    app.connect("autodoc-skip-member", pages.is_foreign)
