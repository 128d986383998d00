// Finds the nearest rows of each class among quantised vectors. The search is exact.
//
// Row i is centre[i] * mean + scale[i] * codes[i] and has unit length (synpipe/explorer/quantised.py); norm[i] is the length of the
// encoder's vector. The codes stay bytes, because a sum over bytes is as fast as over floats and needs a quarter of the memory.

/**
 * vectors: {codes: Int8Array (n * d), mean (d), scale (n), centre (n), norm (n)}. query: a row. starts: the first row of each
 * class, followed by n. keep(row): whether a row may be a neighbour. Returns [{row, distance}, …] for each class.
 */
export function nearestByClass(vectors, { query, metric, perClass, starts, keep }) {
  const distance = distanceTo(vectors, query, metric);
  return starts.slice(0, -1).map((start, number) => nearest(start, starts[number + 1], perClass, keep, distance));
}

function nearest(start, stop, count, keep, distance) {
  const found = [];
  for (let row = start; row < stop; row++) {
    if (!keep(row)) continue;
    const here = distance(row);
    if (found.length === count && here >= found[count - 1].distance) continue;
    let place = Math.min(found.length, count - 1);
    for (; place > 0 && found[place - 1].distance > here; place--) found[place] = found[place - 1];
    found[place] = { row, distance: here };
  }
  return found;
}

function distanceTo({ codes, mean, scale, centre, norm }, query, metric) {
  const dimensions = mean.length;
  const direction = new Float64Array(dimensions);
  let alongMean = 0;
  for (let at = 0; at < dimensions; at++) {
    direction[at] = centre[query] * mean[at] + scale[query] * codes[query * dimensions + at];
    alongMean += mean[at] * direction[at];
  }
  const length = norm[query];
  const similarity = (row) => centre[row] * alongMean + scale[row] * dot(codes, row * dimensions, direction);
  const withLengths = (row) => norm[row] * length * similarity(row);
  switch (metric) {
    case "cosine":
      return (row) => 1 - similarity(row);
    case "dot":
      return (row) => -withLengths(row);
    case "l2":
      return (row) => Math.sqrt(Math.max(0, norm[row] ** 2 + length ** 2 - 2 * withLengths(row)));
    case "l1": {
      const vector = direction.map((value) => value * length);
      return (row) =>
        manhattan(codes, row * dimensions, norm[row] * scale[row], mean, norm[row] * centre[row], vector);
    }
  }
}

// Four independent sums, so that an addition does not wait for the previous one.
function dot(codes, from, vector) {
  const whole = vector.length & ~3;
  let a = 0;
  let b = 0;
  let c = 0;
  let d = 0;
  let at = 0;
  for (; at < whole; at += 4) {
    a += codes[from + at] * vector[at];
    b += codes[from + at + 1] * vector[at + 1];
    c += codes[from + at + 2] * vector[at + 2];
    d += codes[from + at + 3] * vector[at + 3];
  }
  for (; at < vector.length; at++) a += codes[from + at] * vector[at];
  return a + b + c + d;
}

function manhattan(codes, from, scale, mean, centre, vector) {
  const whole = vector.length & ~1;
  let a = 0;
  let b = 0;
  for (let at = 0; at < whole; at += 2) {
    a += Math.abs(codes[from + at] * scale + mean[at] * centre - vector[at]);
    b += Math.abs(codes[from + at + 1] * scale + mean[at + 1] * centre - vector[at + 1]);
  }
  if (whole < vector.length) a += Math.abs(codes[from + whole] * scale + mean[whole] * centre - vector[whole]);
  return a + b;
}
