"""The belief that is inferred from a context."""

import math

import pytest
import torch
from small_encoders import HIDDEN, INPUT, KINDS, OUTPUT, PER_TRANSITION, make, seeded  # noqa: F401
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn
from torch.nn import functional as F

from torchrl_mouse.functional import gaussian_product, standard_normal_kl
from torchrl_mouse.modules import ContextPosterior, make_context_encoder, sample_latent


def context(*shape):
    """Transitions of 2 numbers of observation, 2 of action, 1 of reward."""
    entries = {
        "observation": torch.randn(*shape, 2),
        "action": torch.randn(*shape, 2),
        "reward": torch.randn(*shape, 1),
    }
    return TensorDict({"context": TensorDict(entries, shape)}, shape[:-1])


def without_state(encoder):
    encoder.reset = lambda num_tasks: None
    return encoder


@pytest.mark.parametrize("num", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_posterior_is_the_product_of_what_the_encoder_says(kind, num):
    encoder, batch = make(kind), context(4, num)
    rows = torch.cat([batch["context", name] for name in ("observation", "action", "reward")], -1)
    mean, spread = encoder(rows).chunk(2, -1)
    variance = F.softplus(spread)
    if kind in PER_TRANSITION:
        mean, variance = gaussian_product(mean, variance)
    encoder.reset(4)
    belief = ContextPosterior(encoder)(batch)
    assert belief is batch
    torch.testing.assert_close(belief["posterior_loc"], mean)
    torch.testing.assert_close(belief["posterior_scale"], variance.sqrt())


@pytest.mark.parametrize(("num", "expected"), [(64, 141.4), (100, 159.1), (256, 196.6), (1024, 251.9)])
def test_divergence_of_pearls_untrained_encoder(num, expected):
    """Summed over 16 tasks and 5 dimensions, as measured with PEARL's own code before the first update."""
    posterior = ContextPosterior(make_context_encoder("mlp", hidden_sizes=[200] * 3, input_size=5, output_size=10))
    belief = posterior(context(16, num))
    divergence = standard_normal_kl(belief["posterior_loc"], belief["posterior_scale"].square())
    assert divergence.sum().item() == pytest.approx(expected, rel=5e-3)


def test_a_variance_is_at_least_1e_7():
    encoder = make("linear")
    nn.init.zeros_(encoder.last_fc.weight)
    nn.init.constant_(encoder.last_fc.bias, -100.0)
    belief = ContextPosterior(encoder)(context(4, 10))
    torch.testing.assert_close(belief["posterior_scale"], torch.full((4, 3), math.sqrt(1e-8)))
    belief["posterior_scale"].log().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_no_context_is_the_prior_and_asks_nobody(kind):
    encoder = make(kind)
    encoder(torch.randn(4, 3, INPUT))  # Nor is what a recurrent one remembers from before.
    encoder.forward = None
    belief = ContextPosterior(encoder)(context(4, 0))
    assert torch.equal(belief["posterior_loc"], torch.zeros(4, 3))
    assert torch.equal(belief["posterior_scale"], torch.ones(4, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_no_tasks_have_no_beliefs(kind):
    belief = ContextPosterior(make(kind))(context(0, 7))
    assert belief["posterior_loc"].shape == belief["posterior_scale"].shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_beliefs_are_at_least_in_float32(dtype):
    """An encoder may take ids, or data of half precision."""

    class Table(torch.nn.Module):
        output_size = 6

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(4, 6)

        def forward(self, context):
            return self.table(context.long()).squeeze(-2)

        def reset(self, num_tasks=1):
            pass

    posterior = ContextPosterior(Table(), in_keys=["ids"])
    for num in (0, 5):
        belief = posterior(TensorDict({"ids": torch.ones(2, num, 1, dtype=dtype)}, [2]))
        at_least = torch.float64 if dtype == torch.float64 and not num else torch.float32
        assert {belief[key].dtype for key in posterior.out_keys} == {at_least}
    with torch.autocast("cpu", torch.bfloat16):
        belief = ContextPosterior(make("mlp"))(context(2, 5))
    assert belief["posterior_scale"].dtype == torch.float32


@pytest.mark.parametrize("tasks", [(), (4,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_dimensions_of_tasks(kind, tasks):
    encoder, batch = make(kind), context(*tasks, 7)
    belief = ContextPosterior(encoder)(batch)
    assert belief["posterior_loc"].shape == belief["posterior_scale"].shape == (*tasks, 3)
    encoder.reset()
    alone = ContextPosterior(encoder)(context(1, 7).update({"context": batch["context"].reshape(-1, 7)[:1]}))
    torch.testing.assert_close(belief["posterior_loc"].reshape(-1, 3)[:1], alone["posterior_loc"])


def test_entries_are_read_in_the_order_of_the_keys_and_written_where_asked():
    encoder, batch = make("mlp"), context(4, 7)
    expected = ContextPosterior(encoder)(batch.clone())
    flat = TensorDict(
        {
            "s": batch["context", "observation"],
            "a": batch["context", "action"],
            "r": {"now": batch["context", "reward"]},
        },
        [4],
    )
    out_keys = [("belief", "m"), "s_d"]
    posterior = ContextPosterior(encoder, in_keys=["s", "a", ("r", "now")], out_keys=out_keys)
    assert (posterior.in_keys, posterior.out_keys) == (["s", "a", ("r", "now")], out_keys)
    belief = posterior(flat)
    torch.testing.assert_close(belief["belief", "m"], expected["posterior_loc"])
    torch.testing.assert_close(belief["s_d"], expected["posterior_scale"])
    swapped = ContextPosterior(encoder, in_keys=["a", "s", ("r", "now")])(flat)
    assert (swapped["posterior_loc"] - expected["posterior_loc"]).abs().max() > 1e-3


def test_is_called_with_tensors_too():
    encoder, batch = make("mlp"), context(4, 7)
    expected = ContextPosterior(encoder)(batch.clone())
    mean, scale = ContextPosterior(encoder)(*(batch["context", name] for name in ("observation", "action", "reward")))
    torch.testing.assert_close((mean, scale), (expected["posterior_loc"], expected["posterior_scale"]))


def test_latents_are_drawn_from_it():
    encoder = make("mlp")
    batch = context(1, 7).expand(4000).contiguous()
    latent = TensorDictSequential(ContextPosterior(encoder), sample_latent())(batch)
    belief = latent[0]
    torch.testing.assert_close(latent["latent"].mean(0), belief["posterior_loc"], atol=0.1, rtol=0)
    torch.testing.assert_close(latent["latent"].std(0), belief["posterior_scale"], atol=0.1, rtol=0.05)


def test_reset_is_the_encoders():
    posterior, batch = ContextPosterior(make("recurrent")), context(4, 7)
    first = posterior(batch.clone())["posterior_loc"]
    assert (posterior(batch.clone())["posterior_loc"] - first).abs().max() > 1e-3
    posterior.reset(4)
    assert torch.equal(posterior(batch.clone())["posterior_loc"], first)


@pytest.mark.parametrize("size", [None, 7, 0, "six"])
def test_the_encoders_output_is_means_and_variances(size):
    encoder = without_state(nn.Identity())
    encoder.output_size = size
    with pytest.raises(ValueError, match=f"output_size of the encoder must be even, means and variances, got {size}"):
        ContextPosterior(encoder)


def test_the_encoder_can_be_reset():
    encoder = nn.Linear(5, 6)
    encoder.output_size = 6
    with pytest.raises(TypeError, match="the encoder must have a method reset, got a Linear without"):
        ContextPosterior(encoder)


@pytest.mark.parametrize("keys", [{"in_keys": []}, {"out_keys": ["posterior_loc"]}, {"out_keys": ["a", "b", "c"]}])
def test_keys_are_checked(keys):
    with pytest.raises(ValueError, match="there must be in_keys, and two out_keys, got"):
        ContextPosterior(make("mlp"), **keys)


def test_a_missing_entry_is_named():
    batch = context(4, 7)
    del batch["context", "action"]
    with pytest.raises(KeyError, match=r"entry \('context', 'action'\) must be present"):
        ContextPosterior(make("mlp"))(batch)


@pytest.mark.parametrize("shape", [(4, 7), (4, 6, 1), (3, 7, 1)])
def test_entries_are_of_one_context(shape):
    batch = TensorDict(
        {"observation": torch.zeros(4, 7, 2), "action": torch.zeros(4, 7, 2), "reward": torch.zeros(shape)}
    )
    message = r"entry 'reward' must be \[\*tasks, N, size\], all of the same tasks and N, got shape"
    with pytest.raises(ValueError, match=message):
        ContextPosterior(make("mlp"), in_keys=["observation", "action", "reward"])(batch)


def test_one_gaussian_for_each_task_may_keep_its_dimension():
    class Encoder(nn.Module):
        output_size = 6

        def forward(self, input):
            return input.new_tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0]).expand(len(input), 1, 6)

    belief = ContextPosterior(without_state(Encoder()))(context(4, 7))
    torch.testing.assert_close(belief["posterior_loc"], torch.tensor([1.0, 2.0, 3.0]).expand(4, 3))
    torch.testing.assert_close(belief["posterior_scale"], torch.full((4, 3), math.sqrt(math.log(2))))


def test_an_output_of_another_shape_is_refused():
    class Encoder(nn.Module):
        output_size = 6

        def forward(self, input):
            return input.new_zeros(input.shape[1], input.shape[0], 6)  # Tasks and transitions exchanged.

    with pytest.raises(ValueError, match=r"Encoder: output must be .* 4, 7 and 6, got \[7, 4, 6\]"):
        ContextPosterior(without_state(Encoder()))(context(4, 7))
