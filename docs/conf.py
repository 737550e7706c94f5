"""How the pages are built: ``sphinx-build docs site``, without network."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import shutil
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError
from sphinx.ext.autodoc.preserve_defaults import DefaultValue

import modeconn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for tables.py, of the page of results

project, author, version = "modeconn", "the modeconn developers", modeconn.__version__
copyright = author
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
html_theme, html_title = "furo", "modeconn"
html_math_renderer = "mathml"
html_static_path, html_css_files = ["_static"], ["pages.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1F5F91", "color-brand-content": "#1F5F91"},
    "dark_css_variables": {"color-brand-primary": "#7DB8E0", "color-brand-content": "#7DB8E0"},
}

myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline", "deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

nb_execution_mode = "force"  # of text notebooks, which draw what lies in benchmarks/results
nb_execution_excludepatterns = ["notebooks/*"]  # these come with their outputs; CI runs them
nb_execution_raise_on_error, nb_execution_timeout = True, 60
suppress_warnings = ["misc.highlighting_failure"]  # of shell commands in notebooks
nb_merge_streams = True

smartquotes_action = "qe"  # quotes and ellipses; dashes begin options
default_role = "py:obj"  # of `names` in docstrings
autodoc_typehints, autodoc_typehints_format = "signature", "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "inherited-members": True, "exclude-members": "__init__, __new__"}
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False


def copy_notebooks(app: Any) -> None:
    """Put the notebooks where pages are built from, their links as they are from there."""
    place = HERE / "notebooks"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for path in (HERE.parent / "notebooks").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        moved = text.replace("](../benchmarks/", "](../../benchmarks/").replace("](../docs/", "](../")
        (place / path.name).write_text(json.dumps(_with_words_for_images(json.loads(moved))), encoding="utf-8")


def _with_words_for_images(notebook: dict[str, Any]) -> dict[str, Any]:
    """Name each image by the headings that it stands under, for those who do not see it; myst-nb would take a hash."""
    title = section = ""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for level, text in re.findall(r"^(#+) (.*)", "".join(cell["source"]), flags=re.MULTILINE):
                text = text.replace("`", "")
                title, section = (text, "") if level == "#" else (title, text)
        elif any("image/png" in one.get("data", {}) for one in cell["outputs"]):
            words = f"Figure of “{title}”" + (f": {section}" if section else "")
            cell["metadata"]["mystnb"] = {"image": {"alt": words}}
    return notebook


def link_files(app: Any, name: str, source: list[str]) -> None:
    """Lead links to notebooks to their pages; make those to Markdown elsewhere links to files, as all others are."""
    text = source[0].replace("](../notebooks/", "](notebooks/")
    source[0] = re.sub(r"\]\(((?:\.\./)+(?:benchmarks/[^)]*|[A-Z]+)\.md)\)", r"](<path:\1>)", text)


def write_math(writer: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers show without a script from the network.

    Raises:
        docutils.nodes.SkipNode: Always, since nothing is left to write.
    """
    is_block = isinstance(node, nodes.math_block)
    text = tex2mathml(node.astext(), as_block=is_block)
    writer.body.append(f'<div class="formula">{text}</div>' if is_block else text)
    raise nodes.SkipNode


def keep_options_whole(app: Any, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Keep a window's edge from breaking an option of a command behind its dashes."""
    option = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
    whole = r'<span class="option">\g<0></span>'
    context["body"] = re.sub(
        r'(<div class="highlight-sh .*?<pre>)(.*?)(</pre>)',
        lambda found: found[1] + option.sub(whole, found[2]) + found[3],
        context.get("body", ""),
        flags=re.DOTALL,
    )


def leave_out_inherited(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what classes inherit from Python itself and from torch, and functions that are a field's default."""
    owner = getattr(thing, "__objclass__", None)
    is_inherited = owner in (object, BaseException, Exception, Warning) or _is_of_torch(thing)
    is_default = isinstance(thing, functools.partial) or (inspect.isfunction(thing) and "." not in thing.__qualname__)
    return True if what == "class" and (is_inherited or is_default) else None


def show_defaults(app: Any, thing: Any, is_bound: bool) -> None:
    """Show defaults as they are written: those of dataclasses too, and a private constant by what it holds."""
    if not inspect.isfunction(thing):
        return
    module = sys.modules[thing.__module__]
    fields = _defaults_of_fields(module, thing.__qualname__.removesuffix(".__init__"))
    constants = _constants(inspect.getsource(module))
    signature, shown = inspect.signature(thing), []
    for one in signature.parameters.values():
        text = fields.get(one.name) if not isinstance(one.default, DefaultValue) else one.default.name
        if one.default is not one.empty and text is not None:
            one = one.replace(default=DefaultValue(constants.get(text, text)))
        shown.append(one)
    thing.__signature__ = signature.replace(parameters=shown)


@functools.cache
def _constants(source: str) -> dict[str, str]:
    """Return what is assigned to the private constants of a module, as it is written."""
    assigned = [one for one in ast.parse(source).body if isinstance(one, ast.Assign) and len(one.targets) == 1]
    values = {ast.unparse(one.targets[0]): ast.unparse(one.value) for one in assigned}
    return {name: value for name, value in values.items() if re.fullmatch("_[A-Z_]+", name)}


def _defaults_of_fields(module: types.ModuleType, name: str) -> dict[str, str]:
    """Return the defaults of a dataclass's fields, its own and inherited ones, as they are written; of others none."""
    found: dict[str, str] = {}
    cls = getattr(module, name, None)
    if not dataclasses.is_dataclass(cls) or not isinstance(cls, type):
        return found
    for owner in reversed([one for one in cls.__mro__ if dataclasses.is_dataclass(one)]):
        constants = _constants(inspect.getsource(sys.modules[owner.__module__]))
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        for one in definition.body if isinstance(definition, ast.ClassDef) else []:
            if isinstance(one, ast.AnnAssign) and one.value is not None:
                text = _default_of_field(one.value)
                found[ast.unparse(one.target)] = constants.get(text, text)
    return found


def _default_of_field(value: ast.expr) -> str:
    """Return what a field begins with: the value, or what its factory returns."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field")):
        return ast.unparse(value)
    given = {one.arg: one.value for one in value.keywords}
    factory = given.get("default_factory")
    if factory is None:
        return ast.unparse(given["default"]) if "default" in given else "..."
    if isinstance(factory, ast.Lambda):
        return ast.unparse(factory.body)
    return {"dict": "{}", "list": "[]", "set": "set()"}.get(ast.unparse(factory), f"{ast.unparse(factory)}()")


def check_reference(app: Any, error: Exception | None) -> None:
    """End the build with an error if the reference shows a private name as a default, or a default as a method.

    Raises:
        sphinx.errors.ExtensionError: If it does, with the page and the words.
    """
    if error is not None or app.builder.name != "html":
        return
    for page in sorted(Path(app.outdir, "api").glob("*.html")):
        wrong = re.search(r"\w+[^,()]{0,60}= ?_[A-Za-z]\w+|(?:loss_fn|schedule)\((?:targets|epochs)\b", text_of(page))
        if wrong:
            raise ExtensionError(f"{page.name} of the reference shows {wrong[0]!r}: see show_defaults in docs/conf.py")
    if "= Bezier(2)" not in text_of(Path(app.outdir, "api", "main.html")):
        raise ExtensionError("main.html of the reference does not show the default curve of fit_curve, Bezier(2)")


def text_of(page: Path) -> str:
    """Return the text of a page without its marks."""
    return re.sub("<[^>]+>", "", page.read_text(encoding="utf-8"))


def _is_of_torch(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] == "torch"


def setup(app: Any) -> None:
    """Register what is done while pages are built."""
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", link_files)
    app.connect("autodoc-skip-member", leave_out_inherited)
    app.connect("autodoc-before-process-signature", show_defaults)
    app.connect("html-page-context", keep_options_whole)
    app.connect("build-finished", check_reference)
