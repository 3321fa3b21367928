"""The report as people meet it: in a browser, from the file system, with a mouse, a keyboard, a phone."""

import itertools

import pytest

import report_folder
from bridle.report.html import write_report
from browsing import axe, launched, needs_chromium, watching

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = report_folder.make_folder(tmp_path_factory.mktemp("comparison"))
    return write_report(folder)


@pytest.fixture(scope="module")
def run_report(tmp_path_factory):
    return write_report(report_folder.make_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture
def visit(browser, report):
    """Opens the report; whatever it asks for and complains about must have been nothing when the test ends."""

    def _visit(**options):
        page = watch.page(**options)
        page.goto(report.as_uri())
        return page

    with watching(browser) as watch:
        yield _visit
        assert set(watch.requests) == {report.as_uri()}


def test_the_plots_are_there(visit):
    page = visit()
    page.get_by_text("The same for other utilities").click()
    plots = page.locator("figure svg").all()
    assert len(plots) == 4
    for plot in plots:
        box = plot.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 200
        assert plot.locator("path").count() > 10


def test_the_first_screen_says_which_method_and_shows_why(visit):
    page = visit(viewport={"width": 1280, "height": 1000})
    answer = page.locator("main section").first
    assert answer.locator(".finding").inner_text().startswith("Take constrained-adaptive: 5.8%")
    box = answer.locator("svg").first.bounding_box()
    assert box["width"] > 600
    assert box["y"] + box["height"] <= 1000
    labels = page.evaluate(
        """() => [...document.querySelector("main section svg").querySelectorAll("text")]
           .map((one) => [one.textContent.trim(), one.getBoundingClientRect().toJSON()])"""
    )
    names = [box for text, box in labels if text in report_folder.DESCRIPTIONS]
    assert len(names) == 4
    for one, other in itertools.combinations(names, 2):
        apart = one["right"] <= other["left"] or other["right"] <= one["left"]
        assert apart or one["bottom"] <= other["top"] or other["bottom"] <= one["top"]


def test_nine_methods_and_three_seeds_are_a_short_page(browser, tmp_path):
    """About half of the 18,400 pixels that it had before what few people need was folded away.

    It had no plot of further constraints then.
    """
    large = write_report(report_folder.make_large(tmp_path))
    assert large.stat().st_size < 3 * 2**20
    with watching(browser) as watch:
        page = watch.page(viewport={"width": 1280, "height": 900})
        page.goto(large.as_uri())
        timing = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        assert 0 < timing < 2000, "milliseconds"
        page.evaluate("document.querySelector('section[aria-labelledby=further_constraints]').remove()")
        assert page.evaluate("document.documentElement.scrollHeight") < 9_300
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
        assert page.evaluate("document.documentElement.scrollHeight") > 20_000, "nothing is gone"


def test_rounds_stand_side_by_side(visit):
    page = visit(viewport={"width": 1280, "height": 900})
    first, second = page.locator(".strip").first.locator("li").all()
    assert first.bounding_box()["y"] == second.bounding_box()["y"]
    assert "24.0%" in first.inner_text()
    assert "−14.0 points, fewer" in second.inner_text()
    assert page.locator("details .strip").count() == 0, "two runs fit without folding"


def test_a_generated_script_is_text_and_does_not_run(visit):
    page = visit()
    assert page.title() == "grumble-mini: comparison of methods"
    page.get_by_text(report_folder.SCRIPT, exact=True).first.scroll_into_view_if_needed()
    assert page.get_by_text(report_folder.SCRIPT, exact=True).first.is_visible()
    assert page.locator("script").count() == 1


def cover_of(page, text):
    """The button over a violating text, and the text."""
    veil = page.locator(".answers .veil").filter(has_text=text).first
    return veil.locator("button"), veil.locator(".veiled")


def is_blurred(text) -> bool:
    return text.evaluate("(one) => one.inert && getComputedStyle(one).filter.includes('blur')")


def test_the_blur_lifts_on_click(visit):
    button, text = cover_of(visit(), report_folder.INSULT)
    assert button.inner_text() == "violating text, click to show"
    assert button.get_attribute("aria-expanded") == "false"
    assert is_blurred(text)
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    assert not is_blurred(text)
    assert text.get_attribute("aria-hidden") is None
    button.click()
    assert is_blurred(text)


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_blur_lifts_by_keyboard(visit, key):
    page = visit()
    button, text = cover_of(page, report_folder.INSULT)
    button.focus()
    page.keyboard.press(key)
    assert not is_blurred(text)


def test_screen_readers_do_not_read_what_is_covered(visit):
    page = visit()
    button, _ = cover_of(page, report_folder.INSULT)
    assert report_folder.INSULT not in page.locator("main").aria_snapshot()
    button.click()
    assert report_folder.INSULT in page.locator("main").aria_snapshot()


def test_all_prompts_can_be_shown_at_once(visit):
    page = visit()
    page.get_by_role("button", name="Show all prompts").click()
    assert not any(is_blurred(text) for text in page.locator(".prompt .veiled").all())
    assert is_blurred(cover_of(page, report_folder.INSULT)[1])


def test_without_scripts_and_in_print_nothing_covered_is_shown(visit):
    page = visit(java_script_enabled=False)
    assert page.locator(".veiled[inert]").count() == page.locator(".veiled").count() > 0
    page.emulate_media(media="print")
    assert not any(text.is_visible() for text in page.locator(".veiled").all())


def test_print_shows_what_was_opened(visit):
    page = visit()
    button, text = cover_of(page, report_folder.INSULT)
    button.click()
    page.emulate_media(media="print")
    assert text.is_visible()
    assert not button.is_visible()


def test_guidance_opens_where_q_moves_most(visit):
    page = visit()
    page.locator("[aria-controls=guided-text]").click()
    assert "Token 6 of 9" in page.locator("#place").inner_text()
    assert page.locator(".token[tabindex='0']").inner_text().strip().startswith("grumble")


def test_everything_keeps_the_page_s_left_edge(visit):
    page = visit(viewport={"width": 1280, "height": 900})
    left = {
        page.locator(part).first.bounding_box()["x"] for part in ("header h1", "nav", "main section h2", "footer p")
    }
    assert max(left) - min(left) < 17, "at most the padding of a column"


def test_the_heat_map_is_walked_with_arrow_keys(visit):
    page = visit()
    page.locator("[aria-controls=guided-text]").click()
    tokens, panel = page.locator(".token"), page.locator("#place")
    tokens.nth(4).focus()
    assert "Token 5 of 9" in panel.inner_text()
    assert "kind" in panel.inner_text()
    for key, number in [("ArrowRight", 6), ("ArrowLeft", 5), ("Home", 1), ("End", 9), ("ArrowUp", None)]:
        page.keyboard.press(key)
        pressed = page.locator(".token[aria-pressed=true]")
        assert pressed.count() == 1
        assert pressed.evaluate("(one) => one === document.activeElement")
        if number:
            assert f"Token {number} of 9" in panel.inner_text()
    assert page.locator(".token[tabindex='0']").count() == 1
    assert "Token 9 of 9" not in panel.inner_text()  # it stood alone on its line


def test_the_colours_of_the_heat_map_differ_with_r(visit):
    page = visit()
    colours = page.locator(".token").evaluate_all("(all) => all.map((one) => getComputedStyle(one).backgroundColor)")
    assert len(set(colours)) >= 5
    assert colours[6] == colours[7]  # both have R = 0.03


@pytest.mark.parametrize("width", [320, 360])
def test_a_phone_does_not_scroll_sideways(visit, width):
    page = visit(viewport={"width": width, "height": 700})
    for button in page.locator(".lift").all():
        if button.is_visible():
            button.click()
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate("scrollTo(1000, 0)")
    assert page.evaluate("scrollX") == 0


def test_the_dark_theme_changes_page_and_plots(visit):
    colours = {}
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.locator("figure svg text").first.evaluate("(one) => getComputedStyle(one).fill")
        colours[scheme] = (ground, ink)
    assert colours == {
        "light": ("rgb(255, 255, 255)", "rgb(27, 27, 31)"),
        "dark": ("rgb(21, 23, 27)", "rgb(231, 230, 225)"),
    }


def order(page):
    """The methods of the first table, from top to bottom."""
    return (
        page.locator("table.grid")
        .first.locator("tbody th")
        .evaluate_all("(all) => all.map((one) => one.textContent.trim())")
    )


def test_a_table_is_sorted_by_a_column_and_back(visit):
    page = visit()
    before = order(page)
    heading = page.locator("table.grid").first.locator("thead tr").nth(1).locator("th").nth(1)
    values = """(all) => all.map((one) => one.dataset.value === undefined ? null : Number(one.dataset.value))"""
    cells = page.locator("table.grid").first.locator("tbody td:nth-child(2)")
    heading.get_by_role("button").focus()
    for sort, key in (("ascending", "Enter"), ("descending", "Space")):
        page.keyboard.press(key)
        assert heading.get_attribute("aria-sort") == sort
        found = cells.evaluate_all(values)
        known = [value for value in found if value is not None]
        assert known == sorted(known, reverse=sort == "descending")
        assert found[: len(known)] == known, "what is missing stays at the end"
        assert page.locator("[aria-sort]").count() == 1
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") is None
    assert order(page) == before
    page.locator("table.grid").first.locator("thead tr").nth(1).get_by_role("button").first.click()
    assert order(page) == sorted(before)


def test_columns_can_be_hidden_and_their_groups_shrink(visit):
    page = visit()
    table = page.locator("table.grid").first
    shown = "(one) => [...one.rows].slice(1).map((row) => [...row.cells].filter((cell) => !cell.hidden).length)"
    counts = table.evaluate(shown)
    spans = "(one) => [...one.rows[0].cells].slice(1).reduce((sum, cell) => sum + (cell.hidden ? 0 : cell.colSpan), 0)"
    page.get_by_text("Choose columns").first.click()
    boxes = page.locator(".columns").first.get_by_role("checkbox")
    assert boxes.count() == counts[0] - 1 == table.evaluate(spans)
    boxes.first.focus()
    page.keyboard.press("Space")
    boxes.last.uncheck()
    assert table.evaluate(shown) == [count - 2 for count in counts]
    assert table.evaluate(spans) == counts[0] - 3
    boxes.first.check()
    boxes.last.check()
    assert table.evaluate(shown) == counts


def test_samples_on_which_methods_disagree_can_be_shown_alone(visit):
    page = visit()
    articles = page.locator("section[aria-labelledby=samples] article")
    agreed = page.locator("section[aria-labelledby=samples] article.agreed")
    total, same = articles.count(), agreed.count()
    assert 0 < same < total
    page.get_by_label("Only prompts on which methods disagree").check()
    assert [one.is_visible() for one in agreed.all()] == [False] * same
    assert sum(one.is_visible() for one in articles.all()) == total - same
    page.get_by_label("Only prompts on which methods disagree").uncheck()
    assert all(one.is_visible() for one in agreed.all())


def test_without_scripts_tables_and_samples_are_whole(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("table.grid").first.locator("th button").count() == 0
    assert page.locator(".columns").count() == 0
    assert not page.get_by_label("Only prompts on which methods disagree").is_visible()


def test_a_plot_leads_to_its_rows(visit):
    page = visit(reduced_motion="reduce")  # else the page scrolls there in its own time
    page.locator("section[aria-labelledby=tradeoff] figcaption a").click()
    assert page.url.endswith("#methods")
    assert page.locator("#methods").evaluate("(one) => one.getBoundingClientRect().top < innerHeight")


@pytest.mark.parametrize("which", ["report", "run_report"])
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_no_serious_fault_of_accessibility(browser, request, which, scheme, width):
    page = browser.new_context(
        color_scheme=scheme,
        viewport={"width": width, "height": 800},
        bypass_csp=True,  # or the page's policy would refuse axe-core
    ).new_page()
    page.goto(request.getfixturevalue(which).as_uri())
    for summary in page.locator("summary").all():
        summary.click()
    for button in page.locator(".lift").all():
        if button.is_visible():
            button.click()
    found = axe.Axe().run(page).response["violations"]
    faults = [(one["impact"], one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]
    assert [fault for fault in faults if fault[0] in ("serious", "critical")] == []
    page.context.close()
