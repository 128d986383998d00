// A worker that builds the spatial index of the map's points. A million points take a second.
// Input: {x, y}, float32. Output: the data of a KDBush index.

import KDBush from "../vendor/kdbush.js";

onmessage = ({ data: { x, y } }) => {
  const index = new KDBush(x.length, 64, Float32Array);
  for (let row = 0; row < x.length; row++) index.add(x[row], y[row]);
  index.finish();
  postMessage(index.data, [index.data]);
};
