"""The settings of a run: what is refused at the door, in one line that names it."""

import re
from pathlib import Path

import pytest

from revlib import ReversibleSequential
from revlib.models import model_names
from revlib.train import InputError, Settings
from revlib.train.classification import Classification
from revlib.train.density import Density
from revlib.train.settings import CHOICES, FLOWS, MODELS

WRONG = [
    ("model", "revnet39", f"must be one of {', '.join([*model_names(), *FLOWS])}; got revnet39"),
    ("policy", "forget", "must be one of rebuild, store, recompute; got forget"),
    ("dropout", -0.1, "must be at least 0 and below 1; got -0.1"),
    ("dropout", 1.0, "must be at least 0 and below 1; got 1.0"),
    ("epochs", 0, "must be at least 1; got 0"),
    ("batch_size", 0, "must be at least 1; got 0"),
    ("lr", 0.0, "must be above 0 and finite; got 0.0"),
    ("lr", float("nan"), "must be above 0 and finite; got nan"),
    ("lr", float("inf"), "must be above 0 and finite; got inf"),
    ("weight_decay", -1e-4, "must be at least 0 and finite; got -0.0001"),
    ("image_size", 0, "must be at least 1; got 0"),
    ("levels", 0, "must be at least 1; got 0"),
    ("flow_steps", 0, "must be at least 1; got 0"),
    ("hidden", 0, "must be at least 1; got 0"),
    ("picture_every", 0, "must be at least 1; got 0"),
    ("seed", -1, "must be at least 0 and below 2**63; got -1"),
    ("mixed_precision", "fp8", "must be one of no, bf16, fp16; got fp8"),
    ("accumulate", 0, "must be at least 1; got 0"),
    ("checkpoint_every", 0, "must be at least 1; got 0"),
]


@pytest.mark.parametrize("name, value, line", WRONG)
def test_wrong_setting_gets_a_line_that_names_it(name, value, line):
    with pytest.raises(InputError, match=f"^{re.escape(f'{name} {line}')}$"):
        Settings(data="digits", out=Path("run"), **{name: value})


@pytest.mark.parametrize(
    ("model", "exact"),
    [("resnet32", None), ("revnet38", False), ("irevnet34", True), ("glow", False)],
)
def test_only_an_i_revnet_is_exact_by_default(model, exact):
    def settings(**chosen: bool) -> Settings:
        return Settings(data="digits", out=Path("run"), model=model, **chosen)

    assert settings().exact is exact
    if exact is not None:
        assert settings(exact=not exact).exact is not exact


# Settings that a model may not have, and a value that is not their default.
CHOSEN = {
    "policy": "store",
    "exact": True,
    "dropout": 0.1,
    "augment": True,
    "levels": 2,
    "flow_steps": 2,
    "hidden": 8,
    "picture_every": 10,
}
REFUSED = [
    ("resnet32", ("policy", "exact", "levels", "flow_steps", "hidden", "picture_every")),
    ("revnet38", ("levels", "flow_steps", "hidden", "picture_every")),
    ("nice", ("dropout", "augment", "levels")),
    ("glow", ("dropout", "augment")),
]


@pytest.mark.parametrize("model, names", REFUSED, ids=[model for model, _ in REFUSED])
def test_choices_that_a_model_does_not_have_are_refused(model, names):
    for name, value in CHOSEN.items():
        if name in names:
            got = "" if value is True else f"; got {value}"
            line = f"{name} is a choice that {model} does not have{got}"
            with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
                Settings(data="digits", out=Path("run"), model=model, **{name: value})
        else:
            Settings(data="digits", out=Path("run"), model=model, **{name: value})


def test_every_choice_is_tried():
    assert CHOSEN.keys() == CHOICES.keys()


def test_a_resnet_refuses_even_the_policy_that_others_have_by_default():
    assert Settings(data="digits", out=Path("run")).policy == "rebuild"

    line = "policy is a choice that resnet32 does not have; got rebuild"
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        Settings(data="digits", out=Path("run"), model="resnet32", policy="rebuild")


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_settings(model):
    assert Settings(data="digits", out=Path("run"), model=model).model == model


@pytest.mark.parametrize("model", ["revnet38", "glow"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_model_is_exact_where_it_is_asked_for(model, exact):
    kind = Density if model in FLOWS else Classification
    task = kind(Settings(data="digits", out=Path("run"), model=model, exact=exact))

    chains = [m for m in task.build_model().modules() if isinstance(m, ReversibleSequential)]
    chains = [chain for chain in chains if "rebuild" in chain.policies()]  # not a head

    assert chains and all(chain.exact == exact for chain in chains)
