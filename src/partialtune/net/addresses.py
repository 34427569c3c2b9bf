"""Addresses of texts: as they are fetched, with their secrets -> as they may be shown and written down, without.

    without_secrets("https://me:pw@host/a.txt?id=7&token=abc&raw=1") -> "https://***@host/a.txt?id=***&token=***&raw=1"

What stands before the @ and every value behind the ? may be a password, a token or a signature (of a presigned
address), and no list of names knows them all: all are left out but plain switches, which hold no secret. What is left
out shows as ***, so that an address without its secrets is never fetched in the place of the whole one.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)
LEFT_OUT = "***"
SOURCE_KEYS = ("text", "replay", "eval_texts")  # keys of a recipe whose values are text sources

_SWITCHES = frozenset({"", "0", "1", "true", "false", "yes", "no"})
# A path swallows one of two slashes: partialtune train http://me:pw@host/a.txt -> there is no recipe http:/me:pw@...
_IN_TEXT = re.compile(r"(?:https?:/|[a-z][a-z0-9+.-]*://)[^\s]+", re.I)
_TRAILING = re.compile(r"[\s.,:;!'\"`)\]}>]*$")  # the sentence around an address, not the address
_PARTS = re.compile(r"([a-z][a-z0-9+.-]*:/{1,2})([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", re.I | re.S)
# What a library shows of an address: /a.txt?token=abc
_BARE_QUERY = re.compile(r"(?<=[\w/.])\?[^\s=&?]+=\S*?(?=[.,:;!'\"`)\]}>]*(?:\s|$))")
_PATH_VALUE = re.compile(r"(;[^=/;]+=)[^/;]*")


def without_secrets(text: str) -> str:
    """A text (one address, or a message that holds some) without the secrets of its addresses."""
    if ADDRESS.match(text) and not re.search(r"\s", text):
        return _address_without_secrets(text)

    def found(match: re.Match[str]) -> str:
        trailing = _TRAILING.search(match[0])[0]
        return _address_without_secrets(match[0].removesuffix(trailing)) + trailing

    return _BARE_QUERY.sub(lambda match: _query_without_values(match[0]), _IN_TEXT.sub(found, text))


def lacks_secrets(address: str) -> bool:
    """Whether an address was written down without its secrets, so that it cannot be fetched."""
    return re.search(r"//\*\*\*@|[?&;][^?&;]*=\*\*\*|\?\*\*\*", address) is not None


def sources_without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values as they may be written down: its text sources without their secrets."""
    return {key: _each(value) if key in SOURCE_KEYS else value for key, value in values.items()}


def same_sources(a: Any, b: Any) -> bool:
    """Whether two values of one of `SOURCE_KEYS` name the same sources, as far as what is written tells.

    An address that was written down without its secrets is the same as the whole one; its content decides (sha256).
    """
    return a == b or _each(a) == b or a == _each(b)


def _each(value: Any) -> Any:
    """Sources, one, several or named, each without its secrets."""
    if isinstance(value, str):
        return without_secrets(value) if ADDRESS.match(value.strip()) else value
    if isinstance(value, Mapping):
        return {name: _each(source) for name, source in value.items()}
    return [_each(source) for source in value] if isinstance(value, Sequence) else value


def _address_without_secrets(address: str) -> str:
    match = _PARTS.fullmatch(address)
    if not match:
        return address
    scheme, host, path, query, fragment = (part or "" for part in match.groups())
    name, colon, port = host.partition(":")
    if colon and not port.isdigit() and "@" not in host and "[" not in name and "@" in path + query + fragment:
        # a password with a slash, ? or # that was not quoted: the address is none, and the message would show it
        host, path, query = f"{LEFT_OUT}@", (path + query + fragment).rpartition("@")[2].partition("?")[0], ""
    if "@" in host:
        host = f"{LEFT_OUT}@{host.rpartition('@')[2]}"
    path = _PATH_VALUE.sub(rf"\1{LEFT_OUT}", path)
    return scheme + host + path + _query_without_values(query)  # a fragment is never sent to the server


def _query_without_values(query: str) -> str:
    """?id=7&raw=1 -> ?id=***&raw=1; a word without a name may be a token as it is."""
    if not query:
        return ""
    shown = []
    for field in query[1:].split("&"):
        name, equals, value = field.partition("=")
        kept = value.lower() in _SWITCHES
        shown.append(field if equals and kept else f"{name}={LEFT_OUT}" if equals else LEFT_OUT * bool(field))
    return "?" + "&".join(shown)
