"""What the pages under docs/ tell people to type works as it stands there."""

import re
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_memory_works_in_a_loop_without_a_trainer() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "replay.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (loop,) = [block for block in blocks if "import ReplayMemory" in block]
    tasks = [(torch.rand(400, 3), torch.randint(4 * task, 4 * task + 4, (400,))) for task in range(2)]
    names = {"torch": torch, "your_tasks": tasks}
    exec(loop, names)
    memory = names["memory"]
    assert len(memory) == 500  # type: ignore[arg-type]
    assert len(names["replayed"]) == 32  # type: ignore[arg-type]
