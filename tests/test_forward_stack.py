"""Patches on a module's forward: on in order, off in any order, and the module is as it was."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from partialtune.engine.forward_stack import Patched, put_on


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, calls):
        return [*calls, "own"]


def noting(name):
    return lambda forward, calls: forward([*calls, name])


def test_the_last_that_was_put_on_is_called_first():
    block = Block()
    put_on(block, noting("cast"))
    put_on(block, noting("prefix"))
    assert block([]) == ["prefix", "cast", "own"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_patches_leave_in_any_order_and_the_others_stay(order):
    block, names = Block(), ["a", "b", "c"]
    worn = [put_on(block, noting(name)) for name in names]
    left = dict(enumerate(names))
    for number in order:
        worn[number].take_off()
        left.pop(number)
        assert block([]) == [*reversed(left.values()), "own"]
    assert "forward" not in vars(block)
    worn[0].take_off()
    assert block([]) == ["own"]


def test_a_patch_of_somebody_else_stays_beneath_and_is_there_again():
    block = Block()
    theirs = block.forward = noting("theirs").__get__(Block.forward.__get__(block))
    worn = put_on(block, noting("ours"))
    assert block([]) == ["ours", "theirs", "own"]
    worn.take_off()
    assert vars(block)["forward"] is theirs


def test_a_patch_of_somebody_else_over_ours_is_left_alone():
    block = Block()
    first = put_on(block, noting("first"))
    beneath = block.forward
    block.forward = lambda calls: beneath([*calls, "theirs"])
    second = put_on(block, noting("second"))
    assert block([]) == ["second", "theirs", "first", "own"]
    first.take_off()
    assert block([]) == ["second", "theirs", "own"]
    second.take_off()
    assert block([]) == ["theirs", "own"]


def through_a_file(block):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_a_copy_of_a_patched_module_is_a_plain_one(copied):
    block = nn.Sequential(Block())
    put_on(block[0], noting("ours"))
    other = copied(block)
    assert other([]) == ["own"]
    assert block([]) == ["ours", "own"]
    assert not isinstance(vars(other[0]).get("forward"), Patched)
    assert other[0].forward.__self__ is other[0]
    assert copied(other)([]) == ["own"]
