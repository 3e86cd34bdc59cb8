"""Options in a model's name need no quoting in a shell."""

from __future__ import annotations

import re

import pytest

from bridgekit.encoders import split_options
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
