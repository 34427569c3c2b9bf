"""What is wrong with a recipe that only its model shows, found together with what needs no model.

In: a recipe's values, of which some may be wrong, and the model's config, which is loaded without weights. Out: (key,
error) for windows that are longer than the model's context, for selectors that match nothing in it, for a plan that
does not work out, and for texts that are not there.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from partialtune.errors import InputError, ModelError, RecipeError, TextError
from partialtune.freeze.recipe_plan import empty_base, plan_before_text
from partialtune.grammar.selector_syntax import check_selector_syntax, parse_selector
from partialtune.model.loading import empty_model, load_config
from partialtune.model.model_checks import check_fit
from partialtune.model.selectors import match
from partialtune.model.structure import read_structure, with_fixed
from partialtune.recipe.arguments import FreezeArguments, ModelArguments, TextArguments
from partialtune.recipe.checks import RecipeMistakes
from partialtune.recipe.recipe import Recipe
from partialtune.text.sources import source_of

MODEL_KEYS = {entry.name for entry in fields(ModelArguments)}
PLAN_KEYS = MODEL_KEYS | {entry.name for entry in fields(FreezeArguments)}


def read_with_model(read: Callable[[], Recipe], reads_text: bool) -> Recipe:
    """A recipe; or one error with all that is wrong with it, the model's part of it too where its config can be had.

    Args:
        read: Reads it.
        reads_text: Whether its texts will be read, so that they have to be there.

    Raises:
        RecipeError: As `read_recipe`, with further lines.
    """
    try:
        return read()
    except RecipeMistakes as mistakes:
        further = [(key, str(error)) for key, error in _beside(mistakes.values, mistakes.wrong, reads_text)]
        raise mistakes.with_further(further) from None


def check_with_model(
    recipe: Recipe, model: PreTrainedModel | None, config: PretrainedConfig, vocabulary: int, reads_text: bool
) -> None:
    """Stop where a recipe that is right in itself does not fit its model, before texts and weights are read.

    Args:
        recipe: Without mistakes of its own.
        model: Without weights, with rows for new tokens; None where its plan has to wait for the weights.
        config: Of its model, with rows for new tokens.
        vocabulary: As in `check_fit`.
        reads_text: As in `read_with_model`.

    Raises:
        InputError: The one that was found; a RecipeError that lists them where there are more.
    """
    found = list(_missing_texts(recipe.text.text)) if reads_text else []
    found += _too_long(recipe.model.model_name_or_path, config, recipe.text.block_size, vocabulary)
    if model is not None:
        with _quiet():
            found += plan_mistakes(model, recipe.values, ())
    if len(found) == 1:
        raise found[0][1]
    if found:
        mistakes = RecipeMistakes(str(recipe.path or "The recipe"), (), recipe.values, recipe.given)
        raise mistakes.with_further((key, str(error)) for key, error in found)


def _beside(values: Mapping[str, Any], wrong: Collection[str], reads_text: bool) -> Iterator[tuple[str, InputError]]:
    """What the model and the texts have against values of which those of the keys in `wrong` are not known."""
    if reads_text and "text" not in wrong:
        yield from _missing_texts(values.get("text", ()))
    base = _arguments(ModelArguments, values, wrong) if "model_name_or_path" in values else None
    # code that comes with a model is run where the run itself loads it, not to look for further mistakes
    if base is None or base.trust_remote_code or {"model_name_or_path", "model_revision"} & {*wrong}:
        return
    with _quiet():
        try:
            config = load_config(base.model_name_or_path, base.model_revision, base.dropout)
            model = empty_model(config) if MODEL_KEYS & {*wrong} else empty_base(base)
        except InputError:  # said by the run, once the rest is right
            return
        if "block_size" not in wrong:
            size = values.get("block_size", TextArguments(text=[]).block_size)
            yield from _too_long(base.model_name_or_path, config, size, vocabulary=0)
        yield from plan_mistakes(model, values, wrong)


def _too_long(
    name: str, config: PretrainedConfig, block_size: int, vocabulary: int
) -> Iterator[tuple[str, InputError]]:
    try:
        check_fit(name, config, block_size, vocabulary)
    except ModelError as error:
        yield "block_size", error


def plan_mistakes(
    model: nn.Module, values: Mapping[str, Any], wrong: Collection[str]
) -> Iterator[tuple[str, InputError]]:
    """Selectors that match nothing in a model; where there is none and no key of a plan is wrong, the plan's mistakes.

    Args:
        model: On the meta device.
        values: Of a recipe.
        wrong: Keys whose values are not known.
    """
    # each entry of `trainable` by itself: that one cannot be read says nothing of the others
    freeze = _arguments(FreezeArguments, values, {*wrong} - {"trainable"})
    if freeze.method == "full":
        freeze = _arguments(FreezeArguments, {**values, "trainable": ["all"]}, wrong)
    structure = with_fixed(read_structure(model, head=freeze.head), model)
    found: list[tuple[str, InputError]] = []
    for key, where, text in _selectors(freeze):
        if check_selector_syntax(text):
            continue  # said already
        try:
            match(structure, parse_selector(text))
        except RecipeError as error:
            found.append((key, RecipeError(f"{where}{error}")))
    if not found and not PLAN_KEYS & {*wrong}:
        try:
            plan_before_text(model, freeze)
        except InputError as error:
            found.append((next((key for key in PLAN_KEYS if str(error).startswith(key)), "trainable"), error))
    yield from found


def _selectors(freeze: FreezeArguments) -> Iterator[tuple[str, str, str]]:
    """Key, where in it, and text of each selector."""
    yield from (("trainable", "", text) for text in freeze.trainable)
    for entry in freeze.schedule:
        start = f"step {entry['from_step']}" if "from_step" in entry else f"epoch {entry['from_epoch']:g}"
        yield from (("schedule", f"schedule, from {start}: ", text) for text in entry["trainable"])
    yield from (("part_learning_rates", "part_learning_rates, ", text) for text in freeze.part_learning_rates)


def _missing_texts(sources: Collection[str]) -> Iterator[tuple[str, InputError]]:
    for source in sources:
        try:
            source_of(source).expand(source)
        except TextError as error:
            yield "text", error


def _arguments(cls: type, values: Mapping[str, Any], wrong: Collection[str]) -> Any:
    """Of these values those that are right, and defaults in the place of the others."""
    names = {entry.name for entry in fields(cls)} - {*wrong}
    return cls(**{name: values[name] for name in names if name in values})


@contextmanager
def _quiet() -> Iterator[None]:
    """What a plan warns of is said when it is made for good."""
    log = logging.getLogger("partialtune")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
