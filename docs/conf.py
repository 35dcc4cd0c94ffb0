"""Sphinx: ``make docs`` builds the pages of this folder and the API reference into out/docs."""

from inductor_vision.version import __version__

project = "inductor_vision"
author = "the authors of inductor_vision"
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_parser"]
html_theme = "furo"
html_title = f"inductor_vision {version}"

myst_heading_anchors = 3  # [text](page.md#a-heading), as on GitHub

autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

# Every reference must resolve, but for those into other projects: a build downloads no inventories of theirs.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|torchvision|nn|pathlib|os|collections)\..*"),
    ("py:class", r"Any|Callable|Mapping|Sequence|Tensor|PathLike|bool|dict|float|int|list|str|tuple"),
    ("py:exc", r"\w+Error"),
]
