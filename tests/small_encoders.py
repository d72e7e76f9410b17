"""Small context encoders, and what all of their tests begin with."""

import pytest
import torch
from torch import nn

from torchrl_mouse.modules import CONTEXT_ENCODERS

HIDDEN, INPUT, OUTPUT = [24, 24, 20], 5, 6
KINDS = list(CONTEXT_ENCODERS)
PER_TRANSITION = ["linear", "mlp", "attention"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(kind, **kwargs):
    """Of random last layers: what they hide is to be seen."""
    encoder = CONTEXT_ENCODERS[kind](HIDDEN, INPUT, OUTPUT, **kwargs)
    nn.init.normal_(encoder.last_fc.weight)
    return encoder.eval()
