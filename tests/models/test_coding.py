"""The encoder, the decoder and the paper's network, against their definitions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, surrogate
from spikingjelly.activation_based.neuron import LIFNode
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import KLIFNode
from klif_sj.coding import ConvEncoder, VotingDecoder, make_neuron
from klif_sj.fuse import own_class
from klif_sj.models import NEURONS, CodedConvNet, mnist_network, neuron_factory, spiking_layers

torch_klif = partial(KLIFNode, backend="torch")


class Current(nn.Module):
    """In a neuron's place: passes the current on, so that a test sees it."""

    def forward(self, x_seq: Tensor) -> Tensor:
        return x_seq


def normalised(x: Tensor) -> Tensor:
    """Batch normalisation with its initial scale and shift, from the definition."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5)


def test_encoder_is_three_convolutions_summed_and_normalised_at_every_step() -> None:
    encoder = ConvEncoder(2, 5, Current, time_steps=3).double()
    image = torch.rand(4, 2, 6, 7, dtype=torch.float64)
    summed = sum(F.conv2d(image, convolution.weight, padding=1) for convolution in encoder.convolutions)
    current = encoder(image)
    assert current.shape == (3, 4, 5, 6, 7)
    for step in current:
        assert_close(step, normalised(summed), "current")


def test_encoder_computes_a_static_image_once_and_copies_nothing() -> None:
    encoder = ConvEncoder(1, 4, Current, time_steps=6)
    batches = []
    for convolution in encoder.convolutions:
        convolution.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    current = encoder(torch.rand(3, 1, 8, 8))
    assert batches == [3, 3, 3], "each convolution sees each image once"
    assert current.stride(0) == 0, "the steps share one memory"


def test_encoder_spikes_are_those_of_the_neuron_under_a_constant_current() -> None:
    encoder = ConvEncoder(1, 4, torch_klif, time_steps=5)
    image = torch.rand(3, 1, 8, 8)
    current = encoder.current(image).detach()
    expected = KLIFNode(step_mode="m", backend="torch")(torch.stack([current] * 5))
    assert 0 < expected.mean() < 1
    assert_equal(encoder(image).detach(), expected.detach(), "spikes")


def test_encoder_takes_frames_step_by_step() -> None:
    encoder = ConvEncoder(2, 5, Current, time_steps=1).eval()
    frames = torch.rand(4, 3, 2, 6, 6)
    assert_close(encoder(frames), torch.stack([encoder.current(frame) for frame in frames]), "current")


def test_encoder_refuses_other_shapes_and_no_time_steps() -> None:
    with pytest.raises(ValueError, match=r"expected an image .* got shape \(8, 8\)"):
        ConvEncoder(1, 4, Current, time_steps=2)(torch.rand(8, 8))
    with pytest.raises(ValueError, match="time_steps: expected at least 1, got 0"):
        ConvEncoder(1, 4, Current, time_steps=0)


def test_decoder_averages_over_population_and_time() -> None:
    decoder = VotingDecoder(12, 3, Current, population=4)
    spikes = (torch.rand(5, 2, 12) < 0.4).float()
    outputs = torch.einsum("tni,oi->tno", spikes, decoder.linear.weight)
    by_class = torch.stack([outputs[..., 4 * c : 4 * c + 4].mean(-1) for c in range(3)], dim=-1)
    assert_close(decoder.rates_by_step(spikes), by_class, "rates by step")
    assert_close(decoder(spikes), by_class.mean(0), "rates")


def test_decoder_rates_are_shares_of_the_population() -> None:
    decoder = VotingDecoder(12, 3, torch_klif)
    with torch.no_grad():
        decoder.linear.weight.mul_(20)
        counts = decoder((torch.rand(4, 7, 12) < 0.5).float()) * 4 * 10
    assert counts.min() >= 0
    assert counts.max() <= 40
    assert len(counts.unique()) > 2
    assert_close(counts, counts.round(), "spike counts")


@pytest.mark.parametrize(("neuron", "extra"), [("lif", 0), ("klif", 4)])
def test_parameter_count_of_the_papers_network(neuron: str, extra: int) -> None:
    with torch.device("meta"):
        net = mnist_network(neuron_factory(neuron, 8, "torch"))
    encoder = 3 * 128 * 1 * 9 + 2 * 128
    convolution = 128 * 128 * 9 + 2 * 128
    fully_connected = 128 * 14 * 14 * 2048 + 2048 * 100
    assert sum(p.numel() for p in net.parameters()) == encoder + convolution + fully_connected + extra
    assert net.notation == "(128C3+128C3+128C3)(enc)-128C3-MP2-2048FC-(100FC-AP10)(dec)"
    assert list(spiking_layers(net)) == ["encoder", "conv1", "fc1", "decoder"]


def test_width_scales_channels_and_features() -> None:
    net = mnist_network(torch_klif, 2, width=1 / 16, in_channels=2, image_size=10, classes=3)
    assert net.notation == "(8C3+8C3+8C3)(enc)-8C3-MP2-128FC-(30FC-AP10)(dec)"
    assert net.fc1.linear.weight.shape == (128, 8 * 5 * 5)
    assert net(torch.rand(4, 2, 10, 10)).shape == (4, 3)
    with pytest.raises(ValueError, match=r"width: .* got 0.001"):
        mnist_network(torch_klif, width=0.001)
    with pytest.raises(ValueError, match="image_size: expected at least 4 pixels for 2 poolings, got 3"):
        CodedConvNet(
            Current, 1, in_channels=1, image_size=3, encoder_channels=1, blocks=((1,), (1,)), hidden=1, classes=2
        )


def test_dropout_precedes_every_fully_connected_layer_only() -> None:
    net = mnist_network(torch_klif, 2, width=1 / 16, image_size=8)
    names = [name for name, module in net.named_modules() if not list(module.children())]
    assert [name for name in names if "dropout" in name] == ["fc1.dropout", "dropout"]
    assert [names[names.index(name) + 1] for name in ("fc1.dropout", "dropout")] == ["fc1.linear", "decoder.linear"]
    assert net.fc1.dropout.p == net.dropout.p == 0.5


def initial_weights(neuron: str) -> dict[str, Tensor]:
    torch.manual_seed(7)
    net = mnist_network(neuron_factory(neuron, 2, "torch"), 2, width=1 / 32, image_size=8)
    return {name: value for name, value in net.state_dict().items() if ".neuron." not in name}


@pytest.mark.parametrize("neuron", [name for name in NEURONS if name != "lif"])
def test_every_neuron_starts_from_the_same_weights(neuron: str) -> None:
    expected = initial_weights("lif")
    weights = initial_weights(neuron)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert_equal(value, expected[name], name)


@pytest.mark.parametrize("neuron", NEURONS)
def test_every_neuron_learns_in_the_network(neuron: str) -> None:
    net = mnist_network(neuron_factory(neuron, 4, "torch"), 4, width=1 / 16, image_size=8)
    labels = torch.arange(20) % 10
    images = torch.rand(10, 1, 8, 8)[labels]
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(net(images), F.one_hot(labels).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        functional.reset_net(net)
        losses.append(loss.item())
    without_learning = 0.09  # the loss of the best constant answer, 0.1 for every class
    assert min(losses[-5:]) < 0.85 * without_learning


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_lif_is_spikingjellys_with_the_same_surrogate(backend: str) -> None:
    """It is fused, unless the backend is 'torch'; spikes are equal bit for bit."""
    neuron = neuron_factory("lif", 4, backend, keep_state=False)()
    assert own_class(neuron) is LIFNode
    assert (type(neuron) is LIFNode) == (backend == "torch")
    assert (type(neuron.surrogate_function).__name__, neuron.surrogate_function.alpha) == ("ATan", 2.0)
    upstream = LIFNode(surrogate_function=surrogate.ATan(alpha=2.0), step_mode="m")
    neuron.step_mode = "m"
    x = torch.linspace(-1, 6, 60).view(4, 3, 5)
    assert_equal(neuron(x), upstream(x), "spikes")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_clif_and_its_baseline_are_one_neuron_in_the_first_step(backend: str) -> None:
    """What CLIF adds acts on the reset, so it shows from the second step on."""
    x = torch.linspace(-1, 4, 60).view(1, 3, 20).repeat(2, 1, 1)
    spikes, gradients = [], []
    for name in ("clif-baseline", "clif"):
        neuron = neuron_factory(name, 2, backend)()
        neuron.step_mode = "m"
        leaf = x.clone().requires_grad_()
        spikes.append(neuron(leaf))
        (gradient,) = torch.autograd.grad(spikes[-1][0].sum(), leaf)
        gradients.append(gradient)
    assert_equal(spikes[0][0], spikes[1][0], "spikes of the first step")
    assert_equal(*gradients, "gradients of the first step")
    assert gradients[0].any()
    assert not torch.equal(spikes[0][1], spikes[1][1])


def test_clifs_baseline_is_spikingjellys_lif_with_clifs_settings() -> None:
    neuron, clif = neuron_factory("clif-baseline", 4, "torch")(), neuron_factory("clif", 4, "torch")()
    assert type(neuron) is LIFNode
    for setting in ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset"):
        assert getattr(neuron, setting) == getattr(clif, setting)
    assert repr(neuron.surrogate_function) == repr(clif.surrogate_function)


def test_klif_names_are_the_papers_variants() -> None:
    made = {name: neuron_factory(name, 4, "torch")() for name in NEURONS if name.startswith("klif")}
    variants = {name: (node.activation, node.k.requires_grad, node.scale_reset) for name, node in made.items()}
    assert variants == {
        "klif": ("relu", True, False),
        "klif-star": ("relu", True, True),
        "klif-only-k": ("identity", True, False),
        "klif-only-relu": ("relu", False, False),
        "klif-celu": ("celu", True, False),
        "klif-leaky-relu": ("leaky_relu", True, False),
    }
    assert neuron_factory("KLIF*", 4, "torch")().scale_reset


def test_unknown_neuron_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"expected one of lif, klif, .* got 'kilf'; did you mean 'klif'"):
        neuron_factory("kilf", 4)


def test_a_factory_is_told_the_channels_where_it_asks() -> None:
    asked = []

    def factory(channels: int) -> nn.Module:
        asked.append(channels)
        return torch_klif()

    net = mnist_network(factory, 2, width=1 / 16, image_size=8)
    assert asked == [8, 8, 128, 100]
    assert all(neuron.step_mode == "m" for neuron in spiking_layers(net).values())


def test_making_a_neuron_leaves_the_random_numbers_alone() -> None:
    def factory() -> nn.Module:
        torch.rand(5)
        return torch_klif()

    before = torch.get_rng_state()
    make_neuron(factory, 1)
    assert_equal(torch.get_rng_state(), before, "generator state")
