// What a run changes in the model: the circuit's ablations, and those of the person at the page.

/** What running a circuit takes, from the page's data. */
async function openCircuit(live, means) {
  const [own, constants] = await Promise.all([unpackArrays(live), unpackArrays(means)]);
  return { own, means: constants, cut: null };
}

/** A node's or an edge's end from its name, "0.attn.q.17". */
function place(name) {
  const [layer, part, kind, channel] = name.split('.');
  return { layer: +layer, location: `${part}.${kind}`, channel: +channel };
}

/** The bias beside a kernel, to be written to: zeros where the model has none. */
function biasOf(model, path, width) {
  const given = model.arrays[path.replace(/kernel$/, 'bias')];
  return given ? given.slice() : new Float32Array(model.config.n_layer * width);
}

/** The mean of what each row of a kernel multiplies; heads mix values before they are written. */
const carried = (circuit, source) => circuit.means[source === 'attn.v' ? 'attn.y' : source];

/** Weights and biases by path with the edges cut that the circuit lacks: what they carry becomes its mean. */
function cutEdges(model, circuit) {
  const found = { weights: {}, biases: {} };
  for (const [source, target, path] of model.connections) {
    const [inputs, outputs] = [model.widths[source], model.widths[target]];
    const { starts, columns, values } = model.matrices[path];
    const removed = circuit.own[`removed:${path}`];
    const mean = carried(circuit, source);
    const weights = values.slice();
    const sums = Float64Array.from(biasOf(model, path, outputs));
    for (let row = 0; row + 1 < starts.length; row += 1) {
      const offset = Math.floor(row / inputs) * outputs;
      for (let at = starts[row]; at < starts[row + 1]; at += 1) {
        if (bitAt(removed, at)) {
          sums[offset + columns[at]] += values[at] * mean[row];
          weights[at] = 0;
        }
      }
    }
    found.weights[path] = weights;
    found.biases[path] = Float32Array.from(sums);
  }
  return found;
}

/** Changes one weight: to zero, to a value, or to its mean, so that it carries the mean of its source. */
function editEdge(model, circuit, run, { edge, mode, value }) {
  const [from, to] = edge.split('>').map(place);
  const [source, target, path] = model.connections.find(([a, b]) => a === from.location && b === to.location);
  const [inputs, outputs] = [model.widths[source], model.widths[target]];
  const { starts, columns, values } = model.matrices[path];
  const row = from.layer * inputs + from.channel;
  let at = starts[row];
  while (at < starts[row + 1] && columns[at] !== to.channel) at += 1;
  if (at === starts[row + 1]) return;
  const weights = (run.weights[path] ?? values).slice();
  if (mode === 'mean') {
    const bias = (run.biases[path] ?? biasOf(model, path, outputs)).slice();
    bias[from.layer * outputs + to.channel] += weights[at] * carried(circuit, source)[row];
    run.biases[path] = bias;
  }
  weights[at] = mode === 'set' ? value : 0;
  run.weights[path] = weights;
}

/**
 * What `forward` runs with: the whole "model" or the "circuit" alone, and edits to either.
 *
 * An edit names a `node` or an `edge`, a `mode` ("mean", "zero" or "set") and the `value` that is set.
 */
function plan(model, circuit, side, edits) {
  const alone = side === 'circuit';
  if (alone) circuit.cut ??= cutEdges(model, circuit);
  const run = alone ? { weights: { ...circuit.cut.weights }, biases: { ...circuit.cut.biases } } : { weights: {}, biases: {} };
  const held = new Map();
  for (const edit of edits) {
    if (edit.edge) {
      editEdge(model, circuit, run, edit);
      continue;
    }
    const { layer, location, channel } = place(edit.node);
    const mean = circuit.means[location][layer * model.widths[location] + channel];
    const key = `${layer}.${location}`;
    held.set(key, [...(held.get(key) ?? []), [channel, { mean, zero: 0, set: edit.value }[edit.mode]]]);
  }
  run.hold = (location, layer, x, width, rows) => {
    const closed = alone ? circuit.own[`closed:${location}`] : null;
    const means = circuit.means[location];
    const keep = (channel, value) => {
      for (let t = 0; t < rows; t += 1) x[t * width + channel] = value;
    };
    for (let channel = 0; closed && channel < width; channel += 1) {
      if (bitAt(closed, layer * width + channel)) keep(channel, means[layer * width + channel]);
    }
    for (const [channel, value] of held.get(`${layer}.${location}`) ?? []) keep(channel, value);
  };
  return run;
}
