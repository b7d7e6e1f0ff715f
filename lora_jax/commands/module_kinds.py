"""The kinds of the modules that an adapter adapts, from the shapes of their weights and factors."""

import collections
import itertools
import re

from lora_jax.commands.factor_shapes import Levels, Shape
from lora_jax.commands.leaves import Kind
from lora_jax.peft import keys
from lora_jax.peft.config import Config

# transformers' models with Conv1D modules, and with experts stored `in × out`: shapes do not define a square one.
CONV1D_MODELS = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
_TRANSPOSED_EXPERTS_MODELS = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")


class MatrixKinds:
    """Determines which matrices are stored `in × out`, as in GPT-2; square ones follow the other modules.

    The config has one `fan_in_fan_out` for all modules: that of the last one, if there are both kinds.
    """

    def __init__(self, config: Config, model_type: str):
        self._flag = config.fan_in_fan_out
        self._conv1d_model = model_type in CONV1D_MODELS
        self._square: list[str] = []
        self._by_suffix: dict[str, set[Kind]] = collections.defaultdict(set)

    def kind(self, name: str, shape: Shape, a: Shape, b: Shape) -> Kind:
        """Returns the kind of a weight's module; :meth:`square_kinds` may correct that of a square one."""
        if len(shape) != 2:
            return "conv"
        if shape == (b[0], a[1]) == (a[1], b[0]):
            self._square.append(name)
            return "linear"
        kind: Kind = "conv1d" if shape == (a[1], b[0]) else "linear"
        self._by_suffix[last_segment(name)].add(kind)
        return kind

    def square_kinds(self) -> dict[str, Kind]:
        """Returns the kinds of the modules of square weights, once all weights have been seen."""
        default: Kind = "conv1d" if self._flag else "linear"
        others = set().union(*self._by_suffix.values())
        kinds: dict[str, Kind] = {}
        for name in self._square:
            kinds_of_suffix = self._by_suffix.get(last_segment(name), set())
            if len(kinds_of_suffix) == 1:
                (kinds[name],) = kinds_of_suffix
            elif self._conv1d_model and re.search(r"\.\d+\.", name):
                kinds[name] = "conv1d"
            elif others - {default}:
                raise ValueError(
                    f"{name!r} is square, and could be stored in × out or out × in: the adapter's config has one form "
                    "for all modules, and there are both (the model_type of the base's config.json would decide)."
                )
            else:
                kinds[name] = default
        return kinds


def last_segment(name: str) -> str:
    """Returns the last segment of the path of a tensor's module."""
    return keys.split_name(name)[0].rpartition(".")[2]


def parameter_kinds(shapes: dict[str, Shape], levels: Levels, config: Config, model_type: str) -> dict[str, Kind]:
    """Returns the kinds of a module's parameters, in the module's order: the only order that the shapes allow.

    Either all or none of the experts' parameters of a module are stored `in × out`.

    Raises:
      ValueError: The shapes allow no order, or several.
    """
    fitting: dict[tuple[tuple[str, Kind], ...], bool] = {}
    if len(levels) == len(shapes):
        for transposed, order in itertools.product((False, True), itertools.permutations(shapes)):
            pairs = zip(order, reversed(levels))
            kinds = {name: _parameter_kind(shapes[name], a, b, config.rank(name), transposed) for name, (a, b) in pairs}
            if all(kinds.values()):
                fitting.setdefault(tuple(kinds.items()), transposed)
    if len(set(fitting.values())) > 1 and model_type:
        expected = model_type in _TRANSPOSED_EXPERTS_MODELS
        fitting = {kinds: transposed for kinds, transposed in fitting.items() if transposed == expected}
    if len(fitting) == 1:
        return dict(*fitting)
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    if not fitting:
        factors = ", ".join(f"A {a} and B {b}" for a, b in levels)
        raise ValueError(f"{listed}: no order of these parameters fits the adapter's factors {factors}.")
    hint = "" if model_type else " (the model_type of the base's config.json might decide)"
    raise ValueError(f"{listed}: these parameters fit the adapter's factors in more than one way{hint}.")


def _parameter_kind(shape: Shape, a: Shape, b: Shape, rank: int, transposed: bool) -> Kind:
    """Returns the kind of a parameter with factors of these shapes; empty if they do not fit."""
    if len(shape) == 2:
        return "linear" if shape == (b[0], a[1]) and a[0] == rank else ""
    if len(shape) != 3 or a[0] != rank * shape[0] or b[1] != rank * shape[0]:
        return ""
    if transposed:
        return "transposed_experts" if shape[1:] == (a[1], b[0]) else ""
    return "experts" if shape[1:] == (b[0], a[1]) else ""
