"""What the base says of itself, for the card of what is made of it; nothing of it stops a run."""

import logging

import pytest

from partialtune.model.base_card import stated_by


@pytest.fixture
def base(tmp_path, caplog):
    """Write a model's folder with a card."""
    caplog.set_level(logging.INFO, "partialtune")

    def write(card):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
        return str(tmp_path)

    return write


def test_language_and_licence_of_a_folders_card_are_taken_and_nothing_else(base):
    card = "---\nlanguage: [en, de]\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\ntags: [x]\n---\n# A\n"
    stated = {"language": ["en", "de"], "license": "other", "license_name": "mine", "license_link": "LICENSE"}
    assert stated_by(base(card)) == stated


def test_the_bundled_model_says_its_licence():
    assert stated_by("builtin:lilliput") == {"language": "en", "license": "apache-2.0"}


@pytest.mark.parametrize(
    "card", ["# No metadata\n", "---\ntags: [x]\n---\n", "---\nlicense: {a: b}\nlanguage: 3\n---\n"]
)
def test_a_base_that_does_not_say_its_licence_is_named(base, card, caplog):
    assert stated_by(base(card)) == {}
    assert "says under which licence it is" in caplog.text


def test_a_base_without_a_card_says_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert stated_by(str(tmp_path)) == {}


@pytest.mark.parametrize(
    "card", ["---\nlicense: [mit\n---\n", "---\n- license\n---\n", b"---\nlicense: \xff\xfe\n---\n"]
)
def test_a_card_that_cannot_be_read_is_a_warning(base, card, caplog):
    assert stated_by(base(card)) == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be read" in caplog.text


def test_a_hub_that_cannot_be_asked_is_no_reason_to_stop(monkeypatch, caplog):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("partialtune.model.base_card.hf_hub_download", unreachable)
    assert stated_by("someone/model", "a" * 40) == {}
    assert "no network" in caplog.text
