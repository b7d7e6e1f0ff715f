"""The site: `scripts/docs` builds it."""

import datetime
import re
import shutil
from pathlib import Path

import lora_jax

ROOT = Path(__file__).parent.parent
MATHJAX = ROOT / "build" / "docs-static"  # scripts/docs puts the npm package there

project = "lora_jax"
author = "the lora_jax authors"
copyright = f"{datetime.date.today().year}, {author}"
version = release = lora_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

# Blocks are executed by the tests (tests/documentation/), notebooks by theirs. The site shows the outputs that they
# store.
nb_execution_mode = "off"
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

smartquotes_action = "D"  # dashes; other quotes would change code

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "lora_jax"
html_favicon = "_static/favicon.svg"
html_context = {
    "default_mode": "auto",  # light or dark
    "edit_page_provider_name": "GitHub",
    "edit_page_url_template": "https://github.com/lora-jax/lora_jax/edit/main/"
    "{% set source = {'changelog.md': 'CHANGELOG.md', 'contributing.md': 'CONTRIBUTING.md'}[file_name] %}"
    "{{ source or (file_name if file_name.startswith('notebooks/') else 'docs/' + file_name) }}",
}
html_static_path = ["_static", str(MATHJAX)]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "repository_url": "https://github.com/lora-jax/lora_jax",
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_edit_page_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "navbar_persistent": [],  # the search is in the sidebar, on a phone beside the title
    "show_toc_level": 2,
}
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}
copybutton_exclude = ".linenos, .gp, .go"


def copy_notebooks(app) -> None:
    """Copies the notebooks into the source, with their badge as a plain link: a page loads nothing from other hosts."""
    target = Path(app.srcdir) / "notebooks"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = notebook.read_text(encoding="utf-8")
        badge = "![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)"
        (target / notebook.name).write_text(text.replace(badge, "Open in Colab"), encoding="utf-8")


def relink(app, path, docname, content) -> None:
    """Makes links of the repository's changelog and guide for contributors, which pages include, those of the site."""
    if path.name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        for name, target in {"docs/": "", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}.items():
            content[0] = content[0].replace(f"]({name}", f"]({target}")


BACKTICKS = re.compile(r"(:[\w:]+:`[^`]+`|`[^`]+`_+|``.+?``)|`([^`]+)`", re.DOTALL)
"""Roles, links and literals, or code in single backticks."""


def quote_code(app, what, name, obj, options, lines) -> None:
    """Makes `code` in a docstring ``code``, before its sections are divided at colons."""
    text = BACKTICKS.sub(lambda match: match[1] or f"``{match[2]}``", "\n".join(lines))
    lines[:] = text.split("\n")


def setup(app) -> None:
    app.connect("autodoc-process-docstring", quote_code, priority=400)  # before napoleon's 500
    app.connect("builder-inited", copy_notebooks)
    app.connect("include-read", relink)
