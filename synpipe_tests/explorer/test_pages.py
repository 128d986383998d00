"""The explorer's pages in a real browser, with mouse and keyboard, on a real store that `synpipe explore` serves."""

import base64
import csv
import io
import re
from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from playwright.sync_api import Browser, Page, Route, expect

from synpipe.analysis.charts import PALETTE
from synpipe.assets.rgb_tiles import open_tiles
from synpipe.datasets import Dataset
from synpipe_tests.conftest import project_of
from synpipe_tests.support.browser import CHROMIUM, chromium
from synpipe_tests.support.explorer_pages import MapOnPage, Truth, explore, nameless, shown, until, watched

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on the PATH")

METRICS = ("cosine", "l2", "dot", "l1")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
# The contrast of each text colour with its backgrounds, by WCAG 2.2.
CONTRASTS = """() => {
    const style = getComputedStyle(document.documentElement);
    const light = name => {
        const hex = style.getPropertyValue(name).trim();
        const [r, g, b] = [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16) / 255)
            .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
    return Object.fromEntries([['--ink', '--paper'], ['--soft', '--paper'], ['--soft', '--panel'], ['--soft', '--tint'],
        ['--accent', '--paper'], ['--accent', '--tint'], ['--accent-ink', '--accent'], ['--bad', '--panel'],
        ['--both', '--both-paper']].map(([ink, ground]) => [`${ink} on ${ground}`, contrast(ink, ground)]));
}"""


@pytest.fixture(scope="module")
def url(explored: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with explore(project_of(explored), tmp_path_factory.mktemp("logs") / "explore.log") as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium(webgl=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def truth(explored: Dataset) -> Truth:
    return Truth(explored, "tiny")


def ids(page: Page) -> dict[str, list[str]]:
    """The ids of the neighbours by class, without empty classes."""
    return {name: found for name, (found, _) in shown(page).items() if found}


def query(page: Page) -> str:
    shown(page)
    return page.locator(".query h1").inner_text().removeprefix("Synapse").strip()


def state(page: Page) -> str:
    return page.evaluate("location.search")


@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_shows_what_a_plain_computation_finds(browser: Browser, url: str, truth: Truth, metric: str):
    synapse_id = truth.ids[7]
    with watched(browser, f"{url}?id={synapse_id}&metric={metric}&per_class=3") as seen:
        assert ids(seen.page) == truth.nearest(synapse_id, metric, 3)
        exact = truth.distances(synapse_id, metric)
        for found, distances in shown(seen.page).values():
            np.testing.assert_allclose(distances, [exact[truth.place[one]] for one in found], rtol=1e-3, atol=1e-4)


def test_a_click_searches_again_and_every_setting_is_in_the_address(browser: Browser, url: str, truth: Truth):
    with watched(browser, url) as seen:
        page = seen.page
        shown(page)
        first = query(page)
        assert state(page) == f"?id={first}"  # a random synapse, which is in the address
        assert ids(page) == truth.nearest(first)

        tile = page.locator(".neighbour").nth(5)
        second = tile.get_attribute("data-id")
        assert second
        tile.get_by_role("button").click()
        assert ids(page) == truth.nearest(second)
        assert query(page) == second

        row = truth.rows[truth.place[second]]
        page.get_by_label("Metric").select_option("l1")
        page.get_by_label("Per class").fill("2")
        # An answer arrives while the user is typing.
        page.evaluate("document.querySelector('.answer').dataset.of = ''; dispatchEvent(new PopStateEvent('popstate'))")
        shown(page)
        expect(page.get_by_label("Per class")).to_have_value("2")
        page.get_by_label("Per class").press("Enter")
        page.get_by_label("Exclude own neuron").check()
        page.get_by_label("Region").select_option(row["region"])
        page.get_by_text("Grey", exact=True).click()
        expect(page.locator(".answer .picture.grey").first).to_be_visible()
        wanted = truth.nearest(second, "l1", 2, region=row["region"], other_neurons=True)
        assert ids(page) == wanted

        # The link shows the same to a colleague.
        with watched(browser, page.url) as theirs:
            assert ids(theirs.page) == wanted
            for label, value in (("Metric", "l1"), ("Per class", "2"), ("Region", row["region"])):
                expect(theirs.page.get_by_label(label)).to_have_value(value)
            expect(theirs.page.get_by_label("Exclude own neuron")).to_be_checked()
            expect(theirs.page.get_by_label("Grey")).to_be_checked()

        for _ in range(5):
            page.go_back()
        assert ids(page) == truth.nearest(second)
        expect(page.get_by_label("Metric")).to_have_value("cosine")
        page.go_back()
        assert (query(page), ids(page)) == (first, truth.nearest(first))
        page.go_forward()
        assert (query(page), ids(page)) == (second, truth.nearest(second))

        page.get_by_role("button", name="Random synapse").click()
        until(page, f"!location.search.includes('{second}')")
        assert ids(page) == truth.nearest(query(page))
        page.get_by_label("Go to synapse").fill(first)
        page.get_by_label("Go to synapse").press("Enter")
        assert ids(page) == truth.nearest(first)


def test_filters_exclude_the_same_neuron_and_other_hemilineages(browser: Browser, url: str, truth: Truth):
    synapse_id = next(one for one in truth.ids if truth.nearest(one) != truth.nearest(one, other_neurons=True))
    hemilineage = truth.rows[truth.place[synapse_id]]["hemilineage"]
    with watched(browser, f"{url}?id={synapse_id}&exclude_neuron=1") as seen:
        assert ids(seen.page) == truth.nearest(synapse_id, other_neurons=True)
        seen.page.get_by_label("Hemilineage").select_option(hemilineage)
        assert ids(seen.page) == truth.nearest(synapse_id, other_neurons=True, hemilineage=hemilineage)
        expect(seen.page.get_by_text("No match").first).to_be_visible()


def test_facts_distinguish_known_from_predicted_and_show_the_position(browser: Browser, url: str, truth: Truth):
    labelled = next(row for row in truth.rows if row["neurotransmitter"])
    unlabelled = next(row for row in truth.rows if not row["neurotransmitter"])
    with watched(browser, f"{url}?id={labelled['synapse_id']}") as seen:
        shown(seen.page)
        facts = seen.page.locator(".query .facts")
        assert facts.locator(".known").inner_text() == labelled["neurotransmitter"]
        guess = f"{labelled['predicted_neurotransmitter']}? {labelled['predicted_probability']:.2f} predicted"
        assert facts.locator(".predicted").inner_text() == guess
        x, y, z = (f"{round(labelled[axis]):,}" for axis in ("x_nm", "y_nm", "z_nm"))
        assert facts.locator(".position").inner_text() == f"x {x} y {y} z {z} nm"
        expect(facts).to_contain_text(str(labelled["neuron_id"]))
        expect(seen.page.locator(".class", has_text="unlabelled").locator(".known")).to_have_count(0)

        seen.page.goto(f"{url}?id={unlabelled['synapse_id']}")
        shown(seen.page)
        expect(seen.page.locator(".query .known")).to_have_count(0)
        expect(seen.page.locator(".query .predicted")).to_have_count(1)


def test_a_position_in_a_public_volume_is_a_link(browser: Browser, url: str, truth: Truth):
    # The demo's volume is a local file, so the test adds a link to the answer, and one that must not become a link.
    link = "https://neuroglancer-demo.appspot.com/#!%7B%7D"
    with watched(browser, url) as seen:

        def add_links(route: Route) -> None:
            answer = route.fetch()
            content = answer.json()
            content["query"]["neuroglancer"] = link
            content["groups"][0]["neighbours"][0]["neuroglancer"] = "javascript:alert(1)"
            route.fulfill(response=answer, json=content)

        seen.page.route("**/search?*", add_links)
        seen.page.goto(f"{url}?id={truth.ids[0]}")
        shown(seen.page)
        (place,) = seen.page.get_by_role("link", name=f"Synapse {truth.ids[0]} in Neuroglancer").all()
        assert [place.get_attribute(name) for name in ("href", "target", "rel")] == [link, "_blank", "noopener"]
        expect(seen.page.locator("[href^='javascript']")).to_have_count(0)


def test_two_encoders_side_by_side_with_shared_neighbours_marked(
    browser: Browser, url: str, explored: Dataset, truth: Truth
):
    other = Truth(explored, "other")
    synapse_id = truth.ids[11]
    first, second = truth.nearest(synapse_id), other.nearest(synapse_id)
    common = {name: set(first[name]) & set(second[name]) for name in first}
    possible = {name: len(first[name]) for name in first}
    total, most = sum(map(len, common.values())), sum(possible.values())
    assert total
    with watched(browser, f"{url}?id={synapse_id}&compare=other") as seen:
        page = seen.page
        shown(page)
        assert page.locator(".heads h2").all_inner_texts() == ["tiny", "other"]
        expect(page.locator(".said")).to_contain_text(f"{total} of {most} neighbours ({round(100 * total / most)} %)")
        for name, both in common.items():
            pair = page.locator(".pair").filter(has=page.get_by_role("heading", name=name, exact=True))
            assert pair.locator(".share").inner_text() == f"{len(both)} of {possible[name]} shared"
            for half, wanted in zip(pair.locator(".half").all(), (first, second), strict=True):
                found = half.locator(".neighbour").evaluate_all("all => all.map(each => each.dataset.id)")
                assert found == wanted[name]
                marked = half.locator(".shared").evaluate_all("all => all.map(each => each.dataset.id)")
                assert set(marked) == both
        page.get_by_label("Compare with").select_option("")
        assert ids(page) == first


def test_arrows_move_between_tiles_and_enter_searches(browser: Browser, url: str, truth: Truth):
    synapse_id = truth.ids[3]
    with watched(browser, f"{url}?id={synapse_id}") as seen:
        page = seen.page
        nearest = ids(page)
        classes = list(nearest)
        expect(page.locator(".answer button.tile[tabindex='0']")).to_have_count(1)
        page.locator(".answer button.tile[tabindex='0']").focus()

        def focused() -> str:
            return page.evaluate("document.activeElement.closest('.neighbour').dataset.id")

        assert focused() == nearest[classes[0]][0]
        page.keyboard.press("ArrowRight")
        assert focused() == nearest[classes[1]][0]
        page.keyboard.press("ArrowDown")
        assert focused() == nearest[classes[1]][1]
        page.keyboard.press("ArrowLeft")
        assert focused() == nearest[classes[0]][1]
        page.keyboard.press("Enter")
        asked = nearest[classes[0]][1]
        until(page, f"location.search.includes('{asked}')")
        assert ids(page) == truth.nearest(asked)
        assert focused() == next(iter(ids(page).values()))[0]  # the focus is still in the tiles


@pytest.mark.parametrize("dropped", [False, True])
def test_the_image_of_a_tile_finds_its_synapse(
    browser: Browser, url: str, explored: Dataset, truth: Truth, dropped: bool
):
    row = next(row for row in truth.rows if row["neurotransmitter"])
    png = open_tiles(explored).png(row["synapse_id"])
    with watched(browser, url) as seen:
        page = seen.page
        shown(page)
        if dropped:
            page.evaluate(
                """content => {
                    const bytes = Uint8Array.from(atob(content), each => each.charCodeAt());
                    const data = new DataTransfer();
                    data.items.add(new File([bytes], 'tile.png', {type: 'image/png'}));
                    for (const kind of ['dragover', 'drop'])
                        document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
                }""",
                base64.b64encode(png).decode(),
            )
        else:
            content = {"name": "tile.png", "mimeType": "image/png", "buffer": png}
            page.get_by_label("Image …").set_input_files(content)  # type: ignore[arg-type]
        # The server first imports torch.
        expect(page.get_by_role("heading", name="Your image")).to_be_visible(timeout=60_000)
        found, distances = shown(page)[row["neurotransmitter"]]
        assert found[0] == str(row["synapse_id"])
        assert distances[0] < 1e-3
        page.get_by_label("Metric").select_option("l2")
        until(page, "location.search.includes('l2')")
        assert ids(page)[row["neurotransmitter"]][0] == str(row["synapse_id"])  # the query is still the image
        page.get_by_label("Image …").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"no"})
        expect(page.get_by_role("alert")).to_contain_text("“a.txt” is not a PNG image")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("?id=999999999", "Synapse 999999999 is not in the index of tiny"),
        ("?id=nonsense", "is not a synapse id"),
        ("?encoder=nope", "“nope” is unknown: use one of tiny, other"),
        ("?compare=nope", "“nope” is unknown"),
        ("?dataset=../../etc", "“../../etc” is unknown"),
        ("?metric=hamming", "The metric “hamming” is unknown"),
        ("?per_class=-1", "per_class must be a whole number"),
        ("?region=<img src=x onerror=alert(1)>", "“<img src=x onerror=alert(1)>” is unknown"),
        ("?page=nope", "The page “nope” is unknown"),
        ("?page=map&colour=nope", "The map has no column “nope”"),
    ],
)
def test_a_bad_address_shows_a_sentence_and_a_link_back(browser: Browser, url: str, address: str, says: str):
    page = browser.new_page()
    page.goto(url + address)
    expect(page.get_by_role("alert")).to_contain_text(says)
    page.get_by_role("alert").get_by_role("link").click()
    expect(page.locator(".answer .neighbour").first).to_be_visible()
    page.close()


def test_the_map_shows_the_point_under_the_mouse_and_a_click_searches(browser: Browser, url: str, truth: Truth):
    with watched(browser, f"{url}?page=map") as seen:
        page = seen.page
        places = MapOnPage(page, truth)
        row = places.lonely()
        assert places.painted(row)
        right, down = places.places()[row]
        page.mouse.move(right + 1, down + 1)
        tip = page.locator(".tip")
        expect(tip.locator("strong")).to_have_text(truth.ids[row])
        expect(tip).to_contain_text(truth.rows[row]["region"])
        image = tip.get_by_role("presentation").or_(tip.locator("img"))
        expect(image.first).to_have_js_property("naturalWidth", 256)

        before = places.places()
        page.mouse.wheel(0, -400)
        until(page, lambda: np.ptp(places.places()) > 1.3 * np.ptp(before))
        places.wait_for(row, before[row])  # the point under the mouse stays
        page.mouse.down()
        page.mouse.move(right + 81, down + 41, steps=4)
        page.mouse.up()
        places.wait_for(row, before[row] + [80, 40])
        expect(page).to_have_url(f"{url}?page=map")  # a drag does not count as a click

        page.locator("canvas").press("0")
        places.wait_for(row, before[row])

        right, down = places.places()[row]
        page.mouse.click(right, down)
        expect(page.get_by_role("heading", name=truth.ids[row])).to_be_visible()
        assert ids(page) == truth.nearest(truth.ids[row])
        page.go_back()
        expect(page.locator("canvas")).to_be_visible()


def test_a_first_tap_shows_a_point_and_a_second_tap_searches(browser: Browser, url: str, truth: Truth):
    with watched(browser, f"{url}?page=map", **PHONE) as seen:
        places = MapOnPage(seen.page, truth)
        row = places.lonely()
        seen.page.touchscreen.tap(*places.places()[row])
        expect(seen.page.locator(".tip strong")).to_have_text(truth.ids[row])
        seen.page.touchscreen.tap(*places.places()[row])
        assert ids(seen.page) == truth.nearest(truth.ids[row])


def test_the_legend_hides_classes_and_the_lasso_exports_points_inside(browser: Browser, url: str, truth: Truth):
    known = [row["neurotransmitter"] for row in truth.rows]
    with watched(browser, f"{url}?page=map") as seen:
        page = seen.page
        places = MapOnPage(page, truth)
        row = places.lonely()
        hidden = known[row] or "unlabelled"
        legend = page.get_by_role("group", name="Legend")
        for name in {*known}:
            number = known.count(name)
            expect(legend.locator("li").filter(has_text=name or "unlabelled").locator(".count")).to_have_text(
                str(number)
            )
        swatches = legend.locator(".mark").evaluate_all("all => all.map(each => each.style.getPropertyValue('--mark'))")
        assert swatches[: len({*known} - {None})] == [
            PALETTE[place] for place, name in enumerate(truth_classes(page)) if name in known
        ]

        # A polygon around more than half of the points.
        spots = places.places()
        middle = np.median(spots, axis=0)
        radius = np.quantile(np.linalg.norm(spots - middle, axis=1), 0.6)
        turns = np.linspace(0, 2 * np.pi, 9)[:-1]
        corners = middle + radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        page.get_by_role("button", name="Lasso: draw").click()
        page.mouse.move(*corners[0])
        page.mouse.down()
        for corner in corners[1:]:
            page.mouse.move(*corner)
        page.mouse.up()
        inside = np.flatnonzero(Polygon(np.vstack([corners, corners[:1]])).contains_points(spots))
        assert 10 < len(inside) < len(spots)
        assert exported(page) == {(truth.ids[place], known[place] or "") for place in inside}

        legend.get_by_label(re.compile(hidden)).uncheck()
        until(page, "location.search.includes('off=')")
        until(page, lambda: not places.painted(row))
        visible = {place for place in inside if (known[place] or "unlabelled") != hidden}
        assert exported(page) == {(truth.ids[place], known[place] or "") for place in visible}
        page.get_by_role("button", name="Lasso: draw").click()
        page.mouse.move(*spots[row])
        page.wait_for_timeout(200)
        expect(page.locator(".tip")).to_be_hidden()

        with watched(browser, page.url) as theirs:  # the hidden class is in the address
            same = MapOnPage(theirs.page, truth)
            expect(theirs.page.get_by_label(re.compile(hidden)).first).not_to_be_checked()
            until(theirs.page, lambda: not same.painted(row))
        page.go_back()
        until(page, "!location.search.includes('off=')")
        page.get_by_role("button", name="Clear").click()
        until(page, lambda: places.painted(row))


def truth_classes(page: Page) -> list[str]:
    return page.evaluate("async () => (await (await fetch('api/datasets')).json()).datasets[0].classes")


def exported(page: Page) -> set[tuple[str, str]]:
    with page.expect_download() as download:
        page.get_by_role("button", name="Export CSV").click()
    rows = list(csv.reader(io.StringIO(download.value.path().read_text(), newline="")))
    assert rows[0] == ["synapse_id", "neurotransmitter"]
    assert page.locator(".selected strong").inner_text() == f"{len(rows) - 1} selected"
    assert len({tuple(row) for row in rows[1:]}) == len(rows) - 1
    return {(row[0], row[1]) for row in rows[1:]}


def test_the_map_colours_by_any_column(browser: Browser, url: str, truth: Truth):
    with watched(browser, f"{url}?page=map") as seen:
        page = seen.page
        MapOnPage(page, truth)
        page.get_by_label("Colour by").select_option("region")
        regions = {row["region"] for row in truth.rows}
        expect(page.locator(".legend li")).to_have_count(len(regions))
        page.get_by_label("Colour by").select_option("predicted_probability")
        shares = [row["predicted_probability"] for row in truth.rows]
        expect(page.locator(".legend .ends")).to_contain_text(f"{min(shares):.4g}")
        expect(page.locator(".legend .ends")).to_contain_text(f"{max(shares):.4g}")
        page.go_back()
        expect(page.get_by_label("Colour by")).to_have_value("region")
        page.get_by_role("combobox", name="Encoder").select_option("other")
        MapOnPage(page, truth)
        page.get_by_role("link", name="Similarity search").click()
        shown(page)
        expect(page.get_by_role("combobox", name="Encoder")).to_have_value("other")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("address", ["?id={id}", "?id={id}&compare=other&tiles=strip", "?page=map"])
def test_every_control_has_a_name_text_has_contrast_and_a_phone_need_not_scroll_sideways(
    browser: Browser, url: str, truth: Truth, address: str, scheme: str
):
    with watched(browser, url + address.format(id=truth.ids[0]), color_scheme=scheme, **PHONE) as seen:
        page = seen.page
        if "map" in address:
            MapOnPage(page, truth)
        else:
            shown(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert nameless(page) == []
        assert {pair: round(each, 2) for pair, each in page.evaluate(CONTRASTS).items() if each < 4.5} == {}
        page.set_viewport_size({"width": 1280, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_nothing_moves_when_tiles_arrive(browser: Browser, url: str, truth: Truth):
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        page.route("**/tiles/*.png", lambda route: None)  # tiles never arrive
        page.goto(f"{url}?id={truth.ids[0]}")
        shown(page)
        frames = "[...document.querySelectorAll('.tile, .query .picture')]"
        layout = f"{frames}.map(each => JSON.stringify(each.getBoundingClientRect()))"
        empty = page.evaluate(layout)
        page.unroute_all(behavior="ignoreErrors")
        page.goto(f"{url}?id={truth.ids[0]}")
        shown(page)
        until(page, "[...document.querySelectorAll('.query img')].every(each => each.complete)")
        assert page.evaluate(layout) == empty
