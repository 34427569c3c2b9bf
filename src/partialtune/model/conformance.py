"""Is a model a causal language model, as loaded? model -> what a run has to know of it, or a refusal in words.

In:  the model, in fp32 on any device; nothing about its architecture is assumed, and its class is not asked.
Out: `Conformance`, or a ModelError. Weights, buffers and modes are afterwards what they were.

A few tiny forward passes over made-up windows (3, 24), in eval mode and in train mode, answer these questions:

1. Does it read ahead? A changed token may change no logits before its own place. Bert-like models do unless they are
   told that they are decoders: their losses would mean nothing.
2. Is its own loss the cross entropy of the next token? Decoders of encoder-decoder models take the labels as they
   are: such a run learns to repeat its input.
3. Is that loss a sum over the targets, divided by `num_items_in_batch`? If not, accumulated gradients come out as many
   times too large as there are batches to a step.
4. Does it keep its weights, and give the same logits twice? Nothing can be proved of weights that a forward pass
   changes, and scores that are drawn at random do not compare.

`tests/benchmarks/architectures.py` asks every model type that transformers has, and trains what passes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from partialtune.distributed import decided_by_main
from partialtune.errors import ModelError, in_one_line
from partialtune.model.digests import bit_sums
from partialtune.model.parameters import named_weights, persistent_buffers
from partialtune.model.structure import read_structure
from partialtune.model.train_mode import evaluating

WINDOW = 24  # tokens of a probe window
# Where a token is changed, as shares of a window: tokens 10 and 17. Two, since a model that reads ahead within chunks
# shows it only where the change is not the first token of a chunk.
CHANGED = (10 / WINDOW, 17 / WINDOW)
# Earlier logits move by rounding alone, as products are summed in another order: 0 to 1e-6 of the change of later ones
# was seen in models that do not read ahead, 5e-4 and more in those that do.
LEAK = 1e-4
# Of the largest logit: less than that is rounding, also where later logits hardly change (an untrained ProphetNet's).
ROUNDING = 1e-5
AGREEMENT = 1e-4  # nats a token, relative where they are more than 1: unshifted labels differ by far more
IGNORED = -100  # a label that is no target, as in torch's cross entropy
# Settings by which a model changes its own weights. RWKV halves its matrices in place before it scores: meant for fp16,
# where they overflow.
SWITCHED_OFF = {"rescale_every": 0}
CAUSAL_SETTINGS = {"is_decoder": True, "causal": True, "use_bidirectional_attention": False}


@dataclass(frozen=True)
class Conformance:
    """What a run has to know of a causal language model.

    Attributes:
        loss_fault: Why its own loss is not used, in words; empty where it is.
        config_as_loaded: What its config said where a run changes it, for the config that is saved.
    """

    loss_fault: str = ""
    config_as_loaded: Mapping[str, Any] = field(default_factory=dict)

    def loss_words(self) -> str:
        """Whose loss trains, and why."""
        if not self.loss_fault:
            return "the model's own"
        return f"cross entropy of the next token over the model's logits, not its own loss: {self.loss_fault}"


class _PassFails(ModelError):
    """A forward pass on token ids ended in an error of the model's own."""


def check_conformance(model: PreTrainedModel, block_size: int) -> Conformance:
    """Look at how a model reads, takes its loss and treats its weights. Weights, buffers and modes stay as they are.

    What would make it change its own weights is switched off in its config.

    Args:
        model: As it was loaded, on any device.
        block_size: Tokens of the run's windows. As many are looked at only where the model takes no shorter ones.

    Raises:
        ModelError: If it cannot be scored on token ids alone, reads ahead, or changes its own weights.
    """
    config_as_loaded = _switch_off(model.config)
    _refuse_padding_reset(model)
    try:
        fault = _ask(model, min(WINDOW, block_size))
    except _PassFails:
        if block_size <= WINDOW:
            raise
        fault = _ask(model, block_size)  # Reformer trains on one length alone
    return Conformance(fault, config_as_loaded)


def conformance_of_main(model: PreTrainedModel, block_size: int) -> Conformance:
    """`check_conformance` where other processes than the main one may have no weights yet: its answer is theirs.

    Raises:
        ModelError: As there. EndedElsewhere on the other processes.
    """
    found = decided_by_main(lambda: check_conformance(model, block_size))
    _switch_off(model.config)
    return found


def _ask(model: PreTrainedModel, length: int) -> str:
    """The four questions, on windows of this length.

    Returns:
        What is wrong with the model's own loss, in words; empty where nothing is.

    Raises:
        ModelError: In all other cases.
    """
    places = sorted({max(1, int(share * length)) for share in CHANGED})  # of a short window they may be one
    windows = probe_windows(model, length, places)  # (1 + places, length)
    with _buffers_kept(model), evaluating(model), torch.random.fork_rng(devices=()):
        weights = _bits(model)
        with _blocks_watched(model):
            logits = _logits(model, windows)
        fault, again = _loss_fault(model, windows)
        again = _logits(model, windows) if again is None else again
        _refuse_changed(model, weights)
        _refuse_chance(model, logits, again)
        _refuse_reading_ahead(model, logits, places)
        model.train()  # `evaluating` gives every module its mode back
        _logits(model, windows)
        fault = fault or _loss_fault(model, windows)[0]
        _refuse_changed(model, weights, buffers=False)  # running statistics move in train mode, as they should
    return fault


# ---- windows and logits ----------------------------------------------------------------------------------------------


def probe_windows(model: PreTrainedModel, length: int, places: Sequence[int]) -> torch.Tensor:
    """Token ids (1 + len(places), length): a window, and for each of the places the same with another token there.

    Padding, ends and markers of images are not among them: models treat these in ways of their own.
    """
    # The smaller: an embedding may have more rows than there are tokens, padded to a multiple of 64.
    vocabulary = min(model.get_input_embeddings().weight.shape[0], model.config.get_text_config().vocab_size)
    special = set(_special_ids(model.config))
    ids = [number for number in range(vocabulary) if number not in special]
    spread = torch.tensor(ids)[torch.linspace(0, len(ids) - 1, length + len(places)).long()]  # (length + places,)
    windows = spread[:length].repeat(1 + len(places), 1)
    for row, place in enumerate(places, start=1):
        windows[row, place] = spread[length + row - 1]
    return windows.to(model.device)


def _special_ids(config: PretrainedConfig) -> Iterator[int]:
    """pad_token_id, image_token_index, ...: of the config and of the configs of its towers."""
    parts = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", {}))]
    for part in filter(None, parts):
        for key, value in part.to_dict().items():
            if key.endswith(("_token_id", "_token_index", "_index")):
                yield from (value if isinstance(value, list) else [value])


def _logits(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of windows (B, T), as scoring takes them."""
    try:
        logits = model(input_ids=windows, attention_mask=torch.ones_like(windows), use_cache=False).logits
        shape = tuple(logits.shape)
    except Exception as error:  # whatever its own code runs into: it wants pixels, sound, another model's states
        mode = " in train mode" if model.training else ""
        raise _PassFails(
            f"{_named(model)} gives no logits for token ids alone{mode}: {_sentence(error)} partialtune trains "
            f"models that predict the next token of a text."
        ) from error
    if len(shape) != 3 or shape[:2] != tuple(windows.shape):
        raise ModelError(
            f"{_named(model)} gives logits of shape {shape} for token ids of shape {tuple(windows.shape)}. partialtune "
            f"trains models that predict one next token at each place: ({windows.shape[0]}, {windows.shape[1]}, V)."
        )
    return logits


@contextmanager
def _blocks_watched(model: PreTrainedModel) -> Iterator[None]:
    """Stop where a forward pass meets no module of what was taken for the decoder blocks: those of an image encoder."""
    path, met = read_structure(model).blocks_path, []
    # Every module in them and not the blocks alone: a model may call the parts of a block without calling the block.
    modules = [module for block in model.get_submodule(path) for module in block.modules()]
    hooks = [module.register_forward_pre_hook(lambda *_: met.append(True)) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not met:
        raise ModelError(
            f"{_named(model)}: {path} was taken for its decoder blocks, since it holds the most parameters, and its "
            f"forward pass over token ids does not use it: `blocks[-1]` would train nothing. It cannot be trained here."
        )


def _named(model: PreTrainedModel) -> str:
    kind = model.config.model_type
    return f"{model.config.name_or_path} (a {kind} model)" if model.config.name_or_path else f"This {kind} model"


def _sentence(error: Exception) -> str:
    """What the model's own code raised, as a sentence."""
    return in_one_line(error).removesuffix(".") + "."


# ---- 1. does it read ahead? ------------------------------------------------------------------------------------------


def _refuse_reading_ahead(model: PreTrainedModel, logits: torch.Tensor, places: Sequence[int]) -> None:
    """Compare the logits (B, T, V) before a changed token with those of the window that it was changed in.

    Row 0 is the window, row r the same with another token at places[r - 1].
    """
    for row, place in enumerate(places, start=1):
        moved = (logits[row] - logits[0]).abs().amax(-1)  # (T,)
        threshold = max(LEAK * moved[place:].max(), ROUNDING * logits[0].abs().max())
        ahead = (moved[:place] > threshold).nonzero().flatten().tolist()
        if ahead:
            raise ModelError(
                f"{_named(model)} reads ahead: changing token {place} changed the logits of token {ahead[-1]}, which "
                f"stands before it. Such a model sees what it is to predict: its losses and bits per byte would mean "
                f"nothing. {_way_to_causal(model.config)}"
            )


def _way_to_causal(config: PretrainedConfig) -> str:
    for key, value in CAUSAL_SETTINGS.items():
        if hasattr(config, key) and getattr(config, key) != value:
            word = str(value).lower()
            return (
                f'{key} is {str(getattr(config, key)).lower()} in its config.json: with "{key}": {word} there, in a '
                f"copy of the model's folder, it reads from left to right."
            )
    return "Its config has no setting for that. Choose a model that was made to predict the next token."


# ---- 2. and 3. is its loss the cross entropy of the next token, over the targets of a step? --------------------------


def next_token_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross entropy of the next token over a model's logits, as `Trainer` wants a loss function of its own.

    Args:
        outputs: Of a forward pass; `logits` (B, T, V).
        labels: int64 (B, T), not shifted; -100 where there is no target.
        num_items_in_batch: Targets of all batches of the step; None for those of this one.

    Returns:
        Nats, summed over the targets and divided by their number.
    """
    logits = outputs.logits
    return ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch)


def _loss_fault(model: PreTrainedModel, windows: torch.Tensor) -> tuple[str, torch.Tensor | None]:
    """Why the model's own loss is not the usual one in its present mode, in words, empty if it is; and the logits."""
    labels = windows.clone()
    labels[:, 0] = IGNORED  # shifted labels drop it anyway; unshifted ones then count the same number of targets
    targets = int((labels != IGNORED).sum())  # B (T - 1)
    inputs = {"input_ids": windows, "labels": labels, "use_cache": False}
    try:
        # As if this were one of two batches of a step: the loss of one that heeds the number is half its mean.
        halved = model(**inputs, num_items_in_batch=torch.tensor(2 * targets, device=windows.device))
        if _agree(halved.loss, next_token_loss(halved, labels, 2 * targets) + _router_term(model, halved)):
            return "", halved.logits
        outputs = model(**inputs)
        wanted = next_token_loss(outputs, labels) + _router_term(model, outputs)
    except Exception as error:  # noqa: BLE001 - whatever its own code runs into: ours is used then
        return f"with labels its forward pass fails: {_sentence(error)}", None
    if _agree(outputs.loss, wanted):
        return "it is the mean of a batch, whatever number of targets a step has", outputs.logits
    own = f"it is {float(outputs.loss):.4f} nats a token"
    return f"{own} where the cross entropy of the next token is {float(wanted):.4f}", outputs.logits


def _router_term(model: PreTrainedModel, outputs: Any) -> torch.Tensor | float:
    """What a mixture of experts adds to its loss where its config says so (`output_router_logits`)."""
    term = getattr(outputs, "aux_loss", None)
    return 0.0 if term is None else term * getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)


def _agree(own: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two losses are the same but for rounding. Weights that are not finite are refused elsewhere, in words."""
    apart = abs(float(own) - float(wanted))
    return not apart > AGREEMENT * max(1.0, abs(float(wanted)))  # `not >`: two NaN agree


# ---- 4. does it keep its weights, and give the same logits twice? ----------------------------------------------------


def _switch_off(config: PretrainedConfig) -> dict[str, Any]:
    """Switch off what is in SWITCHED_OFF, and return what the config said."""
    found = {key: getattr(config, key) for key in SWITCHED_OFF if getattr(config, key, None)}
    for key in found:
        setattr(config, key, SWITCHED_OFF[key])
    return found


@contextmanager
def _buffers_kept(model: PreTrainedModel) -> Iterator[None]:
    """Batch norms and running statistics change theirs in train mode."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


def _bits(model: PreTrainedModel) -> dict[str, int]:
    """A sum over the bits of every weight and stored buffer: on the model's own device, and no second copy of it."""
    return bit_sums([*named_weights(model), *persistent_buffers(model)])


def _refuse_changed(model: PreTrainedModel, before: Mapping[str, int], buffers: bool = True) -> None:
    kept = set(before) if buffers else {name for name, _ in named_weights(model)}
    changed = [name for name, bits in _bits(model).items() if name in kept and bits != before[name]]
    if changed:
        raise ModelError(
            f"{_named(model)} changes its own weights in a forward pass ({len(changed)} tensors, {changed[0]} first), "
            f"so that no claim about frozen weights would hold. This kind of model cannot be trained here."
        )


def _refuse_chance(model: PreTrainedModel, logits: torch.Tensor, again: torch.Tensor) -> None:
    """Compare the logits (B, T, V) of two passes over the same windows, in eval mode."""
    apart = (again - logits).abs().max()
    if apart > LEAK * logits.abs().max():
        hint = " hash_seed in its config.json, in a copy of the folder, would fix them."
        raise ModelError(
            f"{_named(model)} draws at random in eval mode: two passes over the same windows gave logits that differ "
            f"by {float(apart):.1e}. Scores before and after training would not compare."
            f"{hint if getattr(model.config, 'hash_seed', 0) is None else ''}"
        )


def _refuse_padding_reset(model: PreTrainedModel) -> None:
    """Ask the model's own initialisation, which every load runs, about an embedding that was loaded already.

    Some classes set the padding token's row to zero there, after the file was read. There is no public way to ask:
    `_init_weights` is the method by which each class initialises its modules, `_is_hf_initialized` how transformers
    marks what came from a file. `test_a_model_whose_loading_changes_what_the_file_holds_is_refused` notices a change.
    """
    padding = getattr(model.get_input_embeddings(), "padding_idx", None)
    if padding is None:
        return
    stand_in = nn.Embedding.from_pretrained(torch.ones(2, 2), padding_idx=0)
    stand_in.weight._is_hf_initialized = True
    with torch.no_grad(), torch.random.fork_rng(devices=()), suppress(AttributeError):  # xLSTM's looks for others
        model._init_weights(stand_in)
    if not stand_in.weight.all():
        raise ModelError(
            f"{_named(model)}: whenever transformers loads it, it sets the embedding of the padding token ({padding}) "
            f"to zero, whatever the file holds. What is proved of a saved file would not hold for the loaded model."
        )
