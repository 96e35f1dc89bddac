// The forward pass: `wsparse.model.forward` of one sequence, with nodes held at values, as `wsparse.circuits` does it.

// The site of AbsTopK that acts on the residual stream after each part of a block.
const AFTER = { attn: 'resid_post_attn', mlp: 'resid_post_mlp' };
const POSITIONS = { concat: 'embed/positions', concat_sinusoid: 'embed/sinusoids' };

/** The model from the page's data: its arrays, its matrices by path. */
async function openModel(live) {
  const arrays = await unpackArrays(live);
  const paths = live.arrays.map(([name]) => name).filter((name) => name.endsWith(':counts')).map((name) => name.slice(0, -7));
  const matrices = Object.fromEntries(paths.map((path) => [path, sparseMatrix(arrays, path)]));
  const { config } = live;
  const widths = {
    'attn.act_in': config.read_width, 'mlp.act_in': config.read_width, 'mlp.post_act': config.d_mlp,
    'attn.resid_delta': config.d_model, 'mlp.resid_delta': config.d_model,
  };
  for (const name of ['attn.q', 'attn.k', 'attn.v', 'attn.y']) widths[name] = config.n_head * config.d_head;
  return { config, arrays, matrices, widths, sites: live.sites, connections: live.connections };
}

/** How many channels AbsTopK keeps at a site: all where it does not act. */
function kept(config, site, width) {
  const { abs_top_k_fraction: fraction, abs_top_k_sites: sites } = config;
  return fraction === null || !sites.includes(site) ? width : Math.floor(fraction * width);
}

/** A layer's part of a parameter that has no matrix; null where the model has none. */
function vector(model, path, layer, width) {
  const all = model.arrays[path];
  return all ? all.subarray(layer * width, (layer + 1) * width) : null;
}

const normOf = (model, path, layer, width) => ({
  layer: model.config.norm === 'layer', eps: model.config.eps,
  gain: vector(model, `${path}/gain`, layer, width), bias: vector(model, `${path}/bias`, layer, width),
});

/**
 * Runs the model on tokens; returns the logits, a row for each token, or of the last token alone.
 *
 * `run` has what differs from the model: `weights` and `biases` by path (see `plan`), and `hold`, called with
 * a location, a layer, and the values of its nodes, which it may change. `seen` is called with them afterwards;
 * `wants` names heads, "layer.head", whose patterns it is called with.
 */
function forward(model, run, tokens, { seen = null, wants = null, lastOnly = false } = {}) {
  const { config } = model;
  const rows = tokens.length;
  const state = { model, run, rows, seen, wants, scratch: new Float32Array(Math.max(...Object.values(model.widths))) };
  let x = embed(model, tokens);
  const table = POSITIONS[config.position] ? model.arrays[POSITIONS[config.position]] : null;
  for (let layer = 0; layer < config.n_layer; layer += 1) {
    const first = lastOnly && layer === config.n_layer - 1 ? rows - 1 : 0;
    const attention = site(state, 'attn.act_in', layer, read(state, 'attn', layer, x, table, 0), 0);
    add(state, x, attentionPart(state, layer, attention, first), 'attn', first);
    const mlp = site(state, 'mlp.act_in', layer, read(state, 'mlp', layer, x, table, first), first);
    add(state, x, mlpPart(state, layer, mlp, first), 'mlp', first);
  }
  return unembed(model, tokens, x, lastOnly ? rows - 1 : 0);
}

function embed(model, tokens) {
  const { config, matrices, arrays } = model;
  const { starts, columns, values } = matrices['embed/tokens'];
  const x = new Float32Array(tokens.length * config.d_model);
  tokens.forEach((token, t) => {
    for (let at = starts[token]; at < starts[token + 1]; at += 1) x[t * config.d_model + columns[at]] = values[at];
  });
  if (config.position === 'added') {
    const table = arrays['embed/positions'];
    for (let i = 0; i < x.length; i += 1) x[i] += table[i];
  }
  return x;
}

/** What a part of a block reads: the normed stream, and the normed positions beside it. */
function read({ model, rows }, part, layer, x, table, first) {
  const { d_model: width, read_width: stride, d_pos: more } = model.config;
  const into = new Float32Array(rows * stride);
  normalize(x, rows, width, first, normOf(model, `blocks/${part}_norm`, layer, width), into, stride, 0);
  if (table) normalize(table, rows, more, first, normOf(model, `blocks/${part}_pos_norm`, layer, more), into, stride, width);
  return into;
}

/** The value of a location after AbsTopK and whatever the run holds. */
function site({ model, run, rows, seen, scratch }, location, layer, x, first) {
  const width = model.widths[location];
  const k = kept(model.config, model.sites[location] ?? null, width);
  for (let t = first; t < rows; t += 1) keepLargest(x, t * width, width, k, scratch);
  run.hold?.(location, layer, x, width, rows);
  seen?.(location, layer, x);
  return x;
}

function linear({ model, run, rows }, path, layer, x, inputs, outputs, first) {
  const { starts, columns } = model.matrices[path];
  const values = run.weights[path] ?? model.matrices[path].values;
  const bias = run.biases[path] ?? model.arrays[path.replace(/kernel$/, 'bias')];
  const y = new Float32Array(rows * outputs);
  const sums = new Float64Array(outputs);
  for (let t = first; t < rows; t += 1) {
    sums.fill(0);
    for (let i = 0; i < inputs; i += 1) {
      const value = x[t * inputs + i];
      if (value === 0) continue;
      const row = layer * inputs + i;
      for (let at = starts[row]; at < starts[row + 1]; at += 1) sums[columns[at]] += value * values[at];
    }
    for (let o = 0; o < outputs; o += 1) y[t * outputs + o] = sums[o] + (bias ? bias[layer * outputs + o] : 0);
  }
  return y;
}

function attentionPart(state, layer, input, first) {
  const { model, rows, wants, seen } = state;
  const { n_head: heads, d_head: size, read_width: inputs, d_model: outputs } = model.config;
  const width = heads * size;
  const [q, k, v] = ['q', 'k', 'v'].map((name) => {
    const from = name === 'q' ? first : 0;
    return site(state, `attn.${name}`, layer, linear(state, `blocks/attn/${name}/kernel`, layer, input, inputs, width, from), from);
  });
  const sinks = vector(model, 'blocks/attn/sink', layer, heads);
  const y = new Float32Array(rows * width);
  for (let head = 0; head < heads; head += 1) {
    const name = `${layer}.${head}`;
    const pattern = wants?.has(name) ? new Float32Array(rows * rows) : null;
    attend(q, k, v, y, { rows, first, width, offset: head * size, size, sink: sinks ? sinks[head] : null, pattern });
    if (pattern) seen(name, layer, pattern);
  }
  site(state, 'attn.y', layer, y, first);
  return site(state, 'attn.resid_delta', layer, linear(state, 'blocks/attn/out/kernel', layer, y, width, outputs, first), first);
}

function mlpPart(state, layer, input, first) {
  const { read_width: inputs, d_mlp: neurons, d_model: outputs, activation } = state.model.config;
  const h = linear(state, 'blocks/mlp/fc/kernel', layer, input, inputs, neurons, first);
  const shape = activation === 'gelu' ? gelu : relu;
  for (let i = first * neurons; i < h.length; i += 1) h[i] = shape(h[i]);
  site(state, 'mlp.post_act', layer, h, first);
  return site(state, 'mlp.resid_delta', layer, linear(state, 'blocks/mlp/proj/kernel', layer, h, neurons, outputs, first), first);
}

/** Adds what a part has written to the residual stream. */
function add({ model, rows, scratch }, x, delta, part, first) {
  const { d_model: width, residual_activation: activation } = model.config;
  const k = kept(model.config, AFTER[part], width);
  for (let i = first * width; i < rows * width; i += 1) {
    x[i] += delta[i];
    if (activation === 'relu') x[i] = relu(x[i]);
  }
  for (let t = first; t < rows; t += 1) keepLargest(x, t * width, width, k, scratch);
}

/** Logits from row `first` on. */
function unembed(model, tokens, x, first) {
  const { config, matrices, arrays } = model;
  const { d_model: width, vocab_size: vocab } = config;
  const normed = new Float32Array(x.length);
  normalize(x, tokens.length, width, first, normOf(model, 'head/norm', 0, width), normed, width, 0);
  const logits = new Float32Array((tokens.length - first) * vocab);
  const sums = new Float64Array(vocab);
  const rounded = arrays['head/bigram:rounded'];
  const bias = arrays['head/logits_bias'];
  for (let t = first; t < tokens.length; t += 1) {
    sums.fill(0);
    if (config.tied_embeddings) {
      const { starts, columns, values } = matrices['embed/tokens'];
      for (let v = 0; v < vocab; v += 1) {
        for (let at = starts[v]; at < starts[v + 1]; at += 1) sums[v] += normed[t * width + columns[at]] * values[at];
      }
    } else {
      const { starts, columns, values } = matrices['head/unembed'];
      for (let i = 0; i < width; i += 1) {
        const value = normed[t * width + i];
        for (let at = starts[i]; value !== 0 && at < starts[i + 1]; at += 1) sums[columns[at]] += value * values[at];
      }
    }
    const [middle, scale] = rounded ? ['middles', 'scales'].map((part) => arrays[`head/bigram:${part}`][tokens[t]]) : [];
    const row = tokens[t] * vocab;
    if (rounded) for (let v = 0; v < vocab; v += 1) sums[v] += middle + scale * rounded[row + v];
    if (bias) for (let v = 0; v < vocab; v += 1) sums[v] += bias[v];
    logits.set(sums, (t - first) * vocab);
  }
  return logits;
}
