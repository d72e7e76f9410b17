"""The step layout: conversions to and from MOUSE's records, masks, ids."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from torchrl_mouse import schema
from torchrl_mouse.schema import (
    RUNNING,
    TERMINATED,
    TRUNCATED,
    check_finite,
    check_ids,
    decision_mask,
    done_code,
    from_mouse_records,
    is_terminal_frame,
    require,
    to_ids,
    to_mouse_records,
)

property_test = settings(max_examples=40, deadline=None, database=None)


@st.composite
def record_batches(draw):
    batch, steps = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    shape = (batch, steps)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def integers(high, *size):
        return torch.randint(high, (*shape, *size), generator=generator)

    def reals(*size):
        return torch.randn(*shape, *size, generator=generator)

    records = {"action": integers(5), "reward": reals(), "done": integers(3), "time": integers(20)}
    optional = {
        "obs_continuous": lambda: reals(3),
        "obs_discrete": lambda: integers(7),
        "obs_image": lambda: integers(256, 4),
        "q_star": lambda: reals(5).masked_fill(integers(2, 5).bool(), float("-inf")),
        "xformed_reward": reals,
    }
    for name in draw(st.sets(st.sampled_from(sorted(optional)))):
        records[name] = optional[name]()
    return TensorDict(records, shape)


@property_test
@given(record_batches())
def test_records_round_trip_exactly(records):
    back = to_mouse_records(from_mouse_records(records))
    assert set(back.keys()) == set(records.keys())
    for name, value in records.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value), name


@property_test
@given(record_batches())
def test_next_is_the_following_frame(records):
    steps = from_mouse_records(records)
    frame = steps.exclude("next", "action", "q_star", "is_init", "collector")
    following = steps["next"].select(*frame.keys(include_nested=True, leaves_only=True))
    assert "observation" in frame.keys() or "obs_continuous" not in records.keys()  # noqa: SIM118 - a TensorDict
    assert (following[:, :-1] == frame[:, 1:]).all()
    assert (following[:, -1] == frame[:, -1]).all()


@property_test
@given(record_batches())
def test_conversion_leaves_the_records_alone(records):
    before = records.clone()
    steps = from_mouse_records(records)
    for key in ("action", schema.IS_INIT, ("next", "reward"), ("next", "done")):
        steps[key].fill_(1)
    assert (records == before).all()


def two_episodes():
    """An episode that terminates after two steps, then one that a limit cuts after one."""
    return TensorDict(
        {
            "action": torch.tensor([[0, 2, 1, 0, 3]]),
            "reward": torch.tensor([[0.0, 0.5, 1.0, 0.0, -1.0]]),
            "done": torch.tensor([[0, 0, 1, 0, 2]]),
            "time": torch.tensor([[0, 1, 2, 0, 1]]),
            "obs_discrete": torch.tensor([[10, 11, 12, 20, 21]]),
        },
        [1, 5],
    )


def test_two_episodes_by_hand():
    steps = from_mouse_records(two_episodes())

    def row(key):
        return steps[key].reshape(-1).tolist()

    assert row(schema.OBSERVATION_DISCRETE) == [10, 11, 12, 20, 21]
    assert row(schema.PREVIOUS_ACTION) == [0, 2, 1, 0, 3]
    assert row(schema.PREVIOUS_REWARD) == [0.0, 0.5, 1.0, 0.0, -1.0]
    assert row(schema.PREVIOUS_TERMINATED) == [False, False, True, False, False]
    assert row(schema.PREVIOUS_TRUNCATED) == [False, False, False, False, True]
    assert row(schema.EPISODE_STEP) == [0, 1, 2, 0, 1]
    assert row(schema.IS_INIT) == [True, False, False, False, False]
    assert row(schema.MASK) == [True, True, True, True, False]
    assert row(schema.ACTION)[:4] == [2, 1, 0, 3]
    assert row(("next", "reward"))[:4] == [0.5, 1.0, 0.0, -1.0]
    assert row(("next", "observation_discrete")) == [11, 12, 20, 21, 21]
    assert row(("next", "previous", "terminated"))[:4] == [False, True, False, False]
    assert row(("next", "previous", "truncated"))[:4] == [False, False, False, True]
    assert row(("next", "is_init")) == [False] * 5
    for end in ("done", "terminated", "truncated"):
        assert row(("next", end)) == [False] * 5, "an episode's end is not the task's"
    assert is_terminal_frame(steps).tolist() == [[False, False, True, False, True]]
    assert decision_mask(steps).tolist() == [[True, True, False, True, False]]


def test_shapes_and_dtypes_are_the_contract():
    steps = from_mouse_records(two_episodes())
    for key in (schema.PREVIOUS_REWARD, ("next", "reward")):
        assert steps[key].dtype == torch.float32
        assert steps[key].shape == (1, 5, 1)
    for key in (schema.IS_INIT, schema.PREVIOUS_TERMINATED, schema.PREVIOUS_TRUNCATED, ("next", "done")):
        assert steps[key].dtype == torch.bool
        assert steps[key].shape == (1, 5, 1)
    assert steps[schema.EPISODE_STEP].dtype == torch.int64
    assert steps[schema.ACTION].shape == (1, 5)


def test_xformed_reward_is_the_transitions():
    records = two_episodes()
    records["xformed_reward"] = records["reward"] * 10
    steps = from_mouse_records(records)
    assert steps["next", "xformed_reward"].shape == (1, 5, 1)
    assert steps["next", "xformed_reward"].flatten().tolist()[:4] == [5.0, 10.0, 0.0, -10.0]


def test_a_single_record_has_no_decision():
    steps = from_mouse_records(two_episodes()[:, :1])
    assert decision_mask(steps).tolist() == [[False]]
    assert steps[schema.IS_INIT].tolist() == [[[True]]]


@pytest.mark.parametrize("code", [-1, 3])
def test_unknown_done_code(code):
    records = two_episodes()
    records["done"][0, 2] = code
    with pytest.raises(ValueError, match=rf"done must be 0, 1 or 2, got {code}"):
        from_mouse_records(records)


def test_records_without_time():
    with pytest.raises(ValueError, match=r"records must be \[\*, S\] with S >= 1, got \(\)"):
        from_mouse_records(two_episodes()[0, 0])
    with pytest.raises(ValueError, match=r"S >= 1, got \(1, 0\)"):
        from_mouse_records(two_episodes()[:, :0])


@pytest.mark.parametrize("name", ["action", "reward", "done", "time"])
def test_missing_record_entry(name):
    with pytest.raises(KeyError, match=rf"entry '{name}' must be present, got only"):
        from_mouse_records(two_episodes().exclude(name))


@pytest.mark.parametrize(
    "key", [schema.PREVIOUS_ACTION, schema.PREVIOUS_REWARD, schema.PREVIOUS_TERMINATED, schema.EPISODE_STEP]
)
def test_missing_step_entry(key):
    with pytest.raises(KeyError, match=r"entry .* must be present, got only"):
        to_mouse_records(from_mouse_records(two_episodes()).exclude(key))


def test_require_of_nothing():
    with pytest.raises(KeyError, match="entry 'action' must be present, got only no entry"):
        require(TensorDict({}, [2]), "action")


@pytest.mark.parametrize(
    ("terminated", "truncated", "code"),
    [(False, False, RUNNING), (True, False, TERMINATED), (False, True, TRUNCATED), (True, True, TERMINATED)],
)
def test_done_codes(terminated, truncated, code):
    encoded = done_code(torch.tensor([terminated]), torch.tensor([truncated]))
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == [code]


@pytest.mark.parametrize("trailing", [(), (1,)])
def test_decision_mask_reads_padding_of_both_shapes(trailing):
    steps = from_mouse_records(two_episodes())
    steps[schema.MASK] = torch.tensor([[False, True, True, True, True]]).reshape(1, 5, *trailing)
    assert decision_mask(steps).tolist() == [[False, True, False, True, False]]


def test_decision_mask_without_padding():
    steps = from_mouse_records(two_episodes()).exclude(schema.MASK)
    assert decision_mask(steps).tolist() == [[True, True, False, True, False]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_one_hot_reads_as_ids(dtype):
    ids = torch.tensor([[2, 0], [1, 3]])
    one_hot = torch.nn.functional.one_hot(ids, 4).to(dtype)
    assert torch.equal(to_ids(one_hot, 4, 2, "action"), ids)
    assert to_ids(one_hot, 4, 2, "action").dtype == torch.int64


@pytest.mark.parametrize("trailing", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_categorical_reads_as_ids(trailing, dtype):
    ids = torch.tensor([[2, 0], [1, 3]])
    read = to_ids(ids.to(dtype).reshape(2, 2, *trailing), 4, 2, "action")
    assert read.dtype == torch.int64
    assert torch.equal(read, ids)


def test_a_batch_as_long_as_the_number_of_ids_is_not_one_hot():
    assert to_ids(torch.tensor([3, 2, 1, 0]), 4, 1, "action").tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("vector", [[1.0, 1.0, 0.0], [0.0, 0.5, 0.5], [0.0, 2.0, 0.0], [-1.0, 0, 0], [0, torch.nan, 0]])
def test_vectors_that_are_not_one_hot(vector):
    with pytest.raises(ValueError, match=r"entry 'action' must hold ids or one-hot vectors, got \["):
        to_ids(torch.tensor([[0.0, 1.0, 0.0], vector]), 3, 1, "action")


def test_all_zero_one_hot_is_id_zero():
    assert to_ids(torch.zeros(2, 3), 3, 1, "action").tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 1), (2, 3, 3)])
def test_ids_of_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"entry 'action' must hold ids \[\*\] or \[\*, 1\], or one-hot vectors"):
        to_ids(torch.zeros(shape, dtype=torch.int64), 3, 1, "action")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_of_wrong_dtype(dtype):
    with pytest.raises(TypeError, match=rf"must hold integer ids, got {dtype}"):
        to_ids(torch.zeros(2, 1, dtype=dtype), 3, 1, "action")


def test_check_ids():
    check_ids(torch.tensor([[0], [2]]), 3, "action")
    check_ids(torch.zeros(0, dtype=torch.int64), 3, "action")
    with pytest.raises(ValueError, match=r"entry 'action' must lie in \[0, 3\), got 3"):
        check_ids(torch.tensor([0, 3]), 3, "action")
    with pytest.raises(ValueError, match=r"entry \('previous', 'action'\) must lie in \[0, 3\), got -1"):
        check_ids(torch.tensor([-1, 2]), 3, ("previous", "action"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_finite(value):
    check_finite(torch.zeros(0), "reward", "reader", "Fix it.")
    numbers = torch.zeros(2, 3)
    check_finite(numbers, "reward", "reader", "Fix it.")
    numbers[1, 2] = value
    with pytest.raises(
        ValueError, match=rf"^reader: entry 'reward' must be finite, got {value} at \(1, 2\)\. Fix it\.$"
    ):
        check_finite(numbers, "reward", "reader", "Fix it.")


@pytest.mark.parametrize("kind", ["bool", "integer", "float"])
@pytest.mark.parametrize(
    ("dtype", "fits"),
    [
        (torch.bool, "bool"),
        (torch.uint8, "integer"),
        (torch.int64, "integer"),
        (torch.bfloat16, "float"),
        (torch.float64, "float"),
        (torch.complex64, None),
    ],
)
def test_require_of_a_kind(dtype, fits, kind):
    steps = TensorDict({"entry": torch.zeros(2, dtype=dtype)}, [2])
    assert require(steps, "entry") is steps["entry"]
    if kind == fits:
        assert require(steps, "entry", kind) is steps["entry"]
    else:
        with pytest.raises(TypeError, match=rf"entry 'entry' must be of {kind} type, got {dtype}\. Convert it"):
            require(steps, "entry", kind)


@pytest.mark.parametrize("key", [schema.PREVIOUS_TERMINATED, schema.PREVIOUS_TRUNCATED, schema.MASK])
def test_masks_of_wrong_type(key):
    steps = from_mouse_records(two_episodes())
    steps[key] = steps[key].float()
    with pytest.raises(TypeError, match=rf"'{key[-1]}'\) must be of bool type, got torch.float32"):
        decision_mask(steps)
    if key != schema.MASK:
        with pytest.raises(TypeError, match="must be of bool type"):
            is_terminal_frame(steps)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("done", float("nan"), "integer"),
        ("done", 1.0, "integer"),
        ("done", True, "integer"),
        ("action", 1.0, "integer"),
        ("time", 0.5, "integer"),
        ("reward", 1, "float"),
        ("xformed_reward", True, "float"),
    ],
)
def test_records_of_wrong_type(name, value, kind):
    records = two_episodes()
    records[name] = torch.full(records.shape, value)
    with pytest.raises(TypeError, match=f"entry '{name}' must be of {kind} type, got torch"):
        from_mouse_records(records)


@pytest.mark.parametrize("name", ["action", "reward", "done", "time", "xformed_reward"])
def test_records_of_wrong_shape(name):
    records = two_episodes()
    value = records.get(name, torch.zeros(records.shape))
    records[name] = value.unsqueeze(-1)
    with pytest.raises(ValueError, match=rf"{name} must have the records' shape \(1, 5\), got \(1, 5, 1\)"):
        from_mouse_records(records)


def test_records_with_a_negative_action():
    records = two_episodes()
    records["action"][0, 3] = -1
    with pytest.raises(ValueError, match="action must be at least 0, got -1"):
        from_mouse_records(records)
