// The points of the map, drawn by three.js (WebGL 2) straight from the typed arrays in which they came.
//
// A point has a code (uint16); a texture says for each code how it looks. So another legend costs one small texture, another
// column two bytes a point, and panning, zooming and hovering cost no upload at all.

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

export const NONE = 65535; // the code of what has no value
const LOOKS_SIDE = 256; // of the texture, a texel for each of 65,536 codes
const HIDDEN = 0;
const SHAPE_CODES = { circle: 1, triangle: 2, square: 3 };
const FADED = 0.12; // opacity of what is not selected

// While the view moves, as many points are drawn as the machine draws in time, a random part of all; at rest, all of them.
const SLOW_MS = 40;
const FAST_MS = 24;
const FEWEST = 20_000;
const REST_MS = 160;

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
  // What has no value lies behind; what is hidden lies outside.
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

/** The view: `x`, `y` the place in the middle; `scale` in CSS pixels per unit of the map. */
export class PointsView {
  /** Throws `SourceError` where there is no WebGL 2. */
  constructor(canvas) {
    this.canvas = canvas;
    try {
      this.renderer = new WebGLRenderer({ canvas, alpha: true, antialias: false, depth: true, powerPreference: "high-performance" });
    } catch {
      throw new SourceError("This browser offers no WebGL 2, with which the map is drawn: switch on hardware acceleration, or use another browser.");
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
    this.camera = new OrthographicCamera(); // three.js wants one; the shader has its own
    this.view = { x: 0, y: 0, scale: 1 };
    this.frame = 0;
    this.moving = { part: Infinity, last: 0, timer: 0 };
    this.onview = () => {};
  }

  /** x, y: float32 (n). The arrays are used as they are. */
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

  /** look(code) gives {rgb, shape} for a code that is shown, null for one that is hidden; codes: those that there are. */
  setLooks(codes, look) {
    const texels = this.looks.image.data.fill(HIDDEN);
    for (const code of codes) {
      const { rgb, shape } = look(code) ?? {};
      if (rgb) texels.set([...rgb, SHAPE_CODES[shape]], 4 * code);
    }
    this.looks.needsUpdate = true;
    this.draw();
  }

  /** Make all others faint. rows: of the points chosen, or null for all of them alike. */
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

  /** Show all points. */
  fit() {
    if (!this.width) return;
    const { left, right, low, high } = this.bounds;
    const scale = 0.92 * Math.min(this.width / (right - left || 1), this.height / (high - low || 1));
    this.look({ x: (left + right) / 2, y: (low + high) / 2, scale });
    this.fitted = scale;
  }

  look(view) {
    this.view = view;
    clearTimeout(this.moving.timer);
    this.moving.timer = setTimeout(() => {
      this.moving.timer = this.moving.last = 0;
      this.draw();
    }, REST_MS);
    this.draw();
  }

  /** How many points the next frame draws. now: its time in milliseconds. */
  budget(now) {
    const { moving } = this;
    const all = this.x.length;
    if (!moving.timer) return all;
    const took = moving.last ? now - moving.last : 0;
    moving.last = now;
    if (took > SLOW_MS) moving.part = Math.max(Math.min(moving.part, all) / 2, FEWEST);
    else if (took && took < FAST_MS) moving.part = Math.min(moving.part * 1.25, all);
    return Math.min(Math.round(moving.part), all);
  }

  /** Zoom by a factor about a place of the canvas (CSS pixels). */
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

  /** Diameter of a point in CSS pixels: by how many there are, growing slowly as one comes nearer. */
  get pointPx() {
    const alone = Math.min(Math.max(40 / this.x.length ** 0.26, 1), 8);
    return Math.min(Math.max(alone * Math.sqrt(Math.max(this.view.scale / this.fitted, 1)), 1), 14);
  }

  /** Draw at the next frame; once a frame, however often it is asked for. */
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

/** Rows 0 … n−1 in a random order (Fisher and Yates), so that no class lies over another because of its place in the table. */
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
