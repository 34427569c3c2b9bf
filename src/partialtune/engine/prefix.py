"""The frozen prefix computed once for each row: what the last frozen block gives is kept, and given again.

In:  a model that trains, and how many of its first blocks are frozen.
Out: the same training, in which a row that has been through the prefix once starts from its states.

The model's own forward pass stays in charge. The first time that a row comes, its prefix is computed as always, and
what the last frozen block gives for it is kept. When all rows of a batch are known, the first `blocks` decoder blocks
hand their input on, and the last of them gives the kept states. So positions, masks, final norm and whatever a model
does between blocks are its own, and no architecture is written a second time.

    whole pass:   embeddings -> block 0 -> block 1 -> block 2 -> block 3 -> norm, head     (blocks = 3)
    from states:  embeddings -> hand on -> hand on -> give    -> block 3 -> norm, head

A row is known by its digest (`row_digests`) together with that of the prefix's weights, the number of blocks and the
dtypes: whatever the data set, the collator and the order of rows are. A pass that asks for more than the last block's
states, or of which something has no digest, is computed as it is.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from partialtune.engine.block_output import Form, block_output
from partialtune.engine.forward_stack import Worn, computes_otherwise, has_hooks_of_others, put_on, strange_forwards
from partialtune.engine.packed_rows import kind_of_packing, why_not_apart
from partialtune.engine.padding_in_loss import PaddingInLoss, padding_beside
from partialtune.engine.prefix_weights import PrefixWeights
from partialtune.engine.row_digests import Row, influencing, joined, may_be_packed, rows_of, words_of
from partialtune.engine.state_store import StateStore
from partialtune.errors import ModelError
from partialtune.model.held_narrow import rounding_words
from partialtune.model.packed_weights import source_words
from partialtune.model.parameters import uncompiled
from partialtune.model.structure import decoder_blocks, read_structure

logger = logging.getLogger(__name__)

# What asks for more than the states behind the last block, where it is so or the model's config says so.
ASKS_FOR_MORE = ("use_cache", "output_hidden_states", "output_attentions", "output_router_logits")


class Pass:
    """A forward pass that goes on.

    Attributes:
        inputs: What the outermost module was called with that gets token ids.
        apart: Whether its rows are packed examples that the model keeps apart.
        decided: Whether it is known if the pass starts from states.
        given: The states (B, T, D) that it starts from, None where the prefix is computed.
        rows: Those of the batch, or the examples packed in them, where their prefix is computed.
        is_kept: Whether the states of these rows are kept.
        padding: Where no row of it is, (B, T); None where rows are all.
        prefix: What the keys of its rows begin with.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self.apart = self.decided = self.is_kept = False
        self.given: torch.Tensor | None = None
        self.rows: Sequence[Row] | None = None
        self.padding: torch.Tensor | None = None
        self.prefix = b""


class PrefixCache:
    """States of rows behind the first `blocks` decoder blocks, kept as they are computed.

    They take tokens x D x 4 bytes in fp32: of GPT-2 (D = 768) and 600 windows of 256 tokens 472 MB, half in bf16.

    Args:
        model: The model itself, on its device, not its DDP wrapper.
        blocks: Number of frozen blocks that are computed once, at least 1.
        store: Keeps the states, as bytes: its dtype is uint8.
        weights: A digest of all that the prefix computes with, see `prefix_digest`.
        keeps_training_rows: Whether rows of training come again; those of evaluation do.

    Attributes:
        blocks: The modules of these blocks.
        hits, misses: Rows that started from states, and rows that did not.
        passed_by: Why passes were computed without a look at the store, and how many.
        padding: Whether padding counts.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: int,
        store: StateStore,
        weights: bytes = b"",
        keeps_training_rows: bool = True,
        known: Sequence[Any] | None = None,
    ) -> None:
        self._model = uncompiled(model)
        self.blocks = list(decoder_blocks(self._model)[:blocks])
        self.store, self.keeps_training_rows = store, keeps_training_rows
        self._weights = PrefixWeights(self._model, blocks, weights)
        self.hits = self.misses = 0
        self.passed_by: Counter[str] = Counter()
        self._pass: Pass | None = None
        self._forms: dict[bytes, Form] = {}
        self._expected: tuple[dict[str, tuple[torch.Tensor, float]], list[Row]] | None = None
        self.padding = PaddingInLoss()
        self._not_apart: dict[tuple[Any, ...], str] = {}
        self._worn: list[Worn] = []
        self._before = modules_below(model)
        inside = [module for block in self.blocks for module in block.modules()]
        self._known = [one for module in inside for one in strange_forwards(module)] if known is None else known
        self._adapted: list[Any] = [module for module in inside if hasattr(module, "disable_adapters")]

    def put_on(self) -> None:
        """Let the blocks be stood in for from now on."""
        for module in _above_blocks(self._model):
            self._worn.append(put_on(module, partial(self._watched, module)))
        for block in self.blocks[:-1]:
            self._worn.append(put_on(block, self._hand_on))
        self._worn.append(put_on(self.blocks[-1], self._give))

    def take_off(self) -> None:
        """Leave the model as it was, and drop the states."""
        for worn in self._worn:
            worn.take_off()
        self._worn = []
        self.store.close()

    @contextmanager
    def expecting(self, inputs: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[None]:
        """Within it a pass over exactly these tensors need not digest them: they were, before they went to the device.

        Args:
            inputs: The batch.
            rows: Its rows, or the examples packed in them, as `rows_of` gives them.
        """
        before, tensors = self._expected, influencing(inputs)
        self._expected = {name: (tensor, _writes(tensor)) for name, tensor in tensors.items()}, list(rows)
        try:
            yield
        finally:
            self._expected = before

    # ---- a pass begins ----------------------------------------------------------------------------------------------

    def _watched(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for the modules around the blocks: notes what the outermost that gets token ids is called with."""
        if self._pass is not None:
            return forward(*args, **kwargs)
        kwargs = self._begin(module, forward, args, kwargs)
        try:
            return forward(*args, **kwargs)
        finally:
            self._pass = None

    @torch.compiler.disable  # digests and keys are no arithmetic of the model: a graph would hold those of one batch
    def _begin(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Note the pass. Gives the keywords to go on with."""
        inputs = _by_name(module, args, kwargs)
        if inputs is None or not isinstance(inputs.get("input_ids"), torch.Tensor):
            return kwargs
        by_place = inputs.keys() - kwargs.keys()
        is_open = inputs.get("use_cache") is None and inputs.get("past_key_values") is None
        if module.training and is_open and "use_cache" not in by_place and _takes(module, "use_cache"):
            # In training nobody goes on from keys and values, which most configs ask for. A Trainer switches them off.
            inputs["use_cache"] = False
            kwargs = {**kwargs, "use_cache": False}
        apart = self._keeps_apart(forward, inputs)
        self._pass = Pass(inputs)
        self._pass.apart = apart
        return kwargs

    def _keeps_apart(self, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> bool:
        """Whether a batch is packed, of a kind whose examples the model keeps apart: proved at the first of it."""
        if not may_be_packed(inputs) or self._asks_for_more(inputs):
            return False
        kind = kind_of_packing(self._model, inputs)
        if kind not in self._not_apart:
            name = type(self._model).__name__
            self._pass = Pass({})  # the passes of the proof are none to start from states
            self._pass.decided = True
            try:
                why_not = why_not_apart(self._model, self.blocks[-1], forward, inputs, name)
            finally:
                self._pass = None
            self._not_apart[kind] = why_not
            if why_not:
                logger.info("States of packed rows are kept by whole rows: %s.", why_not)
        return not self._not_apart[kind]

    @torch.compiler.disable
    def _states(self) -> torch.Tensor | None:
        """What the pass starts from, (B, T, D); None where its prefix is to be computed."""
        now = self._pass
        if now is None:
            return None
        if not now.decided:
            now.decided = True
            self._decide(now)
        return now.given

    def _decide(self, now: Pass) -> None:
        why_not = self._asks_for_more(now.inputs)
        words = words_of(now.inputs)
        rows = None if why_not or words is None else self._rows(now.inputs)
        if rows is None:
            self.passed_by[why_not or "an input that has no digest"] += 1
            return
        rows = rows if now.apart else joined(rows)
        now.padding = padding_beside(rows, now.inputs["input_ids"].shape)
        if now.padding is not None and self.padding.counts(now.padding, self._model.training):
            rows, now.padding = rows_of(now.inputs, with_padding=True) or rows, None
        # The first loss of padded rows shows whether padding counts: it is computed from all of them.
        is_first = now.padding is not None and self._model.training and self.padding.in_training is None
        if self._weights.have_changed():
            self.store.forget()
        now.prefix = self._key_prefix(words or "")
        form = self._form(now.prefix)
        kept = [self.store.get(self._key(now.prefix, row)) for row in rows] if form and not is_first else [None]
        if form is None or any(states is None for states in kept):
            self.misses += len(rows)
            now.rows, now.is_kept = rows, self.keeps_training_rows or not self._model.training
            return
        self.hits += len(rows)
        ids = now.inputs["input_ids"]
        found = [states.view(form.kept) for states in kept if states is not None]
        given = torch.zeros((*ids.shape, max(states.shape[1] for states in found)), dtype=form.kept)
        for row, states in zip(rows, found, strict=True):
            given[row.number, row.start : row.end] = states
        now.given = given.to(ids.device, form.dtype)

    def _form(self, prefix: bytes) -> Form | None:
        """The form of states that are kept, None where it is not known."""
        if prefix not in self._forms and self.store.outlives_run:
            kept = self.store.get(self._key_of_form(prefix))
            if kept is not None:
                self._forms[prefix] = Form.from_words(kept.numpy().tobytes().decode("ascii"))
        return self._forms.get(prefix)

    def _keep_form(self, prefix: bytes, form: Form) -> None:
        self._forms[prefix] = form
        if self.store.outlives_run:  # a later run computes no row from which it could tell
            words = torch.frombuffer(bytearray(form.to_words().encode("ascii")), dtype=torch.uint8)
            self.store.put(self._key_of_form(prefix), words[None])

    def _asks_for_more(self, inputs: Mapping[str, Any]) -> str:
        """Why the last block's states are not all that a pass is about, empty where they are."""
        if inputs.get("past_key_values") is not None:
            return "it goes on from past_key_values"
        if inputs.get("inputs_embeds") is not None:
            return "it begins with inputs_embeds"
        config: Any = getattr(self._model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in ASKS_FOR_MORE:
            asked = inputs.get(name)
            if getattr(text, name, False) if asked is None else asked:
                return f"{name} is on"
        return hooked_words(self.blocks, self._before, self._known)  # put there since it was tried, too

    def _rows(self, inputs: Mapping[str, Any]) -> list[Row] | None:
        tensors = influencing(inputs)
        if self._expected is not None:
            expected, rows = self._expected
            if expected.keys() == tensors.keys() and all(
                expected[name][0] is tensor and expected[name][1] == _writes(tensor) for name, tensor in tensors.items()
            ):  # and nobody has written to them since
                return rows
        return rows_of(inputs)

    def _key_prefix(self, words: str) -> bytes:
        kind = next(self._model.parameters()).device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # peft switches adapters off for a second pass over the same model, as for the reference of DPO
        adapters = [(one.disable_adapters, one.active_adapters, one.merged) for one in self._adapted]
        values = rounding_words(self._model) + source_words(self._model)
        text = f"{len(self.blocks)} blocks, autocast {autocast}, {words}, {adapters}{values}"
        return hashlib.blake2b(self._weights.digest + text.encode(), digest_size=16).digest()

    @staticmethod
    def _key(prefix: bytes, row: Row) -> bytes:
        return hashlib.blake2b(prefix + row.digest, digest_size=16).digest()

    @staticmethod
    def _key_of_form(prefix: bytes) -> bytes:
        return hashlib.blake2b(prefix + b"form", digest_size=16).digest()

    # ---- what stands in for the blocks ------------------------------------------------------------------------------

    def _hand_on(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """For a block before the last: its output has no meaning then, but needs the shape of one."""
        if self._states() is None:
            return forward(*args, **kwargs)
        if not args and "hidden_states" not in kwargs:
            raise ModelError(f"{type(self._model).__name__}: it does not call its blocks with `hidden_states`.")
        return self._as_block_gives(args[0] if args else kwargs["hidden_states"])

    def _give(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """For the last block."""
        states = self._states()
        if states is not None:
            return self._as_block_gives(states)
        return self._keep(forward(*args, **kwargs))

    def _as_block_gives(self, states: torch.Tensor) -> Any:
        """Blocks give a tensor, or a tuple that begins with it: the model unpacks what it is used to."""
        assert self._pass is not None  # `_states` gave something
        tail = self._forms[self._pass.prefix].tail
        return states if tail is None else (states, *tail)

    @torch.compiler.disable
    def _keep(self, output: Any) -> Any:
        """Keep what the last block gave for each row of the pass.

        Returns:
            What goes on: the states as they were rounded to be kept. A run that goes on from a checkpoint computes
            what the whole one finds, and both have to be the same to the bit. So are those of rows that are not kept,
            since they never come again: the run is the same beside others that keep them for it.
        """
        now = self._pass
        if now is None or now.rows is None:
            return output
        states, form = block_output(self._model, output, now.inputs["input_ids"])
        self._keep_form(now.prefix, form)
        low = states.detach().to(form.kept)
        on_host = low.to("cpu") if now.is_kept else low
        for row in now.rows if now.is_kept else ():
            kept = on_host[row.number, row.start : row.end].contiguous()
            self.store.put(self._key(now.prefix, row), kept.view(torch.uint8))
        if now.padding is not None and self._model.training and torch.is_grad_enabled():
            return self._as_block_gives(self.padding.watched(now.padding, low.to(form.dtype)))
        return output if form.kept == form.dtype else self._as_block_gives(low.to(form.dtype))


def _writes(tensor: torch.Tensor) -> float:
    """How often a tensor was written to. A number that equals none where torch does not count it."""
    return float("nan") if tensor.is_inference() else tensor._version


def hooked_words(blocks: Sequence[nn.Module], before: Sequence[nn.Module], known: Sequence[Any] | None = None) -> str:
    """Who wants to see or to change what frozen blocks get and give, in words, empty where nobody does.

    Args:
        blocks: The frozen ones.
        before: What the model computes with before them, see `modules_below`.
        known: The `forward`s of others on the blocks that were tried; None where they are about to be.
    """
    for module in (module for block in blocks for module in block.modules()):
        if has_hooks_of_others(module):
            return f"a forward hook on a frozen {type(module).__name__} would not see what it gives"
        if known is not None and computes_otherwise(module, known):
            return f"another forward on a frozen {type(module).__name__} may not give the same twice"
    for module in before:
        if getattr(module, "neftune_noise_alpha", None) is not None:  # whose hook is transformers' own
            return "neftune_noise_alpha adds noise to the embeddings"
        if has_hooks_of_others(module) or computes_otherwise(module):
            return f"a hook or another forward on the {type(module).__name__} may change what the frozen blocks get"
    return ""


def modules_below(model: nn.Module) -> list[nn.Module]:
    """Embeddings, rotary tables and dropouts: what lies beside the blocks, but for final norm and head."""
    structure = read_structure(model)
    norms = {info.name.rpartition(".")[0] for info in structure.parameters if info.component == "final_norm"}
    above = structure.blocks_path.rpartition(".")[0]
    left_out = [model.get_output_embeddings(), model.get_submodule(structure.blocks_path)]
    found = [model.get_input_embeddings()]
    for name, module in model.get_submodule(above).named_children():
        if module not in left_out and f"{above}.{name}".removeprefix(".") not in norms:
            found.append(module)
    return list(dict.fromkeys(module for one in found if one is not None for module in one.modules()))


def _above_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that the blocks lie in, the outermost first, but for the model itself.

    accelerate wraps the `forward` of the model itself for autocast and unwraps it again by what it finds there. Where
    the blocks lie in nothing else, the model it is.
    """
    path = read_structure(model).blocks_path.split(".")[:-1]
    modules = [model.get_submodule(".".join(path[: end + 1])) for end in range(len(path))]
    return modules or [model]


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a module's own `forward` is called with, by name; None where that cannot be told."""
    if not args:
        return dict(kwargs)
    names = [
        name
        for name, parameter in signature(type(module).forward).parameters.items()
        if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
    ][1:]
    if len(args) > len(names):
        return None
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _takes(module: nn.Module, name: str) -> bool:
    """Whether a module's own `forward` has a keyword."""
    return name in signature(type(module).forward).parameters
