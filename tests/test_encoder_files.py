"""Context encoders by name, and of files that are written for rlkit."""

import copy
import sys

import pytest
import torch
from tensordict import TensorDict

from torchrl_mouse.modules import CONTEXT_ENCODERS, ContextPosterior, make_context_encoder

HIDDEN, INPUT, OUTPUT = [24, 24, 20], 5, 6
KINDS = list(CONTEXT_ENCODERS)

FILE_HEAD = """
import torch
from torch import nn
from torch.nn import functional as F
import rlkit.torch.pytorch_util as ptu
from rlkit.torch.core import PyTorchModule


class CustomContextEncoder(PyTorchModule):
"""
LINEAR_FILE = (
    FILE_HEAD
    + """
    def __init__(self, hidden_sizes, input_size, output_size, init_w=3e-3, **kwargs):
        self.save_init_params(locals())
        super().__init__()
        self.output_size = output_size
        self.output_activation = ptu.identity
        self.last_fc = nn.Linear(input_size, output_size)
        self.last_fc.weight.data.uniform_(-init_w, init_w)

    def forward(self, input, return_preactivations=False):
        flat = input.view(-1, input.shape[-1])
        preactivation = self.last_fc(flat)
        output = self.output_activation(preactivation)
        return (output, preactivation) if return_preactivations else output

    def reset(self, num_tasks=1):
        pass
"""
)
RECURRENT_FILE = (
    FILE_HEAD
    + """
    IS_RECURRENT = True

    def __init__(self, hidden_sizes, input_size, output_size, init_w=3e-3, b_init_value=0.1, **kwargs):
        self.save_init_params(locals())
        super().__init__()
        self.input_size = input_size
        self.output_size = output_size
        self.hidden_dim = hidden_sizes[-1]
        self.fcs = []
        in_size = input_size
        for i, next_size in enumerate(hidden_sizes):
            fc = nn.Linear(in_size, next_size)
            in_size = next_size
            ptu.fanin_init(fc.weight)
            fc.bias.data.fill_(b_init_value)
            self.__setattr__("fc{}".format(i), fc)
            self.fcs.append(fc)
        self.last_fc = nn.Linear(in_size, output_size)
        self.last_fc.weight.data.uniform_(-init_w, init_w)
        self.last_fc.bias.data.uniform_(-init_w, init_w)
        self.register_buffer("hidden", torch.zeros(1, 1, self.hidden_dim))
        self.lstm = nn.LSTM(self.hidden_dim, self.hidden_dim, num_layers=1, batch_first=True)

    def forward(self, input, return_preactivations=False):
        task, seq, feat = input.size()
        out = input.view(task * seq, feat)
        for fc in self.fcs:
            out = F.relu(fc(out))
        out = out.view(task, seq, -1)
        out, (hn, cn) = self.lstm(out, (self.hidden, torch.zeros(self.hidden.size()).to(ptu.device)))
        self.hidden = hn
        preactivation = self.last_fc(out[:, -1, :])
        return (preactivation, preactivation) if return_preactivations else preactivation

    def reset(self, num_tasks=1):
        self.hidden = self.hidden.new_full((1, num_tasks, self.hidden_dim), 0)
"""
)
ATTENTION_FILE = (
    FILE_HEAD
    + """
    def __init__(self, hidden_sizes, input_size, output_size, **kwargs):
        self.save_init_params(locals())
        super().__init__()
        self.output_size = output_size
        self.embed = nn.Linear(input_size, hidden_sizes[-1])
        ptu.fanin_init(self.embed.weight)
        self.scale = nn.Parameter(ptu.ones(1))
        self.attention = nn.MultiheadAttention(hidden_sizes[-1], 4, batch_first=True)
        self.norm = nn.LayerNorm(hidden_sizes[-1])
        self.last_fc = nn.Linear(hidden_sizes[-1], output_size)

    def forward(self, input, return_preactivations=False):
        h = F.relu(self.embed(input))
        h = self.norm(h + self.scale * self.attention(h, h, h, need_weights=False)[0])
        return self.last_fc(h)
"""
)
FILES = {"linear": LINEAR_FILE, "recurrent": RECURRENT_FILE, "attention": ATTENTION_FILE}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def write(folder, text):
    path = folder / "encoder.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(path):
    return make_context_encoder(str(path), hidden_sizes=HIDDEN, input_size=INPUT, output_size=OUTPUT)


def context(*shape):
    """Transitions of 2 numbers of observation, 2 of action, 1 of reward."""
    entries = {
        "observation": torch.randn(*shape, 2),
        "action": torch.randn(*shape, 2),
        "reward": torch.randn(*shape, 1),
    }
    return TensorDict({"context": TensorDict(entries, shape)}, shape[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_makes_encoders_by_name(kind):
    encoder = load(kind)
    assert type(encoder) is CONTEXT_ENCODERS[kind]
    assert (encoder.hidden_sizes, encoder.input_size, encoder.output_size) == (HIDDEN, INPUT, OUTPUT)


@pytest.mark.parametrize("kind", FILES)
def test_files_for_rlkit_run_unchanged(tmp_path, kind):
    encoder = load(write(tmp_path, FILES[kind]))
    assert not [name for name in sys.modules if name.partition(".")[0] == "rlkit"]
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.py"]
    assert encoder.init_params.keys() >= {"hidden_sizes", "input_size", "output_size"}
    posterior = ContextPosterior(encoder)
    saved = {name: value.shape for name, value in posterior.state_dict().items()}
    assert "encoder.hidden" not in saved
    for _ in range(2):  # The second time with what it keeps from the first, and not with its graph.
        belief = posterior(context(1, 7))
        (belief["posterior_loc"] + belief["posterior_scale"]).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    posterior.reset(4)
    belief = posterior(context(4, 7))
    assert belief["posterior_loc"].shape == belief["posterior_scale"].shape == (4, OUTPUT // 2)
    copy.deepcopy(posterior)
    assert {name: value.shape for name, value in posterior.state_dict().items()} == saved


def test_a_file_for_rlkit_is_the_built_in_recurrent_encoder(tmp_path):
    ours, theirs = CONTEXT_ENCODERS["recurrent"](HIDDEN, INPUT, OUTPUT), load(write(tmp_path, RECURRENT_FILE))
    assert theirs.IS_RECURRENT
    names = {"fc0": "hidden_layers.0", "fc1": "hidden_layers.2", "fc2": "hidden_layers.4"}
    state = theirs.state_dict()
    ours.load_state_dict(
        {".".join((names.get(k.split(".")[0], k.split(".")[0]), k.split(".")[1])): state[k] for k in state}
    )
    rows = torch.randn(1, 7, INPUT)
    for _ in range(2):
        torch.testing.assert_close(theirs(rows), ours(rows))


@pytest.mark.parametrize("own", [False, True])
def test_saturated_states_keep_a_gradient_in_bfloat16(tmp_path, own):
    """What float32 leaves of it, out of which Adam makes steps; bfloat16 would round the states to 1, it to 0."""
    encoder = load(write(tmp_path, RECURRENT_FILE) if own else "recurrent")
    torch.nn.init.constant_(encoder.lstm.bias_ih_l0, 10.0)
    posterior = ContextPosterior(encoder)
    posterior.reset(2)
    with torch.autocast("cpu", torch.bfloat16):
        belief = posterior(context(2, 64))
    assert encoder.hidden.min() > 0.999
    belief["posterior_loc"].sum().backward()
    assert encoder.lstm.bias_ih_l0.grad[-HIDDEN[-1] :].all()  # of the output gate


def test_trying_a_file_leaves_no_trace(tmp_path):
    theirs = load(write(tmp_path, RECURRENT_FILE))
    assert theirs.training
    assert torch.equal(theirs.hidden, torch.zeros(1, 1, HIDDEN[-1]))


def test_a_changed_file_is_read_anew(tmp_path):
    assert load(write(tmp_path, LINEAR_FILE)).last_fc.weight.abs().max() <= 3e-3
    assert load(write(tmp_path, LINEAR_FILE.replace("3e-3", "5e-1"))).last_fc.weight.abs().max() > 3e-3


def test_helpers_of_rlkit(tmp_path):
    text = (
        LINEAR_FILE
        + """
helped = [ptu.zeros(2, 3), ptu.ones(2), ptu.FloatTensor([1, 2]), ptu.from_numpy(ptu.get_numpy(ptu.ones(2)).astype("d"))]
CustomContextEncoder.helped = helped
CustomContextEncoder.device = ptu.device
"""
    )
    encoder = load(write(tmp_path, text))
    assert [each.tolist() for each in encoder.helped] == [[[0.0] * 3] * 2, [1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]
    assert {each.dtype for each in encoder.helped} == {torch.float32}
    assert encoder.device == torch.device("cpu")


def test_an_installed_rlkit_is_used(tmp_path, monkeypatch):
    package = tmp_path / "rlkit" / "torch"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "core.py").write_text("from torch.nn import Module\nclass PyTorchModule(Module):\n    real = True\n")
    (package / "pytorch_util.py").write_text("identity = abs\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    try:
        encoder = load(write(tmp_path, LINEAR_FILE.replace("        self.save_init_params(locals())\n", "")))
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "rlkit":
                del sys.modules[name]
    assert encoder.real
    assert encoder.output_activation is abs


def test_stand_ins_go_when_the_file_fails(tmp_path):
    with pytest.raises(ZeroDivisionError, match="division"):
        load(write(tmp_path, FILE_HEAD + "    x = 1 / 0\n"))
    assert not [name for name in sys.modules if name.partition(".")[0] == "rlkit"]


def test_a_constructor_may_import(tmp_path):
    begin = "        super().__init__()\n"
    text = LINEAR_FILE.replace(begin, begin + "        import rlkit.torch.pytorch_util as util\n")
    assert load(write(tmp_path, text)).output_size == OUTPUT
    text = LINEAR_FILE.replace(begin, begin + "        import rlkit.torch.networks\n")
    with pytest.raises(ImportError, match=r"stand-ins have only, got: No module named 'rlkit.torch.networks'"):
        load(write(tmp_path, text))
    assert not [name for name in sys.modules if name.partition(".")[0] == "rlkit"]


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=rf"one of {', '.join(KINDS)}, or a path that ends in .py, got 'mpl'"):
        load("mpl")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py must be a file"):
        load(tmp_path / "nowhere.py")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("class Encoder: ...", ImportError, "must define CustomContextEncoder, got Encoder"),
        ("x = 1", ImportError, "must define CustomContextEncoder, got no class"),
        ("class CustomContextEncoder: ...", TypeError, "must be a class of torch.nn.Module, got <class"),
        ("CustomContextEncoder = 3", TypeError, "must be a class of torch.nn.Module, got 3"),
        (
            "import rlkit.torch.networks",
            ImportError,
            "stand-ins have only, got: No module named 'rlkit.torch.networks'",
        ),
        ("from rlkit.torch.core import np_ify", ImportError, "stand-ins have only, got: cannot import name 'np_ify'"),
        ("import no_such_module", ModuleNotFoundError, "^No module named 'no_such_module'"),
        (LINEAR_FILE.replace("self.output_size = output_size", "pass"), ValueError, "must be 6, got None"),
        (LINEAR_FILE.replace("self.output_size = output_size", "self.output_size = 7"), ValueError, "must be 6, got 7"),
        (
            LINEAR_FILE.replace("nn.Linear(input_size, output_size)", "nn.Linear(input_size, 5)"),
            ValueError,
            r"CustomContextEncoder: output must be .* 2, 3 and 6, got \[6, 5\]",
        ),
        (
            LINEAR_FILE.replace("else output", "else (output, output)"),
            TypeError,
            r"CustomContextEncoder: output must be a tensor, got tuple\. Return",
        ),
        (
            LINEAR_FILE.replace("else output", "else output / 0"),
            ValueError,
            r"encoder\.py must be finite for a context of zeros, got -?inf",
        ),
        (
            LINEAR_FILE.replace("hidden_sizes, input_size, output_size,", "size, *,"),
            TypeError,
            r"must be made by \(hidden_sizes, input_size, output_size\), got a constructor with too many",
        ),
        (
            LINEAR_FILE.replace("else output", "else output[:4]"),
            ValueError,
            r"CustomContextEncoder: output must be .* got \[4, 6\]",
        ),
        (
            "from torch import nn\n\nclass CustomContextEncoder(nn.Module):\n    output_size = 6\n"
            "    def __init__(self, *sizes):\n        super().__init__()\n",
            TypeError,
            "must have a method reset, got none",
        ),
    ],
)
def test_files_that_will_not_do(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        load(write(tmp_path, text))
