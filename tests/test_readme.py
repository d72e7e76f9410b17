"""The README's program runs, and names things that exist."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from torchrl_mouse.models import MouseConfig, MouseModel

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_programs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    *programs, inference = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for program in programs:
        exec(compile(program, "README.md", "exec"), scope)
    assert scope["agent"].config == scope["model"].config
    gradients = [parameter.grad for parameter in scope["model"].trunk.parameters() if parameter.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert len(inference.splitlines()) <= 25


def test_inference_program_plays_several_tasks(tmp_path, monkeypatch, capsys):
    """With a model such as the example of offline training leaves."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"max_num_actions": 4, "max_num_obs_discrete": 16, "max_num_time_steps": 101}
    config = MouseConfig(hidden_dim=16, window=64, embedding_kwargs=sizes, sp_head_kwargs={}, dqn_head_kwargs={})
    MouseModel(config).save_pretrained("runs/offline_training/model")
    scope: dict[str, object] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[-1], "README.md", "exec"), scope)
    steps = scope["steps"]
    assert steps.shape == (4, 200)
    # Episodes are seen to end, rewards at the end included, and to go on inside one context.
    ended = steps["previous", "terminated"].squeeze(-1)
    assert ended.sum() > 20
    paid = steps["next", "reward"].squeeze(-1) > 0
    assert torch.equal(steps["previous", "reward"].squeeze(-1)[:, 1:] > 0, paid[:, :-1])
    assert re.fullmatch(r"\d+ of \d+ episodes reached the goal\n", capsys.readouterr().out)


@pytest.mark.parametrize("path", re.findall(r"`(torchrl_mouse/[\w/.]+|tests/[\w/.]+|examples/[\w.]+)`", README))
def test_named_paths_exist(path):
    assert (ROOT / path).exists()


def test_components_are_where_the_table_says():
    rows = re.findall(r"^\| (`.*?`) \| .*? \| `(torchrl_mouse/.*?)\.py` \|", README, re.MULTILINE)
    assert len(rows) > 20
    for names, path in rows:
        module = vars(importlib.import_module(path.replace("/", ".")))
        for name in re.findall(r"`(\w+)`", names):
            assert name in module, f"{path} has no {name}"


def resolve(dotted):
    """Finds what a dotted name stands for."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


# fmt: off
MOUSE_NAMES = [
    "StepEmbedder", "TokenType", "SwiGLUHead", "DQNHead", "VecDQNHead", "rope_rotate", "vec_dqn_scores",
    "backbone_forward", "target_forward", "polyak_update", "get_action", "load_model", "save_model",
    "push_model_to_hub", "init_from_pretrained_backbone", "backbone_kwargs_from_pretrained", "dqn_loss",
    "DqnLossConfig", "vec_dqn_loss", "sp_loss", "sv_loss", "DatasetStore", "from_dataset", "append", "to_dataset",
    "clear", "merge_stores_to_dataset", "encode_hf_rows", "push_to_hub", "push_stores_to_hub", "PrefetchBatchifier",
    "next_batch", "TokenAugmenter", "AugmentTokensConfig", "AugmentScalarSpec", "AugmentMaskProbConfig",
]
# fmt: on


def test_names_that_a_user_of_mouse_is_led_to_exist():
    (table,) = re.findall(r"\| MOUSE \| here \|\n(.*?)\n\n", README, re.DOTALL)
    names = re.findall(r"`((?:torchrl|datasets)[\w.]+)`", table)
    for name in names:
        assert resolve(name) is not None
    theirs = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert set(MOUSE_NAMES) <= theirs
