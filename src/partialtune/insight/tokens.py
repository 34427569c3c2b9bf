"""Tokens as people read them."""

from transformers import PreTrainedTokenizerBase

from partialtune.scoring.prompts import decode_after


class TokenTexts:
    """Token id -> its text as it stands within a text: `texts[262]` is `" the"` for GPT-2.

    Some decoders strip the space of a text's first token; here every token follows another one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._known: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        if token_id not in self._known:
            self._known[token_id] = decode_after(self._anchor, [token_id], self._tokenizer)
        return self._known[token_id]
