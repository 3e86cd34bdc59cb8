"""Options in a model's name need no quoting in a shell, and `layers=` is read alike by every plugin."""

from __future__ import annotations

import re

import pytest

from bridgekit.encoders import chosen_layers, layers_setting, split_options
from bridgekit.errors import BridgekitError


def test_options_follow_commas() -> None:
    assert split_options("resnet50", ["size"]) == ("resnet50", {})
    assert split_options("org/model@main,size=224,pooling=avg", ["size", "pooling"]) == (
        "org/model@main",
        {"size": "224", "pooling": "avg"},
    )


def test_a_comma_within_a_path_or_a_value_starts_no_option() -> None:
    assert split_options("/my, own/model,checkpoint=/a,b.pth", ["checkpoint"]) == (
        "/my, own/model",
        {"checkpoint": "/a,b.pth"},
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("m,sise=3", r"unknown option 'sise'(\n.*)*did you mean 'size'\? available options: size, pooling"),
        ("m,xyz=3", r"unknown option 'xyz'(\n.*)*fix: available options:"),
        ("m,size=3,size=4", "'size' is given twice"),
    ],
)
def test_an_unknown_option_is_named_with_the_valid_ones(model: str, message: str) -> None:
    with pytest.raises(BridgekitError) as caught:
        split_options(model, ["size", "pooling"])
    assert re.search(message, str(caught.value))


def test_layers_are_numbers_or_the_last_in_the_order_given() -> None:
    assert chosen_layers("3+last", 6, "toy:x") == (3, 6)
    assert chosen_layers("last+1", 6, "toy:x") == (6, 1)
    assert layers_setting((6, 1), 6) == "layers-last+1"


@pytest.mark.parametrize("option", ["0", "7", "6+last", "1+1", "1+", "", "-1", "first"])
def test_layers_that_there_are_not_are_refused_with_those_there_are(option: str) -> None:
    with pytest.raises(BridgekitError, match="the model has no layers") as caught:
        chosen_layers(option, 6, "toy:x")
    assert caught.value.remedy == "give distinct numbers from 1 to 6, or last, joined by +, as in layers=3+last"
