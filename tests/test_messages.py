"""Every message of bad input has a topic, which it names, and ``pipeoptim explain`` finds it; a new one cannot be forgotten."""

import ast
import re
from pathlib import Path

import pytest
import torch

import pipeoptim as po
from pipeoptim.cli import main
from pipeoptim.messages import PAGES, find, topics

SOURCE = Path(po.__path__[0]).parent


def refusals():
    """(topic, line) of everything that is raised and is a ConfigError, one derived from it, or made by ``unknown_name``."""
    trees = {path.relative_to(SOURCE): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    kinds = {"ConfigError", "unknown_name"}
    kinds |= {one.name for one in classes if kinds & {base.id for base in one.bases if isinstance(base, ast.Name)}}
    for path, tree in trees.items():
        name = re.sub(r"^pipeoptim\.|^pipeoptim_(?=zoo)|\.__init__$", "", ".".join(path.with_suffix("").parts))
        for node in ast.walk(tree):
            made = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.func.id in kinds:
                yield name, made.lineno


def test_every_refusal_has_a_topic_with_a_page():
    known = {(topic.name, message.line) for topic in topics().values() for message in topic.messages}
    raised = set(refusals())
    assert len(raised) > 700 and raised - known == set()
    assert [topic.name for topic in topics().values() if not topic.about] == []
    assert {page for page in PAGES.values() if not (Path(__file__).parents[1] / "docs" / page).exists()} == set()
    assert [name for name in PAGES if name and not any(f"{known}.".startswith(f"{name}.") for known in topics())] == []


def test_every_message_is_found_by_what_is_told():
    """With anything in place of its placeholders; another one only where that has the same words, and more of them."""
    for topic in topics().values():
        for message in topic.messages:
            told = "".join(part if n % 2 == 0 else "'x y'" for n, part in enumerate(message.parts))
            if message.told > 9:
                found = find(told)
                assert found is not None and found[1].told >= message.told, told


@pytest.mark.parametrize(
    ("arguments", "topic"),
    [(["train", "--recipe", "digits", "--steps", "0"], "train.checks"), (["train", "--recipe", "digts"], "train.recipes")],
)
def test_the_command_line_names_the_topic_and_explains_it(arguments, topic, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    said = capsys.readouterr().err
    assert said.endswith(f" [{topic}]\n") and said.count("\n") == 1
    for asked in (topic, said.strip()):
        with pytest.raises(SystemExit, match="0"):
            main(["explain", asked])
        told = capsys.readouterr().out
        assert f"{topic}: {topics()[topic].about}\nThe page on it: docs/{topics()[topic].page}" in told
    assert "--steps: " in told or topic == "train.recipes"


def test_in_python_a_note_names_the_topic():
    with pytest.raises(po.ConfigError) as found:
        po.Clip(-1)
    assert found.value.__notes__ == ["More: pipeoptim explain engine.stage.clip"]
    assert not hasattr(po.ConfigError("told by a script"), "__notes__")
    with pytest.raises(po.ConfigError, match=r"\(more: pipeoptim explain sample-args\)$") as found:
        po.partition(torch.nn.LSTM(2, 2), 2)
    assert found.value.topic == "partitioning.api" and not hasattr(found.value, "__notes__"), "once is enough"
