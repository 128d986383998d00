// Measures how far two encoders agree about the neighbours of one synapse.

/**
 * first, second: the groups of two answers to the same query. Returns, for each class and in total, how many neighbours are shared
 * and how many could be (the length of the longer list); and the ids of the shared neighbours.
 */
export function overlap(first, second) {
  const others = new Map(second.map(({ name, neighbours }) => [name, neighbours.map(({ id }) => id)]));
  const byClass = new Map();
  const shared = new Set();
  let sharedCount = 0;
  let of = 0;
  for (const { name, neighbours } of first) {
    const theirs = new Set(others.get(name) ?? []);
    const both = neighbours.map(({ id }) => id).filter((id) => theirs.has(id));
    const possible = Math.max(neighbours.length, theirs.size);
    byClass.set(name, { shared: both.length, of: possible });
    for (const id of both) shared.add(id);
    sharedCount += both.length;
    of += possible;
  }
  return { shared: sharedCount, of, byClass, ids: shared };
}
