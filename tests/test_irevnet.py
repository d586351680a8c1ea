"""The i-RevNets: sizes, images back from features, flat memory, and the published weights."""

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revlib import DriftWarning, SwapCoupling, anchored
from revlib.memory import measure_step
from revlib.models import (
    IRevNet,
    create_model,
    irevnet34,
    irevnet_a,
    irevnet_b,
    irevnet_state_dict,
)

IMAGENET = {"num_classes": 1000, "image_shape": (3, 224, 224)}
STEP = 2.0**-12


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tiny(kind: str, depth: int = 2, **options: object) -> IRevNet:
    """Injective or bijective, of two stages, with statistics that eval mode can use.

    With biases of 0, padding would meet ReLUs exactly at 0, where rounding decides the gradient.
    """
    torch.manual_seed(0)
    widening = {"a": {"padding": 13}, "b": {"squeeze": 2}}[kind]
    model = IRevNet((depth, depth), (1, 2), image_shape=(3, 8, 8), **widening, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    with torch.no_grad():
        model(torch.randn(8, 3, 8, 8))
    return model


both_kinds = pytest.mark.parametrize("kind", ["a", "b"])


@pytest.mark.parametrize(
    ("build", "options", "millions"),
    [
        # Counted by others on the published code: 125.12 million; by the paper: 29 million.
        (irevnet_b, IMAGENET, 125.120),
        (irevnet_b, {**IMAGENET, "kernels": (1, 3, 1)}, 29.201),
        # By the paper 181 million, of a network whose code is not published.
        (irevnet_a, IMAGENET, 199.034),
        (irevnet_a, {}, 6.275),
        (irevnet_b, {}, 4.726),
        (irevnet34, {}, 0.467),
    ],
)
def test_parameters(build, options, millions):
    with torch.device("meta"):
        model = build(**options)

    assert count(model) / 1e6 == pytest.approx(millions, abs=0.0005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "image_shape", "feature_shape"),
    [
        (irevnet_a, (3, 32, 32), (512, 8, 8)),
        (irevnet_a, (1, 28, 28), (512, 7, 7)),
        (irevnet34, (3, 32, 32), (128, 8, 8)),
        (irevnet34, (1, 28, 28), (128, 7, 7)),
        (irevnet_a, (3, 224, 224), (6144, 7, 7)),
        (irevnet_a, (1, 64, 96), (6144, 2, 3)),
        (irevnet_b, (3, 32, 32), (192, 4, 4)),
        (irevnet_b, (3, 224, 224), (3072, 7, 7)),
    ],
)
def test_features_have_the_shape_they_say(build, image_shape, feature_shape):
    with torch.device("meta"):
        model = build(image_shape=image_shape)
        features = model.features(torch.empty(2, *image_shape))
        logits = model(torch.empty(2, *image_shape))

    assert model.feature_shape == feature_shape
    assert features.shape == (2, *feature_shape)
    assert logits.shape == (2, 10)
    if build is irevnet_b:
        assert math.prod(feature_shape) == math.prod(image_shape)


@pytest.mark.parametrize("name", ["irevnet_a", "irevnet_b"])
@pytest.mark.parametrize("exact", [False, True])
def test_nothing_of_the_trunk_is_stored(name, exact):
    with torch.device("meta"):
        trunk = create_model(name, exact=exact).trunk
    policies = dict(zip(dict(trunk.named_children()), trunk.policies(), strict=True))

    kept = {"1"} if name == "irevnet_a" and not exact else set()
    assert {block for block, policy in policies.items() if policy != "rebuild"} == kept
    assert sum(isinstance(block, SwapCoupling) for block in trunk) == 54


@pytest.mark.parametrize("name", ["irevnet34", "irevnet_a", "irevnet_b"])
def test_they_are_exact_unless_told_otherwise(name):
    with torch.device("meta"):
        assert create_model(name).trunk.exact
        assert not create_model(name, exact=False).trunk.exact


def test_the_block_that_would_magnify_rounding_stays_recomputed():
    trunk = tiny("a", exact=False).trunk
    place = [*dict(trunk.named_children())].index("1")

    trunk.policy = "rebuild"

    assert trunk.policies()[place] == "recompute"
    trunk.policy = ["rebuild"] * len(trunk)
    assert trunk.policies()[place] == "recompute"
    trunk.exact = True
    assert set(trunk.policies()) == {"rebuild"}


@pytest.mark.parametrize("exact", [False, True])
def test_a_network_can_be_anchored(exact):
    model = tiny("a", depth=8, exact=exact)

    model.policy = anchored(len(model.trunk), every=8)
    F.cross_entropy(model(torch.randn(2, 3, 8, 8)), torch.arange(2)).backward()

    anchors = [i for i, policy in enumerate(model.trunk.policies()) if policy == "recompute"]
    assert anchors == ([8, 16] if exact else [2, 8, 16])


def test_errors_tell_the_place_of_a_block_in_lists_of_policies():
    model = tiny("a")
    with pytest.raises(ValueError, match=r"got 'bad' for block 1 at index 2 \(SwapCoupling\)$"):
        model.policy = ["rebuild", "rebuild", "bad", *["rebuild"] * 2]
    model.trunk[2].f = nn.Sequential(nn.Flatten())
    with pytest.raises(ValueError, match=r"^block 1 at index 2 \(SwapCoupling\): "):
        model(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("padding", "kept"), [(11, False), (12, False), (14, True)])
def test_only_padding_that_reaches_the_first_stream_magnifies_rounding(padding, kept):
    channels = 24 - padding  # of streams of 12

    shape = (channels, 8, 8)
    trunk = IRevNet((2,), (1,), image_shape=shape, padding=padding, exact=False).trunk

    assert ("recompute" in trunk.policies()) == kept


def test_the_policy_of_the_network_may_be_set_anew():
    model = tiny("a", exact=False)

    model.policy = "store"
    assert model.policy == "store"
    assert {*model.trunk.policies(), *model.head.policies()} == {"store"}

    model.policy = "rebuild"
    assert model.trunk.policies() == tiny("a", exact=False).trunk.policies()
    assert model.head.policies() == ["recompute", "store"]


def test_one_coupling_on_a_padded_image_is_a_network():
    model = IRevNet((1,), (1,), image_shape=(3, 8, 8), padding=13)

    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_a_sub_network_that_meets_padding_is_a_sequence_of_layers():
    f = tiny("a").trunk.get_submodule("0").f

    x = torch.randn(2, 8, 8, 8)
    assert [type(layer) for layer in f[1:3]] == [nn.Conv2d, nn.BatchNorm2d]
    assert torch.equal(f[:2](x), f[1](torch.zeros(2, 8, 8, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("build", [irevnet_a, irevnet_b])
def test_a_whole_network_trains_in_float32_without_a_drift_warning(build, device):
    torch.manual_seed(0)
    model = build(exact=False).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(3):
        x = torch.randn(4, 3, 32, 32, device=device)
        F.cross_entropy(model(x), torch.arange(4, device=device)).backward()
        optimizer.step()

    assert float(model.trunk.rebuild_error) > 0  # the guard looked, and a warning would fail


def padded_to_twice_the_image(**options: object) -> IRevNet:
    """As `irevnet_a` is for ImageNet, but narrow inside: its padding is all of one stream."""
    sizes = {"units": (4, 4, 6, 4), "strides": (1, 2, 2, 2), "squeeze": 4, "padding": 48}
    return IRevNet(**sizes, image_shape=(3, 64, 64), bottleneck=32, **options)


def smooth_images(batch: int, side: int, device: torch.device) -> Tensor:
    """Normalised images whose neighbouring pixels are alike, as those of photographs are."""
    x = sum(
        F.interpolate(torch.randn(batch, 3, cells, cells), (side, side), mode="bilinear") / cells
        for cells in (2, 4, 8, 16, 32)
    )
    x -= x.mean((0, 2, 3), keepdim=True)
    return (x / x.std((0, 2, 3), keepdim=True)).to(device)


def train_beside_stored(model: IRevNet, steps: int, dtype: torch.dtype) -> Iterator[tuple]:
    """Yields the gradients of each step, rebuilt and those of a stored copy."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(steps):
        x, y = smooth_images(8, model.image_shape[1], device), torch.arange(8, device=device)
        stored = copy.deepcopy(model)
        stored.policy = "store"
        optimizer.zero_grad()
        for net in (model, stored):
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
        yield [[p.grad for p in net.parameters()] for net in (model, stored)]
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("build", [irevnet_b, padded_to_twice_the_image])
def test_float32_gradients_of_the_first_steps_are_off_by_less_than_5_percent(build, device):
    torch.manual_seed(0)
    model = build(exact=False).to(device)

    for got, want in train_beside_stored(model, 4, torch.float32):  # a DriftWarning would fail
        off = sum((g - w).square().sum() for g, w in zip(got, want, strict=True))
        assert 0 < off / sum(w.square().sum() for w in want) < 0.05**2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [irevnet_a, irevnet_b])
def test_exact_gradients_of_a_whole_network_are_the_stored_runs(build, dtype, device):
    torch.manual_seed(0)
    model = build().to(device)

    for got, want in train_beside_stored(model, 2, dtype):
        assert all(map(torch.equal, got, want))


@pytest.mark.slow
@pytest.mark.parametrize("build", [irevnet_a, irevnet_b])
def test_under_bfloat16_a_network_that_is_not_exact_is_warned_of(build, device):
    torch.manual_seed(1)
    model = build(exact=False).to(device)

    with pytest.warns(DriftWarning):
        for _ in train_beside_stored(model, 3, torch.bfloat16):
            pass


@both_kinds
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.double, 1e-12), (torch.float, 1e-5)], ids=str
)
def test_images_come_back_from_their_features(kind, dtype, tolerance, device):
    model = tiny(kind, depth=6, exact=False).eval().to(device, dtype)
    x = torch.randn(4, 3, 8, 8, device=device, dtype=dtype)

    with torch.no_grad():
        again = model.inverse(model.features(x))

    torch.testing.assert_close(again, x, rtol=0, atol=tolerance)


@both_kinds
def test_exact_images_come_back_to_the_last_bit(kind, device):
    model = tiny(kind, depth=8).eval().to(device)
    x = torch.randint(-4096, 4096, (4, 3, 8, 8), device=device) * STEP

    with torch.no_grad():
        again = model.inverse(model.features(x))

    assert torch.equal(again, x)


@both_kinds
def test_exact_images_between_multiples_come_back_within_half_a_step(kind, device):
    model = tiny(kind, depth=8).eval().to(device)
    x = torch.randn(4, 3, 8, 8, device=device)

    with torch.no_grad():
        again = model.inverse(model.features(x))

    assert (again - x).abs().max() <= STEP / 2


@pytest.mark.slow
@pytest.mark.parametrize("build", [irevnet_a, irevnet_b])
def test_images_come_back_from_a_whole_network_for_cifar(build, device):
    x = torch.randint(0, 256, (2, 3, 32, 32), device=device) / 256
    for exact in (False, True):
        torch.manual_seed(0)
        model = build(exact=exact).to(device)
        with torch.no_grad():
            for _ in range(10):
                model(x)
            features = model.eval().features(x)
            again = model.inverse(features)

        error = (again - x).abs().max().item()
        assert error == 0 if exact else error < 1e-4


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))]
)
@pytest.mark.parametrize("build", [irevnet_a, irevnet_b])
def test_a_network_that_is_hardly_trained_gives_images_back(build, seed, device):
    torch.manual_seed(seed)
    model = build(exact=False).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    x = torch.randint(0, 256, (4, 3, 32, 32), device=device) / 256
    for _ in range(3):
        with torch.no_grad():
            features = model.eval().features(x)
            again = model.inverse(features)
        assert features.abs().max() < 100  # in eval mode, with the statistics of few batches
        torch.testing.assert_close(again, x, rtol=0, atol=1e-4)
        # A DriftWarning would fail.
        F.cross_entropy(model.train()(x), torch.arange(4, device=device)).backward()
        optimizer.step()


@both_kinds
@pytest.mark.parametrize("policy", ["rebuild", "recompute"])
def test_gradients_equal_the_stored_runs(kind, policy, device):
    model = tiny(kind, dropout=0.2, policy=policy, exact=False).double().to(device)
    stored = copy.deepcopy(model)
    stored.trunk.policy = "store"
    x = torch.randn(4, 3, 8, 8, dtype=torch.double, device=device)
    for net in (model, stored):
        torch.manual_seed(1)
        F.cross_entropy(net(x), torch.arange(4, device=device)).backward()

    for (name, got), want in zip(model.named_parameters(), stored.parameters(), strict=True):
        scale = want.grad.abs().max().item()
        torch.testing.assert_close(
            got.grad, want.grad, rtol=0, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    for got, want in zip(model.buffers(), stored.buffers(), strict=True):
        torch.testing.assert_close(got, want)


@both_kinds
@pytest.mark.parametrize("policy", ["rebuild", "store"])
def test_exact_gradients_equal_the_stored_runs_bit_for_bit(kind, policy, device):
    model = tiny(kind, depth=5, dropout=0.2, policy=policy).to(device)
    stored = copy.deepcopy(model)
    stored.trunk.policy = "store"
    x = torch.randn(4, 3, 8, 8, device=device)
    for net in (model, stored):
        torch.manual_seed(1)
        F.cross_entropy(net(x), torch.arange(4, device=device)).backward()

    for got, want in zip(model.parameters(), stored.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)


@both_kinds
def test_a_loss_on_reconstructions_trains_what_a_stored_run_trains(kind, device):
    model = tiny(kind).eval().double().to(device)
    stored = copy.deepcopy(model)
    stored.trunk.policy = "store"
    features = torch.randn(2, *model.feature_shape, dtype=torch.double, device=device)
    gradients = []
    for net in (model, stored):
        y = features.clone().requires_grad_()
        parameters = list(net.trunk.parameters())
        gradients.append(torch.autograd.grad(net.inverse(y).sin().sum(), [y, *parameters]))

    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@both_kinds
def test_each_sub_network_is_evaluated_twice_a_step(kind):
    model = tiny(kind, depth=3)
    calls = []
    for block in model.trunk:
        if isinstance(block, SwapCoupling):
            block.f.register_forward_hook(lambda *_: calls.append("f"))

    model(torch.randn(2, 3, 8, 8)).sum().backward()

    assert len(calls) == 2 * 6


def measure(kind: str, depth: int, *, inverse: bool = False, **options: object) -> tuple:
    model = tiny(kind, depth, **options)
    shape = model.feature_shape if inverse else model.image_shape
    run = model.inverse if inverse else model.features
    weights = torch.randn(2, *(model.image_shape if inverse else model.feature_shape))
    x = torch.randn(2, *shape, requires_grad=True)
    memory = measure_step(lambda: (run(x) * weights).sum().backward(), model=model)
    return memory.saved.activations, memory.peak.activations


@both_kinds
def test_saved_bytes_are_those_of_the_features_at_any_depth(kind):
    features = 4 * 2 * math.prod(tiny(kind).feature_shape)
    # Padded with more than it has, the image makes two stretches of floats: the input of the
    # second coupling is kept.
    stretches = 2 if kind == "a" else 1
    kept = features * stretches
    extremes = 4 * 2 * 2  # of a stretch's two halves

    (exact,), (floats,) = (
        {measure(kind, depth, exact=exact)[0] for depth in (2, 5, 9)} for exact in (True, False)
    )
    # The drift guard keeps at most a 16th of a stretch's input beside them.
    assert features < exact <= features * 17 / 16 + extremes
    assert kept < floats <= kept * 17 / 16 + extremes * stretches


@both_kinds
@pytest.mark.parametrize("exact", [False, True])
def test_a_training_step_saves_one_stream_at_any_depth(kind, exact):
    def saved(depth: int) -> int:
        model = tiny(kind, depth, exact=exact)
        x, y = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
        memory = measure_step(lambda: F.cross_entropy(model(x), y).backward(), model=model)
        return memory.saved.activations

    stream = 4 * 2 * math.prod(tiny(kind).feature_shape)
    streams = 2 if kind == "a" and not exact else 1  # the input of the second coupling, too

    (kept,) = {saved(depth) for depth in (2, 5, 9)}
    # And little beside: what the guard looks at, what the classifier sees, and what the loss does.
    assert streams * stream <= kept < (streams + 0.4) * stream


@pytest.mark.slow
@both_kinds
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_peak_does_not_grow_with_depth(kind, inverse):
    peaks = {measure(kind, depth, inverse=inverse)[1] for depth in (3, 4, 9)}

    assert len(peaks) == 1


def test_the_stored_trunk_keeps_every_activation():
    assert measure("a", 9, policy="store")[0] > 5 * measure("a", 9)[0]


class PublishedBlock(nn.Module):
    """A block of the published code, said again: names, order and arithmetic."""

    def __init__(self, c_in: int, c_out: int, stride: int, first: bool) -> None:
        super().__init__()
        self.stride = stride
        self.pad = 2 * c_out - c_in if stride == 1 else 0
        c_half, c = (c_out if self.pad else c_in // 2), c_out // 4
        layers = [] if first else [nn.BatchNorm2d(c_half), nn.ReLU()]
        layers += [nn.Conv2d(c_half, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
        layers += [nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.Dropout(0.1)]
        layers += [nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c_out, 3, 1, 1, bias=False)]
        self.bottleneck_block = nn.Sequential(*layers)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        if self.pad:
            x = torch.cat((x1, x2), 1)
            x1, x2 = torch.cat((x, x.new_zeros(len(x), self.pad, *x.shape[2:])), 1).chunk(2, 1)
        update = self.bottleneck_block(x2)
        return squares(x2, self.stride), update + squares(x1, self.stride)


class Published(nn.Module):
    def __init__(self, image_shape, units, strides, channels, squeeze, classes=10):
        super().__init__()
        self.squeeze = squeeze or 1
        c_in, stack = image_shape[0] * self.squeeze**2, []
        for depth, first_stride, c_out in zip(units, strides, channels, strict=True):
            for stride in (first_stride, *[1] * (depth - 1)):
                stack.append(PublishedBlock(c_in, c_out, stride, first=not stack))
                c_in = 2 * c_out
        self.stack = nn.ModuleList(stack)
        self.bn1 = nn.BatchNorm2d(c_in, momentum=0.9)
        self.linear = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = squares(x, self.squeeze)
        half = x.shape[1] // 2
        x1, x2 = x[:, :half], x[:, half:]
        for block in self.stack:
            x1, x2 = block(x1, x2)
        features = torch.cat((x1, x2), 1)
        return self.linear(self.bn1(features).relu().mean((2, 3))), features


def squares(x: Tensor, side: int) -> Tensor:
    """The published order: every place of the squares with all its channels."""
    return torch.cat([x[:, :, i::side, j::side] for i in range(side) for j in range(side)], 1)


PUBLISHED = {
    "bijective": (
        dict(image_shape=(3, 32, 32), units=(2, 2), strides=(2, 2), channels=(24, 96), squeeze=2),
        dict(image_shape=(3, 32, 32), units=(2, 2), strides=(2, 2), squeeze=2),
    ),
    "injective": (
        dict(image_shape=(3, 16, 16), units=(2, 2), strides=(1, 2), channels=(16, 64), squeeze=0),
        dict(image_shape=(3, 16, 16), units=(2, 2), strides=(1, 2), padding=29),
    ),
    "squeezed by 4": (
        dict(image_shape=(3, 32, 32), units=(2, 2), strides=(1, 2), channels=(48, 192), squeeze=4),
        dict(image_shape=(3, 32, 32), units=(2, 2), strides=(1, 2), padding=48, squeeze=4),
    ),
}


@pytest.mark.parametrize("parallel", [False, True], ids=["plain", "DataParallel"])
@pytest.mark.parametrize(("theirs", "ours"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_weights_load_and_give_the_published_values(theirs, ours, parallel):
    torch.manual_seed(0)
    published = Published(**theirs)
    x = torch.randn(4, *theirs["image_shape"])
    with torch.no_grad():
        for _ in range(3):
            published(x)
        logits, features = published.eval()(x)
    weights = published.state_dict(prefix="module." * parallel)
    model = IRevNet(**ours, exact=False).eval()

    model.load_state_dict(irevnet_state_dict(weights))

    torch.testing.assert_close(model.features(x), features)
    torch.testing.assert_close(model(x), logits)


@pytest.mark.parametrize(
    ("build", "units", "strides", "channels", "squeeze", "shape"),
    [
        (irevnet_a, (18, 18, 18), (1, 2, 2), (16, 64, 256), 0, (3, 32, 32)),
        (irevnet_b, (6, 16, 72, 6), (2, 2, 2, 2), (24, 96, 384, 1536), 2, (3, 224, 224)),
        (irevnet_a, (4, 4, 6, 4), (1, 2, 2, 2), (48, 192, 768, 3072), 4, (3, 224, 224)),
    ],
)
def test_published_sizes_are_ours(build, units, strides, channels, squeeze, shape):
    with torch.device("meta"):
        published = Published(shape, units, strides, channels, squeeze)
        model = build(image_shape=shape)
    renamed = irevnet_state_dict(published.state_dict())

    assert {name: t.shape for name, t in renamed.items()} == {
        name: t.shape for name, t in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("published", "got"),
    [
        ({"conv1.weight": torch.zeros(1)}, r"'conv1\.weight' of type Tensor"),
        ({"bn1.foo.bar": torch.zeros(1)}, r"'bn1\.foo\.bar' of type Tensor"),
        ({"linear.weight": 1}, "'linear.weight' of type int"),
        ({"epoch": 1, "state_dict": {}}, "'epoch' of type int"),
        ({"state_dict": {}}, "'state_dict' of type dict"),
        ({3: torch.zeros(1)}, "3 of type Tensor"),
        ({}, "{}"),
        ([1], r"\[1\]"),
    ],
)
def test_what_is_no_state_dict_of_the_published_code_raises(published, got):
    with pytest.raises(ValueError, match=f"published must be .* entry 'state_dict'.; got {got}"):
        irevnet_state_dict(published)


@pytest.mark.parametrize(
    ("build", "image_shape", "message"),
    [
        (irevnet_a, (3, 30, 32), r"height and width divisible by 4, .*; got \(3, 30, 32\)"),
        (irevnet_a, (3, 32, 30), r"height and width divisible by 4, .*; got \(3, 32, 30\)"),
        (irevnet_b, (3, 28, 28), r"height and width divisible by 8, .*; got \(3, 28, 28\)"),
        (irevnet_b, (3, 100, 224), r"divisible by 32, .*; got \(3, 100, 224\)"),
        (irevnet_b, (32, 32), r"must be \(channels, height, width\); got \(32, 32\)"),
        (irevnet_b, (3, 32, 0), r"must be \(channels, height, width\); got \(3, 32, 0\)"),
        (irevnet_b, (3, 32, 32.0), r"must be \(channels, height, width\); got \(3, 32, 32.0\)"),
        (irevnet_a, 32, r"must be \(channels, height, width\); got 32"),
        (irevnet34, (12, 32, 32), r"must have at most 8 channels, .*; got \(12, 32, 32\)"),
        (irevnet_a, (33, 32, 32), r"must have at most 32 channels, .*; got \(33, 32, 32\)"),
    ],
)
def test_bad_image_shapes_raise(build, image_shape, message):
    with pytest.raises(ValueError, match=f"image_shape must .*{message}|image_shape {message}"):
        build(image_shape=image_shape)


def test_an_odd_number_of_channels_raises():
    with pytest.raises(ValueError, match=r"even number of channels.*; got 3 with image_shape \(3"):
        IRevNet((1,), (1,), image_shape=(3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": -1}, "padding must be a whole number of at least 0; got -1"),
        ({"squeeze": 0}, "squeeze must be a whole number of at least 1; got 0"),
        ({"squeeze": -2}, "squeeze must be a whole number of at least 1; got -2"),
        ({"squeeze": "2"}, "squeeze must be a whole number of at least 1; got '2'"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1; got 0"),
        ({"num_classes": True}, "num_classes must be a whole number of at least 1; got True"),
        ({"bottleneck": 0}, "bottleneck must be a whole number of at least 1; got 0"),
        ({"units": (0, 2)}, r"units must be whole numbers above 0.*; got \(0, 2\)"),
        ({"units": (), "strides": ()}, r"units must be whole numbers above 0.*; got \(\)"),
        ({"units": 2}, "units must be whole numbers above 0.*; got 2"),
        ({"strides": (0, 1)}, r"strides must be whole numbers above 0.*; got \(0, 1\)"),
        ({"kernels": (3, 3)}, r"kernels must be the sizes of 3 convolutions; got \(3, 3\)"),
        ({"kernels": (3, 2, 3)}, r"kernels must be odd.*; got \(3, 2, 3\)"),
    ],
)
def test_options_are_checked(options, message):
    sizes = {"units": (1, 1), "strides": (1, 1), "image_shape": (4, 8, 8)}

    with pytest.raises(ValueError, match=f"^{message}"):
        IRevNet(**{**sizes, **options})


@pytest.mark.parametrize("squeeze", ["2", None])
def test_a_builder_checks_what_it_computes_the_padding_of(squeeze):
    with pytest.raises(ValueError, match=f"^squeeze must be a whole .*; got {squeeze!r}"):
        irevnet_a(squeeze=squeeze)


def test_an_image_shape_may_be_of_numpys_integers():
    shape = IRevNet((1,), (1,), image_shape=np.array((4, 8, 8))).image_shape

    assert shape == (4, 8, 8)
    assert {type(n) for n in shape} == {int}


def test_padding_of_ones_own_takes_images_of_more_channels():
    assert irevnet34(image_shape=(12, 32, 32), padding=0).feature_shape == (192, 8, 8)


def test_as_many_strides_as_stages():
    with pytest.raises(ValueError, match="strides must have one entry per stage; got 1 for 2"):
        IRevNet((1, 1), (1,), image_shape=(4, 8, 8))


def test_images_and_features_of_another_shape_raise():
    model = tiny("b")

    with pytest.raises(ValueError, match=r"x must be \[batch, 3, 8, 8\]; got \[2, 3, 16, 16\]"):
        model(torch.zeros(2, 3, 16, 16))
    with pytest.raises(TypeError, match=r"^x must be a tensor; got list$"):
        model([1])
    with pytest.raises(ValueError, match=r"features must be \[batch, 48, 2, 2\]; got \[2, 12, 4"):
        model.inverse(torch.zeros(2, 12, 4, 4))
