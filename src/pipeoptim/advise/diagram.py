"""The decision tree as a diagram in Mermaid, which GitHub and other readers of Markdown draw."""

from __future__ import annotations

from pipeoptim.advise.decision import TREE, Choice, Question


def to_mermaid() -> str:
    """The tree that :func:`~pipeoptim.advise.decision.decide` walks; a part that several branches share is drawn once.

    Example:
        >>> print(to_mermaid().splitlines()[1])
          q1{"Is there one stage only, or must the result equal synchronous training?"}
    """
    names: dict[int, str] = {}
    lines = ["flowchart TD"]

    def draw(node: Question | Choice) -> str:
        if id(node) in names:
            return names[id(node)]
        letter = "q" if isinstance(node, Question) else "c"
        name = names[id(node)] = f"{letter}{1 + sum(known[0] == letter for known in names.values())}"
        if isinstance(node, Choice):
            kind = f"<br>prediction {node.prediction}" if node.prediction else ""
            lines.append(f'  {name}["{node.method}{kind}"]')
            return name
        lines.append(f'  {name}{{"{node.text}"}}')
        for answer, branch in (("yes", node.yes), ("no", node.no)):
            target = draw(branch)
            lines.append(f"  {name} -- {answer} --> {target}")
        return name

    draw(TREE)
    return "\n".join(lines)
