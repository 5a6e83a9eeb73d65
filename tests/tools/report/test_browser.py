"""The page as a browser shows it, and as keyboard and screen reader find it."""

from itertools import pairwise
from pathlib import Path

import pytest

from async_opd.cli.main import main
from tests.tools.report.conftest import Page, rollout

pytestmark = pytest.mark.browser
HOSTILE = ["4", "<script>alert(1)</script>", "\n", " ", "</script>", "<eos>"]
ARROW_RIGHT, TAB = ("ArrowRight", 39), ("Tab", 9)


@pytest.fixture
def report(make_run, tmp_path, capsys) -> Path:
    file = tmp_path / "report.html"
    run = make_run(rollouts=[rollout(10, HOSTILE), rollout(20, list("3<eos>"))])
    assert main(["report", str(run), "-o", str(file)]) == 0
    return file


@pytest.fixture
def comparison(make_run, tmp_path, capsys) -> Path:
    file = tmp_path / "both.html"
    runs = [make_run("sync", 30), make_run("async", 50, rollouts=[rollout(10, ["a"])])]
    assert main(["report", *map(str, runs), "-o", str(file)]) == 0
    return file


def points(page: Page, title: str, axis: str) -> list[int]:
    """Count the points of each line of the figure with that title."""
    lines = f""".plot[aria-label="{title} by {axis}"] .line"""
    return page.js(
        f"[...document.querySelectorAll('{lines}')]"
        ".map(line => line.getAttribute('d').match(/[ML]/g).length)"
    )


def test_it_loads_without_a_complaint_or_a_request_and_draws_every_step(report, page):
    page.open(report)
    assert (page.complaints, page.requests) == (
        [],
        [report.as_uri(), "data:,"][: len(page.requests)],
    )
    for axis in ("step", "time"):
        assert points(page, "KL to the teacher", axis) == [30]
        # no verdict was known in steps 7, 14, 21, 28
        assert points(page, "Accuracy", axis) == [30 - 4]
        assert points(page, "Throughput", axis) == [30, 30, 30]
    titles = page.js("[...document.querySelectorAll('figure h3')].map(h => h.textContent)")
    for title in (
        "Accuracy",
        "Entropy",
        "Length",
        "Mean weight",
        "Largest weight",
        "Lag",
        "Learner",
        "Queue",
    ):
        assert title in titles
    # before and after
    assert page.js("document.querySelectorAll('#f0-0 .x-step .dot').length") == 2
    assert page.js(
        "[...document.querySelectorAll('#f0-0 .x-step .mark')].map(m => m.className)"
    ) == [
        "mark checkpoint",
        "mark checkpoint",
        "mark event",
    ]


def test_what_a_rollout_says_is_text(report, page):
    page.open(report)
    assert page.js("document.querySelectorAll('script').length") == 2
    assert page.js(
        "[...document.querySelectorAll('.tokens')[0].children].map(t => t.textContent)"
    ) == [
        "4",
        "<script>alert(1)</script>",
        "↵\n",
        " ",
        "</script>",
        "<eos>",
    ]


def test_the_colouring_is_switched_by_keyboard(report, page):
    page.open(report)
    look = (
        "(s => [s.textDecorationLine, s.textDecorationStyle, s.backgroundColor])"
        "(getComputedStyle(document.querySelectorAll('.tokens')[0].children[5]))"
    )
    page.js("document.getElementById('by-advantage').focus()")
    seen = [page.js(look)]
    for chosen in ("by-weight", "by-selection"):
        page.press(*ARROW_RIGHT)
        assert (
            page.js("document.activeElement.id + document.activeElement.checked") == chosen + "true"
        )
        seen.append(page.js(look))
    advantage, weight, selection = seen
    assert advantage[:2] == ["underline", "dotted"] and weight[:2] == selection[:2] == [
        "underline",
        "solid",
    ]
    assert len({colour for *_, colour in seen}) == 3


def test_arrow_keys_go_through_tokens_and_charts_and_say_their_numbers(report, page):
    page.open(report)
    page.js("document.querySelector('.tokens').focus()")
    page.press(*ARROW_RIGHT)
    read_out = page.js("document.querySelector('article .read-out').textContent")
    assert read_out.startswith("token 2 “<script>alert(1)</script>”")
    assert "advantage -0.1" in read_out and "weight 0.5" in read_out
    active = "document.querySelector('.tokens').getAttribute('aria-activedescendant')"
    assert page.js(f"document.getElementById({active}).textContent") == HOSTILE[1]
    page.js("document.querySelector('#f0-1 .x-step').focus()")
    page.press("Home", 36)
    page.press(*ARROW_RIGHT)
    assert (
        page.js("document.querySelector('#f0-1 .x-step').getAttribute('aria-valuetext')")
        == "step 2, 4 s: KL 1"
    )
    assert page.js("document.querySelector('#f0-1 .x-step').ariaValueMax") == "29"
    assert page.js("document.querySelector('#f0-1 .legend').textContent.trim()") == "KL 1"
    page.js("document.getElementById('axis-step').focus()")
    page.press(*ARROW_RIGHT)
    shown = (
        "[...document.querySelectorAll('#f0-1 .plot')]"
        ".filter(p => p.offsetParent).map(p => p.dataset.axis)"
    )
    assert page.js(shown) == ["time"]


@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("which", ["report", "comparison"])
def test_nothing_sticks_out(request, page, which, width):
    page.open(request.getfixturevalue(which), width=width)
    page.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.js("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_everything_one_can_use_has_a_name_and_is_reached_by_tab(request, page, which):
    page.open(request.getfixturevalue(which))
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "radio",
        "slider",
        "listbox",
        "option",
        "link",
        "DisclosureTriangle",
        "button",
        "figure",
        "table",
        "region",
    }
    used = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    present = {node["role"]["value"] for node in used}
    assert {"radio", "slider", "listbox", "option", "link", "table", "region"} <= present
    nameless = [
        node["role"]["value"] for node in used if not node.get("name", {}).get("value", "").strip()
    ]
    assert [role for role in nameless if role != "figure"] == []
    stops, seen = page.js("document.querySelectorAll('.plot, .tokens').length"), set()
    for _ in range(300):
        page.press(*TAB)
        if not page.js("document.activeElement !== document.body"):
            break
        assert page.js("getComputedStyle(document.activeElement).outlineStyle !== 'none'")
        seen.add(page.js("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
    hidden = page.js("[...document.querySelectorAll('.plot')].filter(p => !p.offsetParent).length")
    assert len(seen) > stops - hidden  # these, and links and radios


def test_headings_are_in_order_and_the_language_is_named(report, page):
    page.open(report)
    levels = page.js("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    assert page.js("document.documentElement.lang") == "en"


CONTRASTS = """
(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (...fills) => {
    for (const fill of fills) { context.fillStyle = fill; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (c) => c
    .map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = getComputedStyle(document.body).backgroundColor;
  const faint = {};
  for (const by of ["by-advantage", "by-weight", "by-selection"]) {
    document.getElementById(by).checked = true;
    for (const e of document.querySelectorAll("body, body :not(svg, svg *)")) {
      if (!e.offsetParent) continue;
      if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
      const style = getComputedStyle(e);
      const [a, b] = [light(rgb(paper, style.color)), light(rgb(paper, style.backgroundColor))];
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (ratio < 4.5) faint[by + " " + e.tagName + " " + e.className] = ratio;
    }
  }
  return faint;
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_schemes(report, page, scheme):
    page.open(report, scheme=scheme)
    assert (
        page.js("getComputedStyle(document.body).backgroundColor")
        == {"light": "rgb(253, 253, 252)", "dark": "rgb(20, 23, 26)"}[scheme]
    )
    assert page.js(CONTRASTS) == {}


def test_runs_are_drawn_over_one_another_in_a_colour_of_their_own(comparison, page):
    page.open(comparison)
    assert page.complaints == []
    assert points(page, "KL to the teacher", "step") == [30, 50]
    colours = (
        "(id => [...document.querySelectorAll(id + ' .x-step .line')]"
        ".map(line => getComputedStyle(line).color))"
    )
    kl, loss = page.js(f"{colours}('#f0-1')"), page.js(f"{colours}('#f0-2')")
    assert kl == loss and len(set(kl)) == 2
