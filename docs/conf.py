"""The documentation site: ``python -m sphinx -W -b html docs build/site``. It reads no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("LIBMTL_FAIR_SMOKE", "1")  # tutorials are executed with few rows and epochs
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
os.environ.update(MPLBACKEND="Agg", PYDEVD_DISABLE_FILE_VALIDATION="1")

import generated  # noqa: E402

import libmtl_fair  # noqa: E402

project, author, copyright = "libmtl_fair", "the authors of libmtl_fair", "the authors of libmtl_fair, MIT licence"
version = release = libmtl_fair.__version__
extensions = [
    "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_nb", "sphinx_design", "sphinx_copybutton", "generated", "formulas",
]  # fmt: skip
exclude_patterns = ["conf.py", "generated.py", "formulas.py", "check_pages.py", "jupyter_execute"]
templates_path = ["_templates"]

generated.write(HERE)

html_theme = "pydata_sphinx_theme"
html_math_renderer = "pictures"  # of formulas.py: no script of another site
html_title = "libmtl_fair"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": {"**": ["page-toc"], "api/**": []},
    "footer_start": ["copyright"],
    "footer_end": [],
}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = os.environ.get("LIBMTL_FAIR_DOCS_EXECUTE", "force")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"

autosummary_generate = True
autosummary_imported_members = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
numpydoc_xref_param_type = False
numpydoc_validation_checks = {"PR02", "PR04", "PR05", "PR06", "PR07", "PR09", "PR10"}
numpydoc_validation_exclude = {r"\.Settings$", r"Settings$"}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
suppress_warnings = ["myst.header", "config.cache"]
