"""The site of the documentation, built by `make docs`: guide, reference from docstrings, background.

Pages are Markdown that reads as well on GitHub. Two things are made here: links to files of the repository outside of
docs/ become addresses of the repository, and `{commands}` writes what the command's own --help says.
"""

import os
import re
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import typer
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).parents[1]
DOCS = Path(__file__).parent
PACKAGE = metadata("heterostep")
REPOSITORY = dict(url.split(", ") for url in PACKAGE.get_all("Project-URL", []))["Repository"]

project = "heterostep"
author = "the heterostep authors"
project_copyright = author
version = release = PACKAGE["Version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
# The anchors that GitHub gives to headings.
myst_heading_anchors = 4
# Quotation marks stay as they are written; -- is a dash.
smartquotes_action = "D"
# `names` in docstrings: links where they are known, code elsewhere.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
python_display_short_literal_types = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "heterostep"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}

# The target of a link in Markdown that is no picture.
_LINK = re.compile(r"(?<!!)(\[(?:[^\[\]]|\[[^\[\]]*\]|!\[[^\]]*\]\([^)]*\))*\]\()(\.\.?/[^)#\s]*)(#[^)\s]*)?\)")


def link_to_repository(app: Sphinx, name: str, source: list[str]) -> None:
    """Let links out of docs/ lead to the repository: these files are no pages of the site."""
    page = Path(app.env.doc2path(name))

    def resolved(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(page.parent / match[2]))
        if path.is_relative_to(DOCS) or not path.exists():
            return match[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"{match[1]}{REPOSITORY}/{kind}/main/{path.relative_to(ROOT).as_posix()}{match[3] or ''})"

    source[0] = _LINK.sub(resolved, source[0])


class Commands(SphinxDirective):
    """A section for each command, of what its --help says."""

    def run(self) -> list[nodes.Node]:
        # As in the command, torch and diffusers are not needed.
        from heterostep.cli import app

        group: Any = typer.main.get_command(app)
        lines: list[str] = []
        for name, command in group.commands.items():
            context = command.make_context(name, [], resilient_parsing=True)
            lines += [f"## heterostep {name}", "", command.help, "", f"```{{program}} heterostep {name}", "```", ""]
            for parameter in command.get_params(context):
                record = parameter.get_help_record(context)
                if record is None:  # hidden
                    continue
                # "What it is.  [default: 1]  [x>=1]"
                words, *known = record[1].split("  [")
                notes = "; ".join(note.removesuffix("]") for note in known)
                text = f"{words} *({notes})*" if notes else words
                lines += [f"```{{option}} {record[0]}", re.sub(r"(--[\w-]+)", r"`\1`", text), "```", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def find_by_last_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Element) -> Any:
    """`Adapter` in a docstring is heterostep.models.Adapter, if no other public name ends so."""
    if node.get("refdomain") != "py":
        return None
    python = env.domains.python_domain
    found = python.find_obj(env, None, None, node["reftarget"], None, 1)
    if len(found) != 1:
        return None
    (name, entry), *_ = found
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, shown, name)


def without_factories(
    app: Sphinx, kind: str, name: str, found: Any, options: Any, signature: str | None, returns: str | None
) -> Any:
    """`<factory>`, as dataclasses print it, is no Python, and leaves a signature without its links."""
    return signature and (signature.replace("<factory>", "..."), returns)


def setup(app: Sphinx) -> dict[str, bool]:
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.add_directive("commands", Commands)
    app.connect("missing-reference", find_by_last_name)
    app.connect("autodoc-process-signature", without_factories)
    app.connect("source-read", link_to_repository)
    return {"parallel_read_safe": True}
