"""What the pages under docs/ tell people to type works as it stands there."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


def test_the_memory_works_in_a_loop_without_a_trainer() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "replay.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (loop,) = [block for block in blocks if "import ReplayMemory" in block]
    tasks = [(torch.rand(400, 3), torch.randint(4 * task, 4 * task + 4, (400,))) for task in range(2)]
    names = {"torch": torch, "your_tasks": tasks}
    exec(loop, names)
    memory = names["memory"]
    assert len(memory) == 500  # type: ignore[arg-type]
    assert len(names["replayed"]) == 32  # type: ignore[arg-type]


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings: lower case, no punctuation, hyphens for spaces."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    anchors: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose, flags=re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        numbered = (f"{slug}-{number}" if number else slug for number in range(len(anchors) + 1))
        anchors.add(next(name for name in numbered if name not in anchors))
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_sections_lead_to_headings(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)#([^)\s]+)\)", page.read_text())
    targets = [(page.parent / path if path else page, anchor) for path, anchor in links]
    dead = [f"{target.name}#{anchor}" for target, anchor in targets if anchor not in _anchors(target)]
    assert dead == []
