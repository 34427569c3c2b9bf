"""The report: one page that says what happened, asks nothing of the network and works in a browser."""

import base64
import html.parser
import json
import re
import time

import pytest

from chromium import Page, needs_chromium
from partialtune.metrics import METRICS
from partialtune.pages.figures import describe_figures
from partialtune.pages.findings import verdict
from partialtune.pages.html import flowing, visible
from partialtune.pages.report import write_report
from partialtune.pages.run_files import read_run
from partialtune.words import count, percent, significant
from run_folder import write_run_folder

WHOLE_RUNS = True  # what `quick_runs` in conftest.py looks for
ATTACK = "<script>document.title = 'taken'</script>"
FLAGS = {"odd_token": ATTACK, "source": f"{ATTACK}\"'&.txt", "prompts": (ATTACK, "The Emperor of")}


class Outline(html.parser.HTMLParser):
    """Tags that must be closed, ids, links, and addresses that a browser would ask for."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.addresses, self.alts, self.scripts = [], [], [], [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "link", "img", "source", "path", "br"):
            self.open.append(tag)
        self.scripts += tag == "script"
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.alts += [attributes.get("alt")] if tag == "img" else []
        if tag == "a":
            self.links.append(attributes["href"])
        self.addresses += [attributes[key] for key in ("src", "srcset") if key in attributes]
        self.addresses += [attributes["href"]] if tag == "link" else []

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    return write_report(write_run_folder(tmp_path_factory.mktemp("runs") / "gulliver", **FLAGS))


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    run = write_run_folder(
        tmp_path_factory.mktemp("runs") / "spoilt",
        blocks=3,
        width=8,
        steps=20,
        changed=("transformer.h.1.mlp.c_fc.weight",),
        unmoved=("transformer.wpe.weight",),
        held_out=False,
    )
    return write_report(run)


@pytest.fixture
def without_images(monkeypatch):
    """Leave the drawing out where the figures are not what is looked at."""
    monkeypatch.setattr("partialtune.pages.report.render_figure", lambda run, figure, dark: b"no image")


def text_of(page):
    return page.read_text(encoding="utf-8")


def test_the_verdict_stands_on_top_in_words(passed, failed):
    good, bad = text_of(passed), text_of(failed)
    assert "Audit passed" in good
    assert "Audit failed" not in good
    order = ("Audit passed", "<h2>One prompt", "<h2>What it learnt", "<h2>What trained", "<h2>Recipe</h2>")
    places = [good.index(words) for words in order]
    assert places == sorted(places)
    assert "L2 change exactly 0" in good
    assert "85,054,464 frozen parameters in 144 tensors kept every bit" in good
    assert "1.888 → 1.613" in good
    assert "Audit failed" in bad
    assert "1 tensor changed" in bad
    assert re.search(r"<code>transformer\.h\.1\.mlp\.c_fc\.weight</code> is frozen, but changed", bad)
    assert "did not move: never had a gradient" in bad


def test_what_comes_from_texts_and_tokens_is_shown_and_not_run(passed):
    page = text_of(passed)
    assert ATTACK not in page
    assert Outline(page).scripts == 1
    # next token, prompt, its continuations; moved token; its places and sums on held-out text; file name
    assert page.count("&lt;script&gt;") >= 20


def test_the_page_is_well_formed_and_asks_for_nothing_outside_itself(passed, failed):
    for page in (passed, failed):
        outline = Outline(text_of(page))
        assert outline.open == []
        assert len(outline.ids) == len(set(outline.ids))
        assert {link.removeprefix("#") for link in outline.links} <= set(outline.ids)
        assert all(address.startswith("data:") for address in outline.addresses)
        figures = describe_figures(read_run(page.parent))
        shown = [figure.alt for figure in figures if figure.alt in outline.alts]
        assert len(outline.addresses) == 2 * len(shown) + 1  # light and dark, and an empty icon
        assert sorted(outline.alts) == sorted(shown)
        left_out = {figure.path.name for figure in figures} - {f.path.name for f in figures if f.alt in shown}
        assert left_out <= {"deltas_heatmap.png", "deltas_over_time.png"}  # where at most three groups moved
        assert all(alt and len(alt) > 40 for alt in outline.alts)


def test_every_parameter_of_the_plan_has_its_row_with_its_digest(passed):
    page = text_of(passed)
    for parameter in read_run(passed.parent).plan["parameters"]:
        assert f">{parameter['name']}</td>" in page
        assert parameter["sha256_after"][:8] in page


def test_a_run_without_held_out_text_says_that_its_scores_are_those_of_its_training_text(failed):
    page = text_of(failed)
    assert "Bits per byte, training text" in page
    assert "No text was held out" in page
    assert "held-out text" not in page


def test_scores_that_are_not_finite_are_shown_as_a_dash(tmp_path, without_images):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=2)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["validation"]["after"] |= {"loss": None, "perplexity": None, "bits_per_byte": None}
    evaluation["prompts"][0]["kl"] = None
    evaluation["prompts"][0]["after"][0]["probability"] = None
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = text_of(write_report(run))
    assert "1.888 → –" in page
    assert re.search(r"KL\(before to after\) –\s*<", page)
    assert "None" not in page


def test_a_run_without_evaluation_and_performance_has_a_page_without_these_sections(tmp_path, without_images):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=2)
    for name in ("evaluation", "performance", "weight_deltas", "trainer_state", "insight"):
        (run / f"{name}.json{'l' if name == 'weight_deltas' else ''}").unlink()
    outline = Outline(text_of(write_report(run)))
    assert not {"prompts", "performance", "ranks", "tokens", "shift"} & set(outline.ids)
    assert {"recipe", "learning", "movement", "parameters", "provenance"} <= set(outline.ids)


def test_insight_is_told_in_words_figures_and_tables(passed):
    page = text_of(passed)
    assert "exp of the entropy of its singular values" in page
    assert "Computed in 2.5 s" in page
    assert "Of 50,257 tokens 9,000 occur in the training text" in page
    assert "movement grows with how often they do (rank correlation +0.62)" in page
    assert "58.0% became likelier" in page
    assert re.search(r'to be a </span><mark><span class="space">␣</span>ship</mark> unto his Majesty', page)
    assert "the second is drawn at random (temperature 1, top-p 0.95, seed 0; the same before and after)" in page
    assert "Learning curves: training text on 16 windows, evenly spaced; python_docs on 16 windows" in page
    assert "unto" in page


def test_the_verdict_tells_what_other_texts_lost(passed):
    *_, forgotten = verdict(read_run(passed.parent))
    assert (forgotten.title, forgotten.value) == ("Bits per byte, python_docs", "1.744 → 1.793")
    assert forgotten.detail == "+2.8%; so much was forgotten."


def test_what_a_run_has_no_insight_into_is_said(tmp_path, without_images):
    blocks = {"trains": lambda p: p["block"] == 0 and p["name"].endswith("bias"), "selectors": ("blocks[0].biases",)}
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=2, held_out=False, **blocks)
    page = text_of(write_report(run))
    assert "No matrix trained, and what is no matrix has no rank." in page
    assert "no matrix with a row for each token trained" in page
    assert "No text was held out, so there is none to look at" in page
    insight = json.loads((run / "insight.json").read_text())
    insight["effective_ranks"] |= {"matrices": [], "left_out": ["a.weight"]}
    insight["next_token_shift"] = {"windows": 4, "positions": 0}
    (run / "insight.json").write_text(json.dumps(insight))
    write_report(run)


def test_a_token_with_half_a_surrogate_pair_does_not_stop_the_page(tmp_path, without_images):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=2, odd_token="\udc80 \x00\u202e")
    assert "\\udc80" in text_of(write_report(run))


def test_white_space_and_control_characters_of_a_token_are_visible():
    assert visible(" the") == '<span class="space">␣</span>the'
    assert visible("<b>\n") == '&lt;b&gt;<span class="space">↵</span>'
    assert visible("\x07") == '<span class="space">\\x07</span>'
    assert "empty" in visible("")
    assert flowing("a <b\nc\t") == 'a &lt;b<span class="space">↵</span> c<span class="space">⇥</span>'
    assert flowing("") == ""


def test_numbers_are_written_for_people():
    assert count(39_385_344) == "39,385,344"
    assert [percent(share) for share in (0.31651, 0.0123, 0.00031, 2e-9, 0, 1, None)] == [
        "31.7%", "1.2%", "0.031%", "2.0 × 10⁻⁷%", "0%", "100%", "–",
    ]  # fmt: skip
    assert [significant(value) for value in (0.119312, 12345.6, 3.21e-7, 0.0, -1.5)] == [
        "0.1193", "12,346", "3.210 × 10⁻⁷", "0", "−1.500",
    ]  # fmt: skip
    assert METRICS["loss"].words(5.3849) == "5.385"
    assert METRICS["next_token_accuracy"].words(0.3123) == "31.2%"


def test_a_trainable_part_that_was_not_in_the_optimizer_is_a_bad_finding(tmp_path, without_images):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=2)
    audit = json.loads((run / "audit.json").read_text())
    audit["passed"] = False
    audit["trainable"]["not_in_optimizer"] = ["transformer.wpe.weight"]
    (run / "audit.json").write_text(json.dumps(audit))
    frozen, trainable, *_ = verdict(read_run(run))
    assert (frozen.level, trainable.level) == ("good", "bad")
    assert "was not in the optimizer" in text_of(write_report(run))


# --- in a browser

ROWS = "[...document.querySelectorAll('#parameters tbody tr')].map(row => row.cells[{}].{})"


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_opens_without_complaint_request_or_sideways_scrolling(passed, width, dark):
    with Page(width=width, dark=dark) as page:
        page.open(passed)
        assert page.complaints() == []
        assert page.requests() == [passed.as_uri()]
        assert page.value("document.title") == "gulliver · partialtune"
        assert page.value("document.documentElement.scrollWidth") == width
        assert page.value("[...document.images].every(image => image.complete && image.naturalWidth === 1600)")
        shown = page.value("getComputedStyle(document.body).backgroundColor")
        assert shown == ("rgb(13, 17, 23)" if dark else "rgb(246, 247, 249)")
        attack = page.value("[...document.querySelectorAll('.tokens code')].map(code => code.textContent)")
        assert any("<script>" in token for token in attack)
        assert "<script>" in page.value("document.querySelector('#tokens').textContent")
        assert "<script>" in page.value("document.querySelector('#shift').textContent")
        assert page.value(NOT_READ) == []


# Elements that stand out of the page on either side, where nobody scrolls.
NOT_READ = """
[...document.querySelectorAll("mark, .odds, figcaption, h2, h3, h4, .finding *")].filter(element => {
  const box = element.getBoundingClientRect();
  return box.right > document.documentElement.clientWidth + 1 || box.left < -1;
}).map(element => element.outerHTML)
"""


@needs_chromium
@pytest.mark.slow
def test_tables_sort_by_mouse_and_by_keyboard_and_say_so(passed):
    with Page() as page:
        page.open(passed)
        assert not page.value("document.querySelector('#parameters').open")
        click = "document.querySelector('nav a[href=\"#parameters\"]').click()"
        page.value(
            f"(() => {{ {click}; return new Promise(done => addEventListener('hashchange', () => done(1))) }})()"
        )
        assert page.value("document.querySelector('#parameters').open")
        page.value("document.querySelector('#tokens').open = true")
        original = page.value(ROWS.format(0, "textContent"))
        page.value("document.querySelectorAll('#parameters th button')[4].click()")
        sizes = [int(size) for size in page.value(ROWS.format(4, "dataset.sort"))]
        assert sizes == sorted(sizes)
        sorted_by = "[...document.querySelectorAll('#parameters th')].map(th => th.getAttribute('aria-sort'))"
        assert page.value(sorted_by)[4] == "ascending"

        page.value("document.querySelectorAll('#parameters th button')[0].focus()")
        page.press("Enter", 13, text="\r")
        names = page.value(ROWS.format(0, "textContent"))
        assert names != original
        assert names.index("transformer.h.2.ln_1.bias") < names.index("transformer.h.10.ln_1.bias")
        page.press(" ", 32, text=" ")
        assert page.value(ROWS.format(0, "textContent")) == names[::-1]
        assert page.value(sorted_by) == ["descending", *[None] * 9]

        occurrences = "[...document.querySelectorAll('#tokens tbody tr')].map(row => row.cells[2].dataset.sort)"
        page.value("document.querySelectorAll('#tokens th button')[2].focus()")
        page.press("Enter", 13, text="\r")
        assert page.value(occurrences) == ["1", "3", "9", "27", "81", "243"]
        page.press("Enter", 13, text="\r")
        assert page.value(occurrences) == ["243", "81", "27", "9", "3", "1"]

        page.value("document.querySelectorAll('#parameters th button')[2].click()")
        blocks = page.value(ROWS.format(2, "dataset.sort"))
        assert blocks[0] == "0"
        assert blocks[-4:] == [""] * 4  # what lies in no block comes last
        assert page.complaints() == []


@needs_chromium
@pytest.mark.slow
def test_every_control_and_scrolling_box_is_reached_by_the_tab_key(passed):
    with Page(width=390) as page:
        page.open(passed)
        page.value("document.querySelectorAll('details').forEach(details => { details.open = true })")
        wanted = page.value("document.querySelectorAll('a, button, summary, [tabindex]').length")
        reached = set()
        for _ in range(wanted):
            page.press("Tab", 9)
            reached.add(
                page.value(
                    "[...document.querySelectorAll('a, button, summary, [tabindex]')].indexOf(document.activeElement)"
                )
            )
        assert reached == set(range(wanted))
        boxes = page.value(
            "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length"
        )
        assert boxes >= 3  # the wide tables scroll in their own boxes


# Numbers that are cut off by the box around them, where nobody can scroll it, or that stand out of the page.
CUT_OFF = """
[...document.querySelectorAll("td.number, dd, .value, .odds span")].filter(cell => {
  const box = cell.getBoundingClientRect();
  if (!box.width) return false;
  const scrolled = cell.closest(".scroll");
  const room = scrolled && scrolled.scrollWidth > scrolled.clientWidth;
  return cell.scrollWidth > cell.clientWidth + 1 && getComputedStyle(cell).overflow !== "visible"
    || !room && box.right > document.documentElement.clientWidth;
}).map(cell => cell.outerHTML)
"""


@needs_chromium
@pytest.mark.slow
def test_what_matters_comes_first_on_paper_and_on_a_telephone_too(passed):
    with Page(width=1280) as page:
        page.open(passed)
        assert page.value("document.querySelector('#prompts blockquote').getBoundingClientRect().bottom") < 1500
        printed = base64.b64decode(page.send("Page.printToPDF")["data"])
        assert 1 <= len(re.findall(rb"/Type /Page\b", printed)) <= 7
    with Page(width=390) as page:
        page.open(passed)
        page.value("document.querySelectorAll('details').forEach(details => { details.open = true })")
        assert page.value(CUT_OFF) == []
        assert page.value("[...document.images].filter(image => image.width > 390).length") == 0
        scores = page.value("(box => [box.scrollWidth, box.clientWidth])(document.querySelector('#learning .scroll'))")
        assert scores[0] == scores[1]  # the table of scores is read without scrolling


@needs_chromium
@pytest.mark.slow
def test_a_failed_audit_is_told_by_word_and_sign_and_not_by_colour_alone(failed):
    with Page() as page:
        page.open(failed)
        assert page.complaints() == []
        assert "Audit failed" in page.value("document.querySelector('.verdict h2').innerText")
        assert page.value("document.querySelector('.verdict h2 svg path').getAttribute('d')").startswith("m4 4")
        assert page.value("document.querySelector('.verdict details').open")


@needs_chromium
@pytest.mark.slow
def test_a_script_that_is_not_the_page_s_own_is_refused_by_its_policy(passed, tmp_path):
    page_with_a_stranger = tmp_path / "report.html"
    page_with_a_stranger.write_text(text_of(passed).replace("</main>", f"</main>{ATTACK}"), encoding="utf-8")
    with Page() as page:
        page.open(page_with_a_stranger)
        assert page.value("document.title") == "gulliver · partialtune"
        deadline = time.monotonic() + 5
        while not page.complaints() and time.monotonic() < deadline:
            page.value("1")
        assert "Content Security Policy" in "".join(page.complaints())
