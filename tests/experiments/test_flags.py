"""Flags that take several values, written once or repeated."""

import dataclasses
from dataclasses import dataclass, field

import pytest

from experiments import flags
from experiments.configs import quickstart, sft, sweep


@dataclass(frozen=True)
class Inner:
    """Settings inside of others."""

    names: tuple[str, ...] = ()
    """Of something."""


@dataclass(frozen=True)
class Outer:
    """Settings."""

    some_names: tuple[str, ...] | None = None
    """Of something else."""

    pair: tuple[int, int] = (0, 0)
    """Always two numbers."""

    inner: Inner = field(default_factory=Inner)
    """More."""


def parsed(defaults, *args):
    return flags.parse(defaults, "program", args)


@pytest.mark.parametrize(
    "args",
    [
        "--data a b:2 c --steps 2 --seed 3",
        "--data a --data b:2 --data c --steps 2 --seed 3",
        "--data a --steps 2 --data b:2 c --seed 3",
        "--data=a --steps=2 --data=b:2 --seed 3 --data=c",
        "--seed 3 --data a b:2 --steps 1 --steps 2 --data c",
    ],
)
def test_a_repeated_list_is_joined(args):
    config = parsed(sft.DEFAULTS, *args.split())
    assert config == dataclasses.replace(sft.DEFAULTS, data=("a", "b:2", "c"), steps=2, seed=3)


def test_every_list_is_joined():
    args = "--validation a --validation b --targets head --targets embedding --ranks x=1 --ranks y=2"
    config = parsed(sft.DEFAULTS, *args.split(), "--template-arguments", "a=1", "--template_arguments", "b=2")
    assert (config.validation, config.targets, config.ranks) == (("a", "b"), ("head", "embedding"), ("x=1", "y=2"))
    assert config.template_arguments == ("a=1", "b=2")
    assert parsed(sweep.DEFAULTS, "--ranks", "1", "--ranks", "2").ranks == (1, 2)
    for args in (["--methods", "head,full"], ["--methods", "head", "full"], ["--methods", "head", "--methods", "full"]):
        assert parsed(quickstart.DEFAULTS, *args).methods == ("head", "full")


def test_lists_inside_of_others():
    args = "--inner.names a --some-names x --inner.names b --some-names=y --pair 1 2"
    config = parsed(Outer(), *args.split())
    assert config == Outer(("x", "y"), (1, 2), Inner(("a", "b")))
    assert parsed(Outer(), "--pair", "1", "2", "--pair", "3", "4").pair == (3, 4)


def test_class_variables_are_not_flags():
    assert flags.parse(sft.DEFAULTS, "run", ["--fast"]).steps == 2
    with pytest.raises(SystemExit):
        flags.parse(sft.DEFAULTS, "run", ["--SWEPT", "1"])
