// Mouse, touch and keyboard on the map. Dragging or one finger pans (or draws the lasso), the wheel or two fingers zoom, and a click
// or a tap picks a point. Arrow keys, +, − and 0 pan and zoom from the keyboard.

const CLICK_PX = 4;
const KEY_PAN_PX = 60;
const KEY_ZOOM = 1.4;
const WHEEL_LINE_PX = 16;

/**
 * on: {lassoing(), lasso(path, done), hover(at), leave(), pick(at, isTouch)}. Positions are CSS pixels of the canvas.
 * view: a `PointsView`.
 */
export function listen(canvas, view, on) {
  const pointers = new Map();
  let path = null; // the lasso while it is drawn
  let start = null;
  let moved = false;
  const place = (event) => {
    const { left, top } = canvas.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    view.hold(true);
    if (pointers.size > 1) {
      path = null;
      moved = true;
      return;
    }
    [start, moved] = [place(event), false];
    path = on.lassoing() || event.shiftKey ? [start] : null;
  });

  canvas.addEventListener("pointermove", (event) => {
    const at = place(event);
    const before = pointers.get(event.pointerId);
    if (!before) {
      on.hover(at);
      return;
    }
    if (!moved && Math.hypot(at[0] - start[0], at[1] - start[1]) < CLICK_PX) return;
    if (!moved) on.leave();
    moved = true;
    if (pointers.size === 2) pinch(event.pointerId, before, at);
    else if (path) {
      path.push(at);
      on.lasso(path, false);
    } else view.pan(at[0] - before[0], at[1] - before[1]);
    pointers.set(event.pointerId, at);
  });

  function pinch(pointer, before, at) {
    const [, other] = [...pointers].find(([each]) => each !== pointer);
    const distance = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
    const middle = (point) => [(point[0] + other[0]) / 2, (point[1] + other[1]) / 2];
    const [from, to] = [middle(before), middle(at)];
    view.pan(to[0] - from[0], to[1] - from[1]);
    view.zoom(distance(at) / distance(before), to);
  }

  function end(event) {
    if (!pointers.delete(event.pointerId) || pointers.size) return;
    view.hold(false);
    if (path && moved) on.lasso(path, true);
    else if (!moved && event.type === "pointerup") on.pick(place(event), event.pointerType !== "mouse");
    path = null;
  }
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  // A finger leaves the canvas whenever it is lifted, and the picked point must stay. So only a mouse can leave.
  canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && !pointers.size && on.leave());

  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const pixels = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? WHEEL_LINE_PX : 1);
      on.leave();
      view.zoom(Math.exp(-Math.max(-200, Math.min(200, pixels)) * 0.002), place(event));
    },
    { passive: false },
  );

  const keys = {
    ArrowLeft: () => view.pan(KEY_PAN_PX, 0),
    ArrowRight: () => view.pan(-KEY_PAN_PX, 0),
    ArrowUp: () => view.pan(0, KEY_PAN_PX),
    ArrowDown: () => view.pan(0, -KEY_PAN_PX),
    "+": () => view.zoom(KEY_ZOOM),
    "=": () => view.zoom(KEY_ZOOM),
    "-": () => view.zoom(1 / KEY_ZOOM),
    0: () => view.fit(),
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    on.leave();
    keys[event.key]();
  });
}
