// Draws the points of the map with three.js (WebGL 2), directly from the typed arrays of the map file.
//
// Each point has a code (uint16), and a texture contains the look of each code. A change of the legend therefore uploads one small
// texture, a change of the column two bytes per point, and panning, zooming and hovering upload nothing.

import {
  BufferAttribute,
  BufferGeometry,
  DataTexture,
  OrthographicCamera,
  Points,
  RawShaderMaterial,
  Scene,
  WebGLRenderer,
} from "../vendor/three.js";
import { SourceError } from "./errors.js";

export const NONE = 65535; // the code of a missing value
const LOOKS_SIDE = 256; // side of the texture, which has a texel for each of 65,536 codes
const HIDDEN = 0;
const SHAPE_CODES = { circle: 1, triangle: 2, square: 3 };
const FADED = 0.12; // opacity of points that are not selected

// While the view moves, only a random part of the points is drawn, as many as the machine can draw in time. At rest, all points are
// drawn.
const SLOW_MS = 40;
const FAST_MS = 24;
const MIN_POINTS = 20_000;
const REST_MS = 250;

const VERTEX = `
precision highp float;
in float x; in float y; in float code; in float chosen;
uniform vec2 centre, scale;
uniform float size, opacity, faded;
uniform sampler2D looks;
out vec4 colour;
flat out int shape;
void main() {
  int each = int(code + 0.5);
  vec4 look = texelFetch(looks, ivec2(each & 255, each >> 8), 0);
  shape = int(look.a * 255.0 + 0.5);
  bool none = each == ${NONE};
  colour = vec4(look.rgb, opacity * (chosen > 0.5 ? 1.0 : faded));
  // Points without a value are behind the others. Hidden points are outside the view.
  gl_Position = shape == ${HIDDEN} ? vec4(2.0, 2.0, 2.0, 1.0) : vec4((vec2(x, y) - centre) * scale, none ? 0.5 : 0.0, 1.0);
  gl_PointSize = size;
}`;
const FRAGMENT = `
precision highp float;
in vec4 colour;
flat in int shape;
uniform float size;
out vec4 drawn;
void main() {
  vec2 at = gl_PointCoord * 2.0 - 1.0;
  float inside = shape == ${SHAPE_CODES.circle} ? 1.0 - length(at)
    : shape == ${SHAPE_CODES.triangle} ? min(0.9 - at.y, (at.y + 1.0) * 0.55 - abs(at.x) + 0.1)
    : 0.85 - max(abs(at.x), abs(at.y));
  float alpha = colour.a * (size < 3.0 ? 1.0 : clamp(inside * size * 0.5, 0.0, 1.0));
  if (alpha < 0.02) discard;
  drawn = vec4(colour.rgb * alpha, alpha);
}`;

/** Draws the map. Its `view` is {x, y, scale}: the map position in the middle, and the CSS pixels per unit of the map. */
export class PointsView {
  /** Throws `SourceError` if the browser has no WebGL 2. */
  constructor(canvas) {
    this.canvas = canvas;
    try {
      this.renderer = new WebGLRenderer({ canvas, alpha: true, antialias: false, depth: true, powerPreference: "high-performance" });
    } catch {
      throw new SourceError("The map needs WebGL 2, which this browser does not offer. Switch on hardware acceleration, or use another browser.");
    }
    this.renderer.setClearColor(0, 0);
    this.renderer.sortObjects = false;
    this.looks = new DataTexture(new Uint8Array(LOOKS_SIDE * LOOKS_SIDE * 4), LOOKS_SIDE, LOOKS_SIDE);
    this.uniforms = {
      centre: { value: [0, 0] },
      scale: { value: [1, 1] },
      size: { value: 4 },
      opacity: { value: 1 },
      faded: { value: 1 },
      looks: { value: this.looks },
    };
    this.material = new RawShaderMaterial({
      vertexShader: VERTEX,
      fragmentShader: FRAGMENT,
      uniforms: this.uniforms,
      glslVersion: "300 es",
      transparent: true,
      premultipliedAlpha: true,
    });
    this.scene = new Scene();
    this.camera = new OrthographicCamera(); // three.js requires a camera, but the shader does not use it
    this.view = { x: 0, y: 0, scale: 1 };
    this.frame = 0;
    this.moving = { now: false, held: false, part: Infinity, most: Infinity, last: 0, timer: 0 };
    this.onview = () => {};
  }

  /** x, y: float32 (n). The arrays are used without copying. */
  setPoints(x, y) {
    this.scene.clear();
    this.geometry?.dispose();
    [this.x, this.y] = [x, y];
    this.bounds = boundsOf(x, y);
    this.geometry = new BufferGeometry();
    this.geometry.setAttribute("x", new BufferAttribute(x, 1));
    this.geometry.setAttribute("y", new BufferAttribute(y, 1));
    this.geometry.setAttribute("code", new BufferAttribute(new Uint16Array(x.length), 1));
    this.geometry.setAttribute("chosen", new BufferAttribute(new Uint8Array(x.length).fill(1), 1));
    this.geometry.setIndex(new BufferAttribute(shuffled(x.length), 1));
    const points = new Points(this.geometry, this.material);
    points.frustumCulled = false;
    this.scene.add(points);
    this.fit();
  }

  /** codes: uint16 (n). */
  setCodes(codes) {
    const attribute = this.geometry.getAttribute("code");
    attribute.array = codes;
    attribute.needsUpdate = true;
    this.draw();
  }

  /** codes: all codes in use. look(code): {rgb, shape} of a visible code, null for a hidden one. */
  setLooks(codes, look) {
    const texels = this.looks.image.data.fill(HIDDEN);
    for (const code of codes) {
      const { rgb, shape } = look(code) ?? {};
      if (rgb) texels.set([...rgb, SHAPE_CODES[shape]], 4 * code);
    }
    this.looks.needsUpdate = true;
    this.draw();
  }

  /** Fades all points except these rows; null shows all points alike. */
  setChosen(rows) {
    const attribute = this.geometry.getAttribute("chosen");
    attribute.array.fill(rows ? 0 : 1);
    for (const row of rows ?? []) attribute.array[row] = 1;
    attribute.needsUpdate = true;
    this.uniforms.faded.value = rows ? FADED : 1;
    this.draw();
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas.parentElement;
    if (!width || !height) return;
    const first = !this.width;
    [this.width, this.height] = [width, height];
    this.renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
    this.renderer.setSize(width, height, false);
    if (first && this.bounds) this.fit();
    this.draw(true);
  }

  /** Zooms so that all points are visible. */
  fit() {
    if (!this.width) return;
    const { left, right, low, high } = this.bounds;
    const scale = 0.92 * Math.min(this.width / (right - left || 1), this.height / (high - low || 1));
    this.look({ x: (left + right) / 2, y: (low + high) / 2, scale });
    this.fitted = scale;
  }

  look(view) {
    this.view = view;
    this.moving.now = true;
    this.settle();
    this.draw();
  }

  /** Whether a button or a finger is down. The map then counts as moving, even without movement. */
  hold(held) {
    this.moving.held = held;
    this.settle();
  }

  /** Draws all points again when the view has been at rest for a while. */
  settle() {
    clearTimeout(this.moving.timer);
    if (this.moving.held || !this.moving.now) return;
    this.moving.timer = setTimeout(() => {
      Object.assign(this.moving, { now: false, last: 0 });
      this.draw();
    }, REST_MS);
  }

  /** How many points the next frame draws. time: of this frame, in milliseconds. */
  budget(time) {
    const { moving } = this;
    const all = this.x.length;
    if (!moving.now) return all;
    const took = moving.last ? time - moving.last : 0;
    moving.last = time;
    if (took > SLOW_MS) {
      // A number of points that was too slow is not tried again at once.
      moving.most = Math.min(moving.part, all);
      moving.part = Math.max(moving.most / 2, MIN_POINTS);
    } else if (took && took < FAST_MS) {
      moving.most *= 1.01;
      moving.part = Math.min(moving.part * 1.1, 0.8 * moving.most);
    }
    return Math.min(Math.round(moving.part), all);
  }

  /** Zooms by a factor about a position on the canvas, in CSS pixels. */
  zoom(factor, at = [this.width / 2, this.height / 2]) {
    const scale = Math.min(Math.max(this.view.scale * factor, this.fitted / 4), this.fitted * 2000);
    const [x, y] = this.toMap(at);
    const [right, down] = [at[0] - this.width / 2, at[1] - this.height / 2];
    this.look({ x: x - right / scale, y: y + down / scale, scale });
  }

  pan(right, down) {
    const { x, y, scale } = this.view;
    this.look({ x: x - right / scale, y: y + down / scale, scale });
  }

  toMap([right, down]) {
    const { x, y, scale } = this.view;
    return [x + (right - this.width / 2) / scale, y - (down - this.height / 2) / scale];
  }

  toCanvas([x, y]) {
    return [this.width / 2 + (x - this.view.x) * this.view.scale, this.height / 2 - (y - this.view.y) * this.view.scale];
  }

  /** The diameter of a point in CSS pixels. It depends on the number of points and grows slowly when the user zooms in. */
  get pointPx() {
    const alone = Math.min(Math.max(40 / this.x.length ** 0.26, 1), 8);
    return Math.min(Math.max(alone * Math.sqrt(Math.max(this.view.scale / this.fitted, 1)), 1), 14);
  }

  /** Draws at the next frame. Several calls before that frame draw once. */
  draw(now = false) {
    if (!this.geometry || !this.width) return;
    if (now) {
      cancelAnimationFrame(this.frame);
      this.render(performance.now());
    } else this.frame ||= requestAnimationFrame((now) => this.render(now));
  }

  render(now) {
    this.frame = 0;
    this.geometry.setDrawRange(0, this.budget(now));
    const { x, y, scale } = this.view;
    this.uniforms.centre.value = [x, y];
    this.uniforms.scale.value = [(2 * scale) / this.width, (2 * scale) / this.height];
    this.uniforms.size.value = this.pointPx * this.renderer.getPixelRatio();
    this.uniforms.opacity.value = this.x.length > 50_000 ? 0.75 : 0.9;
    this.renderer.render(this.scene, this.camera);
    this.onview(this.view);
  }
}

/** Rows 0 … n−1 in random order (Fisher–Yates), so that the order of the table does not decide which class covers another. */
function shuffled(n) {
  const order = Uint32Array.from({ length: n }, (_, row) => row);
  for (let last = n - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [order[last], order[other]] = [order[other], order[last]];
  }
  return order;
}

function boundsOf(x, y) {
  const bounds = { left: Infinity, right: -Infinity, low: Infinity, high: -Infinity };
  for (let row = 0; row < x.length; row++) {
    bounds.left = Math.min(bounds.left, x[row]);
    bounds.right = Math.max(bounds.right, x[row]);
    bounds.low = Math.min(bounds.low, y[row]);
    bounds.high = Math.max(bounds.high, y[row]);
  }
  return bounds;
}
