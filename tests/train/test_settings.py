"""The settings of a run: what is refused at the door, in one line that names it."""

import re
from pathlib import Path

import pytest

from revlib.models import model_names
from revlib.train import InputError, Settings

WRONG = [
    ("model", "revnet39", f"must be one of {', '.join(model_names())}; got revnet39"),
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
    ("seed", -1, "must be at least 0 and below 2**63; got -1"),
    ("mixed_precision", "fp8", "must be one of no, bf16, fp16; got fp8"),
    ("accumulate", 0, "must be at least 1; got 0"),
    ("checkpoint_every", 0, "must be at least 1; got 0"),
]


@pytest.mark.parametrize("name, value, line", WRONG)
def test_wrong_setting_gets_a_line_that_names_it(name, value, line):
    with pytest.raises(InputError, match=f"^{re.escape(f'{name} {line}')}$"):
        Settings(data="digits", out=Path("run"), **{name: value})


def test_policy_is_refused_where_there_is_no_choice():
    with pytest.raises(InputError, match=r"^policy is a choice that resnet32 does not have"):
        Settings(data="digits", out=Path("run"), model="resnet32", policy="store")


@pytest.mark.parametrize("model", model_names())
def test_every_model_has_settings(model):
    assert Settings(data="digits", out=Path("run"), model=model).model == model
