"""After weights have changed, contexts are rebuilt or kept, whatever changed the weights and whatever collects."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import AsyncCollector, Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.modules import set_recurrent_mode
from torchrl.trainers import Trainer
from torchrl.weight_update import MultiProcessWeightSyncScheme

from torchrl_mouse import schema
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
from torchrl_mouse.objectives import MouseDQNLoss
from torchrl_mouse.recipes import update_weights

if TYPE_CHECKING:
    from torchrl_mouse.models import MouseModel

ROWS, STEPS = 2, 6  # steps of a batch; a task is longer than three
EPISODES = 5
CHOICES = ["rebuild", "keep"]


def make_env(seed: int) -> TaskEnv:
    room = DarkRoomEnv(range(9), batch_size=ROWS, size=3, max_steps=4, terminate_on_goal=False, seed=seed)
    return TaskEnv(room, episodes_per_task=EPISODES)


def actor_of(model: MouseModel) -> Any:
    return model.actor(make_env(0).action_spec_unbatched, temperature=1.0)


def with_choice(model: MouseModel, choice: str) -> MouseModel:
    model.trunk.on_weight_update = choice
    return model


def change_weights(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))


def window(trunk: Any, steps: TensorDict) -> torch.Tensor:
    with set_recurrent_mode(True), torch.no_grad():
        return trunk(steps.select(*trunk.in_keys).clone())[schema.HIDDEN]


def check(old: Any, trunk: Any, before: TensorDict, after: TensorDict) -> None:
    """Steps ``before`` ran with the trunk as it was (``old``), those ``after``, of the same tasks, as it is now."""
    steps = torch.cat([before, after], -1).reshape(-1, before.shape[-1] + after.shape[-1])
    assert steps[schema.IS_INIT].sum() == len(steps)
    assert steps[schema.IS_INIT][:, 0].all()
    num = before.shape[-1]
    torch.testing.assert_close(steps[schema.HIDDEN][:, :num], window(old, steps)[:, :num], atol=1e-5, rtol=0)
    rebuilt = window(trunk, steps)[:, num:]
    kept = copy.deepcopy(old)  # without contexts
    kept.on_weight_update = "keep"
    kept.append(steps[:, :num].clone())
    kept.load_state_dict(trunk.state_dict())
    kept = kept.append(steps[:, num:].clone())[schema.HIDDEN]
    assert (rebuilt - kept).abs().amax((0, 2)).min() > 1e-3, "the weights must have changed visibly"
    expected = rebuilt if trunk.on_weight_update == "rebuild" else kept
    torch.testing.assert_close(steps[schema.HIDDEN][:, num:], expected, atol=1e-5, rtol=0)


# What changes the weights, in one process


def by_hand(model, loss):
    change_weights(model)
    model.trunk.mark_weight_update()


def by_optimizer(model, loss, fused):
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.1, fused=fused)
    steps = make_env(3).rollout(6)
    out = loss(steps)
    sum(value for name, value in out.items() if name.startswith("loss")).backward()
    optimizer.step()
    model.trunk.mark_weight_update()


def by_data(model, loss):
    """Does not move parameters' autograd versions."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    model.trunk.mark_weight_update()


def by_state_dict(model, loss):
    changed = {name: value * 1.5 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(changed)


def by_state_dict_of_loss(model, loss):
    trained = dict(loss.named_parameters())
    changed = {name: value * 1.5 if name in trained else value for name, value in loss.state_dict().items()}
    loss.load_state_dict(changed)
    model.trunk.mark_weight_update()


CHANGES = {
    "by hand": by_hand,
    "optimizer": partial(by_optimizer, fused=False),
    "fused optimizer": partial(by_optimizer, fused=True),
    "data": by_data,
    "state_dict": by_state_dict,
    "state_dict of the loss": by_state_dict_of_loss,
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("change", CHANGES)
def test_contexts_after_a_change(change, choice, make_model):
    model = with_choice(make_model(), choice)
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, delay_value=False)
    env, actor = make_env(1), actor_of(model)
    old, before = copy.deepcopy(model.trunk), env.rollout(STEPS, actor)
    CHANGES[change](model, loss)
    after = env.rollout(STEPS, actor, auto_reset=False, tensordict=before[:, -1]["next"].clone())
    check(old, model.trunk, before, after)


def test_a_checkpoint_with_the_same_number_is_other_weights(make_model):
    """Two models that were never marked are both of version 0."""
    model, other = make_model(), make_model()
    change_weights(other)
    env, actor = make_env(1), actor_of(model)
    old, before = copy.deepcopy(model.trunk), env.rollout(STEPS, actor)
    assert torch.equal(model.trunk.weight_version, other.trunk.weight_version)
    model.load_state_dict(other.state_dict())
    after = env.rollout(STEPS, actor, auto_reset=False, tensordict=before[:, -1]["next"].clone())
    check(old, model.trunk, before, after)


def test_going_back_to_a_checkpoint_and_on_is_new(make_model):
    """An older checkpoint of a loss brings its version back; the next update must not get a number that was used."""
    model = make_model()
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, delay_value=False)
    env, actor = make_env(1), actor_of(model)
    model.trunk.mark_weight_update()
    checkpoint = {name: value.clone() for name, value in loss.state_dict().items()}
    by_hand(model, loss)
    old, before = copy.deepcopy(model.trunk), env.rollout(STEPS, actor)  # of version 2
    loss.load_state_dict(checkpoint)
    assert int(model.trunk.weight_version) == 1
    model.trunk.mark_weight_update()
    after = env.rollout(STEPS, actor, auto_reset=False, tensordict=before[:, -1]["next"].clone())
    check(old, model.trunk, before, after)


# Collectors


def unshare(model: MouseModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.trunk.weight_version = model.trunk.weight_version.clone()


def collector_with_policy_of_its_own(model: MouseModel, **options: Any) -> Collector:
    def factory() -> Any:
        own = with_choice(type(model)(model.config), model.trunk.on_weight_update)
        own.load_state_dict(model.state_dict())
        return actor_of(own)

    return Collector(make_env(1), policy_factory=factory, **options)


def make_collector(kind: str, model: MouseModel) -> tuple[Any, Any]:
    """Returns a collector, and the policy whose weights it is to be given."""
    actor, env = actor_of(model), partial(make_env, 1)
    frames = {"frames_per_batch": ROWS * STEPS, "total_frames": 4 * ROWS * STEPS}
    if kind == "Collector":
        return Collector(env, actor, **frames), actor
    if kind == "Collector, own policy":
        return collector_with_policy_of_its_own(model, **frames), actor
    if kind == "AsyncCollector":
        return AsyncCollector(env, actor, **frames), actor
    if kind == "MultiAsyncCollector":
        return MultiAsyncCollector([env], actor, **frames), actor
    two = {name: 2 * value for name, value in frames.items()}
    if "pipes" in kind:
        two["weight_sync_schemes"] = {"policy": MultiProcessWeightSyncScheme()}
    return MultiSyncCollector([env, partial(make_env, 2)], actor, cat_results="stack", **two), actor


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("kind", "choice"),
    [
        ("Collector", "rebuild"),
        ("Collector", "keep"),
        ("Collector, own policy", "rebuild"),
        ("Collector, own policy", "keep"),
        ("MultiSyncCollector", "rebuild"),
        ("MultiSyncCollector, not shared", "keep"),
        ("MultiSyncCollector, pipes, not shared", "rebuild"),
    ],
)
def test_update_weights_between_batches(kind, choice, make_model):
    model = with_choice(make_model(), choice)
    old, batches = copy.deepcopy(model.trunk), []
    collector, policy = make_collector(kind, model)
    try:
        if "not shared" in kind:  # TorchRL's workers read the very weights that are trained, unless these are replaced
            unshare(model)
        for batch in collector:
            batches.append(batch.clone())
            if len(batches) == 2:
                break
            change_weights(model)
            update_weights(policy, collector)
    finally:
        collector.shutdown()
        del collector  # one that a failed test keeps alive until the interpreter exits hangs it there
    assert int(model.trunk.weight_version) == 1
    check(old, model.trunk, *batches)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("kind", "choice"),
    [("MultiAsyncCollector", "rebuild"), ("MultiAsyncCollector", "keep"), ("AsyncCollector", "rebuild")],
)
def test_update_weights_while_workers_play(kind, choice, make_model):
    """The workers have played on when a batch arrives: what comes two batches later is of the new weights alone."""
    model = with_choice(make_model(), choice)
    old = copy.deepcopy(model.trunk)
    collector, policy = make_collector(kind, model)
    batches = []
    try:
        for batch in collector:
            batches.append(batch.clone())
            if len(batches) == 3:
                break
            if len(batches) == 1:
                change_weights(model)
                update_weights(policy, collector)
    finally:
        collector.shutdown()
        del collector
    steps = torch.cat(batches, -1)
    hidden, last = steps[schema.HIDDEN], slice(2 * STEPS, None)
    assert (hidden - window(old, steps))[:, last].abs().amax((0, 2)).min() > 1e-3
    gaps = (hidden - window(model.trunk, steps))[:, last].abs().amax((0, 2))
    assert gaps.max() < 1e-5 if choice == "rebuild" else gaps.min() > 1e-3


def test_without_the_update_a_collector_goes_on_with_old_keys(make_model):
    """What `update_weights` is for: TorchRL's own call moves the weights and says nothing."""
    model = make_model()
    old = copy.deepcopy(model.trunk)
    collector, _ = make_collector("Collector", model)
    try:
        batches = iter(collector)
        before = next(batches).clone()
        change_weights(model)
        collector.update_policy_weights_()
        after = next(batches).clone()
        check(old, with_choice(model, "keep").trunk, before, after)
    finally:
        collector.shutdown()


@pytest.mark.filterwarnings("ignore:The '.*' hook stage:FutureWarning")
def test_hook_of_a_trainer(make_model):
    """Updates between batches, each a change of weights: every batch is of the weights of its time."""
    model = make_model()
    collector, policy = make_collector("Collector", model)
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, delay_value=False)
    buffer = ReplayBuffer(storage=LazyTensorStorage(ROWS * 4), batch_size=ROWS)
    trainer = Trainer(
        collector=collector,
        total_frames=3 * ROWS * STEPS,
        frame_skip=1,
        optim_steps_per_batch=2,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=1e-2),
        progress_bar=False,
    )
    batches, weights = [], []

    def keep(batch: TensorDict) -> TensorDict:
        batches.append(batch.clone())
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return batch

    trainer.register_op("batch_process", keep)
    trainer.register_op("process_optim_batch", lambda batch: buffer.extend(batch) is None or buffer.sample())
    trainer.register_op("post_steps", partial(update_weights, policy, collector))
    trainer.train()
    assert len(batches) == 3
    for number in (1, 2):
        model.load_state_dict(weights[number])
        steps = torch.cat(batches[: number + 1], -1)
        new = steps[schema.HIDDEN][:, number * STEPS :]
        torch.testing.assert_close(new, window(model.trunk, steps)[:, number * STEPS :], atol=1e-5, rtol=0)
