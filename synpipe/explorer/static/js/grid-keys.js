// Arrow keys move between tiles according to their positions on the screen, in any layout. One tile is in the tab order.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
// How much more a sideways distance costs than a distance in the direction of the key.
const SIDEWAYS_COST = 4;

/** Makes the elements that match `selector` below `container` a single stop of the tab order (roving tabindex). */
export function arrowKeys(container, selector) {
  const all = () => [...container.querySelectorAll(selector)];
  const current = () => container.querySelector(`${selector}[tabindex="0"]`);
  const makeCurrent = (element) => {
    for (const each of all()) each.tabIndex = each === element ? 0 : -1;
  };
  container.addEventListener("focusin", (event) => {
    const element = event.target.closest(selector);
    if (element && element.tabIndex !== 0) makeCurrent(element);
  });
  container.addEventListener("keydown", (event) => {
    const from = event.target.closest(selector);
    if (!from || event.altKey || event.ctrlKey || event.metaKey) return;
    const tiles = all();
    let to = null;
    if (event.key === "Home") to = tiles[0];
    else if (event.key === "End") to = tiles.at(-1);
    else if (ARROWS[event.key]) to = nearest(from, tiles, ARROWS[event.key]);
    else return;
    event.preventDefault();
    if (!to) return;
    makeCurrent(to);
    to.focus({ preventScroll: true });
    to.scrollIntoView({ block: "nearest" });
  });
  return {
    /** Call this after the tiles have changed. takeFocus: whether the focus was on a tile that has been removed. */
    refresh(takeFocus) {
      const first = all()[0];
      if (first) makeCurrent(first);
      if (takeFocus) current()?.focus({ preventScroll: true });
    },
  };
}

function nearest(from, tiles, [right, down]) {
  const here = centre(from);
  let best = null;
  let bestCost = Infinity;
  for (const tile of tiles) {
    const there = centre(tile);
    const [x, y] = [there.x - here.x, there.y - here.y];
    const ahead = right * x + down * y;
    const aside = Math.abs(right ? y : x);
    if (tile === from || ahead <= 1 || aside > ahead * SIDEWAYS_COST) continue;
    const cost = ahead + SIDEWAYS_COST * aside;
    if (cost < bestCost) [best, bestCost] = [tile, cost];
  }
  return best;
}

function centre(element) {
  const { left, top, width, height } = element.getBoundingClientRect();
  return { x: left + width / 2, y: top + height / 2 };
}
