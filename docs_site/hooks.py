"""What MkDocs does not do by itself to make a site of ``docs/``: pages from outside, the API reference, the schedules, the decision."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import pipeoptim
from pipeoptim.advise.decision import TREE, Choice, Question
from pipeoptim.explained import explanations
from pipeoptim.messages import topics

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))
from docstrings import without_roles  # noqa: E402
from schedules import schedules_script  # noqa: E402

LESS = "---\nsearch: {boost: 0.3}\n---\n\n"
"""What the search finds in guides goes first."""
MESSAGES = """What PipeOptim says of input that cannot work (`pipeoptim.ConfigError`), by topic: the module that refuses. Capitals and …
stand for what is filled in. On the command line a message ends with its topic in brackets, in Python a traceback does; `pipeoptim explain`
with a topic or a message prints this. Messages with more to say are on [a page of their own](troubleshooting.md).
"""
PAGES_OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)")
COMMENT = re.compile(r"<!--.*?-->")  # marks of rendered figures, which would begin a block of HTML in the middle of a sentence
SHORT_CODE = re.compile(r"<code>(?=[^<\n]{1,28}</code>)")  # as long as a narrow screen has room for
CHOICE = re.compile(r"<!-- choice -->.*?<!-- end of choice -->", re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation gets a page of the API reference for each room with public names, and the guides that it does not place."""
    sections = {name: pages for section in config.nav or [] if isinstance(section, dict) for name, pages in section.items()}
    sections["API reference"] += ["api/index.md", *(f"api/{room}.md" for room in rooms())]
    placed = {"index.md", *(page for pages in sections.values() for page in pages)}
    sections["Guides"] += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in placed]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what does not lie in ``docs/``, and leaves no page out that a page links to."""
    for name in PAGES_OUTSIDE:
        text = (ROOT / name).read_text()
        files.append(File.generated(config, name, content=text.replace("](docs/", "](").replace("](tests/", "](../tests/")))
    pages = [file.content_string for file in files if file.is_documentation_page()]
    for path in sorted({path for text in pages for path in OUTSIDE.findall(text)} - set(PAGES_OUTSIDE)):
        # As text: a browser shows it instead of offering to store it.
        files.append(File.generated(config, f"source/{path}.txt", content=(ROOT / path).read_text()))
    for name, text in api_pages().items():
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "messages.md", content=messages_page()))
    for path in sorted((ROOT / "docs_site/assets").iterdir()):
        files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "assets/schedules.js", content=schedules_script()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside ``docs/`` lead to their copies; the decision is a list, for which any screen is wide enough."""
    markdown = COMMENT.sub("", CHOICE.sub(lambda _: _decision(), markdown))
    return OUTSIDE.sub(lambda found: f"]({_inside(found[1])}", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """A browser breaks a line after any hyphen, also between the two of ``--option``."""
    return SHORT_CODE.sub('<code class="whole">', html)


def _inside(path: str) -> str:
    return path if path in PAGES_OUTSIDE else f"source/{path}.txt"


def _decision() -> str:
    """The questions one below the other, each with what follows from its answers, and why."""
    questions: list[Question] = []

    def number(node: Question) -> int:  # one that several branches lead to is asked once
        if not any(node is known for known in questions):
            questions.append(node)
            for branch in (node.yes, node.no):
                if isinstance(branch, Question):
                    number(branch)
        return next(n for n, known in enumerate(questions, 1) if known is node)

    def after(answer: str, node: Question | Choice) -> str:
        if isinstance(node, Question):
            return f"    * {answer}: go to question {number(node)}"
        kind = f' with `prediction="{node.prediction}"`' if node.prediction else ""
        return f"    * {answer}: **`{node.method}`**{kind}. {node.because}"

    number(TREE)
    lines = [f"{n}. {node.text}\n\n{after('yes', node.yes)}\n{after('no', node.no)}\n" for n, node in enumerate(questions, 1)]
    return "\n".join(lines)


def public_objects() -> dict[str, Any]:
    """Every public name with its full path, those of public modules included; and what it names."""
    found: dict[str, Any] = {}
    for name in [*pipeoptim.__all__, "testing"]:
        thing = importlib.import_module("pipeoptim.testing") if name == "testing" else getattr(pipeoptim, name)
        if isinstance(thing, ModuleType):
            found |= {f"pipeoptim.{name}.{one}": getattr(thing, one) for one in thing.__all__}
        else:
            found[f"pipeoptim.{name}"] = thing
    return found


def rooms() -> dict[str, list[str]]:
    """The paths of public names by the room that defines them."""
    found: dict[str, list[str]] = {}
    for path, thing in public_objects().items():
        module = getattr(thing, "__module__", None)
        if module is not None:
            found.setdefault(module.split(".")[1], []).append(path)
    return dict(sorted(found.items()))


def api_pages() -> dict[str, str]:
    """The pages of the API reference: one for each room, a table of all names, the methods as they describe themselves."""
    pages, index = {}, []
    public = public_objects()
    for room, paths in rooms().items():
        about = (importlib.import_module(f"pipeoptim.{room}").__doc__ or "").splitlines()[0]
        pages[f"api/{room}.md"] = LESS + "\n\n".join([f"# {room}", _prose(about), *(f"::: {path}" for path in sorted(paths))])
        index += [f"| [`{path}`]({room}.md#{path}) | {_first(public[path])} |" for path in paths]
    lines = ["# All public names", "", "By what they are for. Everything else may change without notice.", ""]
    lines += ["| name | what it is |", "|---|---|", *sorted(index), "", "## METHODS", "", "`pipeoptim.METHODS`, by name:", ""]
    lines += ["| method | order | what it does | source | deviations |", "|---|---|---|---|---|"]
    for name, method in pipeoptim.METHODS.items():
        cells = " | ".join(_prose(text) for text in (method.summary, method.source, method.deviations))
        lines.append(f"| `{name}` | `{method.order}` | {cells} |")
    pages["api/index.md"] = "\n".join(lines)
    return pages


def messages_page() -> str:
    """Every message of bad input under its topic, as the source has it."""
    lines = [LESS + "# All messages", "", MESSAGES]
    for topic in topics().values():
        lines += [
            f"## {topic.name} {{ #{topic.name} }}",
            "",
            f"{_prose(topic.about)} See [{topic.page[:-3]}]({topic.page}).",
            "",
        ]
        for text in dict.fromkeys(known.text for known in topic.messages):
            part = next((part for part in explanations() if part.explains(text)), None)
            lines.append(f"- <code>{escape(text)}</code>" + (f" ([more](troubleshooting.md#{part.name}))" if part else ""))
        lines.append("")
    return "\n".join(lines)


def _first(thing: Any) -> str:
    return _prose((inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " "))


def _prose(text: str) -> str:
    return without_roles(text).replace("|", "\\|")
