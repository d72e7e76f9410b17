"""The README's program runs, and names things that exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_program_runs():
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(program, "README.md", "exec"), scope)
    gradients = [parameter.grad for parameter in scope["model"].trunk.parameters() if parameter.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("path", re.findall(r"`(torchrl_mouse/[\w/.]+|tests/[\w/.]+|examples/[\w.]+)`", README))
def test_named_paths_exist(path):
    assert (ROOT / path).exists()


def test_component_table_names_exist():
    rows = re.findall(r"^\| (.*?) \| `(torchrl_mouse/.*?)` \|", README, re.MULTILINE)
    assert rows
    for names, path in rows:
        module = path.removesuffix(".py").rstrip("/").replace("/", ".")
        exported = vars(__import__(module, fromlist=["*"]))
        for name in re.findall(r"`(\w+)`", names):
            assert name in exported, f"{module} has no {name}"
