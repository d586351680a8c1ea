"""The classifiers: the paper's sizes, twins that match, and training that equals the stored."""

import copy
import re

import pytest
import torch
from torch import nn

from revlib import AdditiveCoupling, anchored
from revlib.models import ResNet, RevNet, create_model, model_names
from revlib.models.revnet import Transition

TINY = {"units": (2, 2, 2), "widths": (8, 8, 16, 32)}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet32", 0.46),
        ("revnet38", 0.46),
        ("resnet110", 1.73),
        ("revnet110", 1.73),
        ("resnet164", 1.66),
        ("revnet164", 1.66),
    ],
)
def test_parameters_are_those_of_the_paper_and_of_the_twin(name, millions):
    assert count(create_model(name)) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("name", "published", "millions"),
    [("resnet101", 44.5, 44.541), ("revnet104", 45.2, 45.428)],
)
def test_parameters_for_imagenet_are_those_of_the_paper_to_half_a_percent(
    name, published, millions
):
    with torch.device("meta"):
        model = create_model(name, num_classes=1000)

    assert count(model) / 1e6 == pytest.approx(millions, abs=0.0005)
    assert millions == pytest.approx(published, rel=0.0055)


@pytest.mark.slow
def test_revnet1001_has_about_the_parameters_of_its_twin():
    with torch.device("meta"):
        twin, model = create_model("resnet1001"), create_model("revnet1001")

    assert count(twin) / 1e6 == pytest.approx(10.286, abs=0.0005)
    assert count(model) == pytest.approx(count(twin), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in model_names() if name[0] == "r"])
def test_layers_with_weights_are_as_many_as_the_name_says(name):
    with torch.device("meta"):
        model = create_model(name)
    layers = [
        layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and not path.endswith(("shortcut", "s1", "s2"))
    ]

    # A coupling has six layers, and 1001 - 2 is no multiple of six.
    assert len(layers) == {"revnet1001": 998}.get(name, int(name[6:]))


@pytest.mark.parametrize("model", [ResNet, RevNet])
@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("size", [8, 32, 33])
@pytest.mark.parametrize("large_images", [False, True])
def test_images_of_any_size_become_logits(model, bottleneck, size, large_images):
    net = model(
        **TINY,
        bottleneck=bottleneck,
        num_classes=7,
        in_channels=1,
        dropout=0.1,
        large_images=large_images,
    )

    assert net(torch.randn(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("policy", ["rebuild", "recompute"])
@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("large_images", [False, True])
def test_gradients_equal_the_stored_runs(policy, bottleneck, large_images, device):
    options = {"bottleneck": bottleneck, "large_images": large_images}
    model = RevNet(**TINY, **options, dropout=0.2, policy=policy).double().to(device)
    stored = copy.deepcopy(model)
    stored.trunk.policy = "store"
    x = torch.randn(4, 3, 32, 32, dtype=torch.double, device=device)
    for net in (model, stored):
        torch.manual_seed(1)
        nn.functional.cross_entropy(net(x), torch.arange(4, device=device)).backward()

    for (name, got), want in zip(model.named_parameters(), stored.parameters(), strict=True):
        scale = want.grad.abs().max().item()
        torch.testing.assert_close(
            got.grad, want.grad, rtol=0, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    for got, want in zip(model.buffers(), stored.buffers(), strict=True):
        torch.testing.assert_close(got, want)


def test_couplings_are_rebuilt_and_transitions_recomputed():
    model = create_model("revnet38")

    assert [type(block) for block in model.trunk].count(Transition) == 2
    for block, policy in zip(model.trunk, model.trunk.policies(), strict=True):
        assert policy == ("rebuild" if isinstance(block, AdditiveCoupling) else "recompute")


def test_images_of_imagenet_meet_the_blocks_at_a_quarter_of_their_size():
    with torch.device("meta"):
        model = create_model("revnet104")

        assert model.stem(torch.empty(1, 3, 224, 224)).shape == (1, 128, 56, 56)
        assert model.trunk(torch.empty(1, 128, 56, 56)).shape == (1, 3328, 7, 7)


@pytest.mark.parametrize("policy", ["store", "recompute"])
def test_policy_is_an_option_of_the_whole_network(policy):
    model = create_model("revnet38", policy=policy)

    assert set(model.trunk.policies()) == {policy}
    assert model.head.policies() == [policy, "store"]


def test_the_policy_of_the_network_may_be_set_anew():
    model = create_model("revnet38", policy="store")

    model.policy = "rebuild"
    assert model.policy == create_model("revnet38").policy == model.trunk.policies()
    assert model.head.policies() == ["recompute", "store"]

    model.policy = "store"
    assert {*model.trunk.policies(), *model.head.policies()} == {"store"}


def test_a_policy_by_block_is_one_of_the_couplings_and_transitions():
    policies = ["rebuild", "store", "recompute", "rebuild", "recompute", "store"]

    model = RevNet(**TINY, policy=policies)

    assert model.trunk.policies() == policies
    assert model.head.policies() == ["recompute", "store"]


def test_a_network_can_be_anchored_and_its_transitions_stay_recomputed():
    model = create_model("revnet38", policy=anchored(9, every=4))

    assert [i for i, policy in enumerate(model.policy) if policy == "recompute"] == [3, 4, 6, 8]
    with pytest.raises(ValueError, match="one entry per block; got 8 for 9 blocks"):
        model.policy = anchored(8, every=4)
    with pytest.raises(TypeError, match="policy must be a name or a list of names; got None"):
        model.policy = None


def test_unknown_policy_raises():
    with pytest.raises(ValueError, match=r"policy must be one of .*; got 'bad'"):
        RevNet(**TINY, policy="bad")


@pytest.mark.parametrize("name", ["revnet39", ["revnet38"], None])
def test_unknown_name_raises(name):
    got = re.escape(repr(name))
    with pytest.raises(ValueError, match=f"name must be one of resnet32, .*; got {got}$"):
        create_model(name)


def test_odd_width_raises():
    with pytest.raises(ValueError, match=r"widths must be even.*got \(9, 9, 16, 32\)"):
        RevNet((1, 1, 1), (9, 9, 16, 32))


@pytest.mark.parametrize("model", [ResNet, RevNet])
def test_as_many_widths_as_stages_and_a_stem(model):
    with pytest.raises(ValueError, match=r"widths must have one entry more than units"):
        model((1, 1, 1), (8, 8, 16))


@pytest.mark.parametrize("model", [ResNet, RevNet])
@pytest.mark.parametrize(
    ("units", "widths"),
    [
        ((0, 2), (8, 8, 16)),
        ((1, 1), (8, 0, 16)),
        ((), (8,)),
        ((2, 2), (32, "a", 2)),
        ((2, 2), 32),
        ((2,), (32.0, 32.0)),
    ],
)
def test_stages_without_blocks_or_channels_raise(model, units, widths):
    with pytest.raises(ValueError, match=r"(units|widths) must be whole numbers above 0.*; got"):
        model(units, widths)


@pytest.mark.parametrize("model", [ResNet, RevNet])
@pytest.mark.parametrize("option", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, True])
def test_no_classes_or_channels_raise(model, option, value):
    message = f"{option} must be a whole number of at least 1; got {value}"
    with pytest.raises(ValueError, match=message):
        model(**TINY, **{option: value})


@pytest.mark.parametrize("name", ["resnet32", "revnet38", "irevnet34"])
@pytest.mark.parametrize("dropout", [-1, -3.0, 1, 1.5, float("nan"), "0.1", None, True])
def test_dropout_that_is_no_share_raises(name, dropout):
    message = f"dropout must be a number of at least 0 and below 1; got {dropout!r}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        create_model(name, dropout=dropout)


@pytest.mark.parametrize("model", [ResNet, RevNet])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_weights_trained_with_dropout_load_without(model, bottleneck):
    dropping = model(**TINY, bottleneck=bottleneck, dropout=0.2)
    plain = model(**TINY, bottleneck=bottleneck)
    x = torch.randn(2, 3, 8, 8)

    plain.load_state_dict(dropping.state_dict())

    assert torch.equal(plain.eval()(x), dropping.eval()(x))
    last = [*plain.trunk[0].f.named_children()][-1][0]
    assert [*plain.trunk[0].f._modules] == [str(i) for i in range(int(last) + 1)]
    assert [*dropping.trunk[0].f._modules][-2:] == ["dropout", last]
