// Answers the page: encodes prompts and runs the model on them, away from the page's own thread.

const SIDES = ['model', 'circuit'];
// Pairs between two looks at whether the page asks for something else meanwhile.
const ROWS_AT_ONCE = 8;

let model = null;
let tokenizer = null;
let latest = 0;
const opened = new Map();
// Losses over a circuit's pairs that no edit has changed.
const untouched = new Map();
let circuits = null;
let means = null;
// Questions may come while the model is being unpacked.
let ready = null;

async function load(message) {
  const { live } = message;
  [circuits, means] = [message.circuits, live.means];
  model = await openModel(live);
  tokenizer = openTokenizer(live.tokenizer);
  return { texts: tokenizer.texts };
}

async function circuitFor(task) {
  if (!opened.has(task)) opened.set(task, await openCircuit(circuits[task], means[circuits[task].means]));
  return opened.get(task);
}

/** Logits, values of nodes and patterns of heads on tokens, of both sides. */
function onPrompt(circuit, tokens, edits, nodes, heads) {
  const places = nodes.map((name) => [name, place(name)]);
  const wants = new Set(heads);
  return Object.fromEntries(SIDES.map((side) => {
    const [values, patterns] = [{}, {}];
    const seen = (location, layer, x) => {
      if (wants.has(location)) {
        patterns[location] = x;
        return;
      }
      const width = model.widths[location];
      for (const [name, at] of places) {
        if (at.location !== location || at.layer !== layer) continue;
        values[name] = Float32Array.from(tokens, (_, t) => x[t * width + at.channel]);
      }
    };
    const logits = forward(model, plan(model, circuit, side, edits), tokens, { seen, wants });
    return [side, { logits, values, patterns }];
  }));
}

/** Mean loss and accuracy over a circuit's pairs; null when the page has asked for something else. */
async function onPairs(circuit, edits, side, id) {
  const { tokens, positions, answers } = circuit.own;
  const width = tokens.length / positions.length;
  const run = plan(model, circuit, side, edits);
  let [loss, right] = [0, 0];
  for (let row = 0; row < positions.length; row += 1) {
    if (row % ROWS_AT_ONCE === 0) {
      await new Promise((done) => { setTimeout(done); });
      if (id !== latest) return null;
    }
    const prompt = Array.from(tokens.subarray(row * width, row * width + positions[row] + 1));
    const logits = forward(model, run, prompt, { lastOnly: true });
    const margin = logits[answers[row]] - logits[answers[row ^ 1]];
    loss += softplus(-margin) / positions.length;
    right += (margin > 0) / positions.length;
  }
  return { loss, accuracy: right };
}

async function losses(circuit, task, edits, id) {
  const found = { before: {}, now: {} };
  for (const side of SIDES) {
    const key = `${side} ${task}`;
    if (!untouched.has(key)) {
      const before = await onPairs(circuit, [], side, id);
      if (!before) return null;
      untouched.set(key, before);
    }
    found.before[side] = untouched.get(key);
    found.now[side] = edits.length ? await onPairs(circuit, edits, side, id) : found.before[side];
    if (!found.now[side]) return null;
  }
  return found;
}

/** Answers a prompt at once, and the losses over the pairs when they are there. */
async function run({ id, task, text, edits, nodes, heads }) {
  await ready;
  const started = performance.now();
  const circuit = await circuitFor(task);
  const all = tokenizer.encode(text);
  const tokens = all.slice(-model.config.context);
  const answer = { kind: 'prompt', id, task, text, tokens, dropped: all.length - tokens.length, before: null, now: null };
  if (tokens.length) {
    answer.before = onPrompt(circuit, tokens, [], nodes, heads);
    answer.now = edits.length ? onPrompt(circuit, tokens, edits, nodes, heads) : answer.before;
  }
  answer.milliseconds = performance.now() - started;
  postMessage(answer);
  const found = await losses(circuit, task, edits, id);
  if (found) postMessage({ kind: 'losses', id, task, ...found, pairs: circuit.own.positions.length / 2 });
}

onmessage = async ({ data }) => {
  latest = data.id ?? latest;
  try {
    if (data.kind === 'load') {
      ready = load(data);
      postMessage({ kind: 'loaded', ...await ready });
    } else await run(data);
  } catch (error) {
    postMessage({ kind: 'failed', id: data.id, task: data.task, reason: String(error.message ?? error) });
  }
};
