"""Settings of Sphinx: ``python -m sphinx -W --keep-going docs OUTPUT`` builds the documentation without a network."""

import re
from importlib.metadata import version as installed_version
from typing import Any

project = "lit_moeedit"
author = "The lit_moeedit authors"
copyright = "The lit_moeedit authors, Apache-2.0"
version = release = installed_version("lit-moeedit")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
# hooks of Lightning are documented there
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False
# fields of data classes would otherwise be described twice
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"lit_moeedit {release}"
exclude_patterns = ["_build"]
suppress_warnings = ["config.cache"]


def fit_links(app: Any, docname: str, source: list[str]) -> None:
    """Give pages of results a title, and turn links that hold in the repository into links between pages."""
    if docname.startswith("results/"):
        source[0] = f"# {docname.removeprefix('results/')}\n\n{source[0]}"
    # docs/results is a link to the folder of benchmarks, which MyST would follow out of the documentation
    source[0] = re.sub(r"\[([^]]*)\]\(\.\./benchmarks/results/(\w+)\.md\)", r"{doc}`\1 </results/\2>`", source[0])
    source[0] = source[0].replace("](../benchmarks/results/", "](results/")
    for name in ("CHANGELOG", "CONTRIBUTING"):
        source[0] = source[0].replace(f"](../{name}.md", f"]({name.lower()}.md")


def setup(app: Any) -> None:
    """Connect what is above."""
    app.connect("source-read", fit_links)
