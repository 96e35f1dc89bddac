// The page's side of the worker that runs the model: questions, answers, and what a person has changed.

const MODES = ['mean', 'zero', 'set'];
// Characters of a prompt; what is beyond the model's context would be dropped anyway.
const MAX_PROMPT = 4000;

/**
 * `answer` and `losses` are the worker's latest, `at` is the token of a typed prompt after which the next one is
 * shown (null is the last), `past` are the edits before each change, `notify` is called when something has arrived.
 */
const live = {
  worker: null, id: 0, busy: false, waiting: null, asked: null, answer: null, losses: null, problem: null, at: null, past: [],
  task: null, run: null, notify: () => {},
};

/** Whether the page can run the circuit. */
const canRun = (circuit) => Boolean(circuit?.live && RUNS[circuit.run].live);

/** The edits that a text says, "0.attn.q.17=mean;0.attn.v.2>0.attn.resid_delta.5=set:0.25"; others are left out. */
function readEdits(circuit, text) {
  return (text ?? '').split(';').flatMap((part) => {
    const [name, given] = part.split('=');
    const [mode, digits] = (given ?? '').split(':');
    const value = mode === 'set' ? Number(digits) : null;
    if (!MODES.includes(mode) || (mode === 'set' && (!digits || !Number.isFinite(value)))) return [];
    if (circuit.byName.has(name)) return [{ name, node: name, mode, value }];
    return edgeOf(circuit, name) ? [{ name, edge: name, mode, value }] : [];
  });
}

const writeEdits = (edits) => edits.map(({ name, mode, value }) => (
  `${name}=${mode === 'set' ? `set:${+value.toPrecision(9)}` : mode}`)).join(';');

/** The prompt that is shown: the person's own, or the first of the pair. */
const shownPrompt = (circuit, state) => state.prompt ?? circuit.rows[2 * state.pair].text;

/** The two answers: those that all pairs of the task share, or those of the pair that is shown. */
function answersOf(circuit, state) {
  return circuit.answer_weights?.tokens ?? [2 * state.pair, 2 * state.pair + 1].map((row) => circuit.rows[row].answer);
}

/** Starts the worker of a run, in place of another one's. */
function startWorker(run) {
  if (live.worker) {
    live.worker.onmessage = null;
    live.worker.terminate();
  }
  Object.assign(live, { run, busy: false, waiting: null });
  const url = URL.createObjectURL(new Blob([byId('engine').textContent], { type: 'text/javascript' }));
  live.worker = new Worker(url);
  live.worker.onmessage = ({ data: answer }) => hear(answer);
  live.worker.onerror = (event) => hear({ kind: 'failed', id: live.id, task: live.task, reason: event.message });
  const own = Object.entries(data.circuits).filter(([, circuit]) => circuit.run === run);
  const circuits = Object.fromEntries(own.map(([task, circuit]) => [task, circuit.live]));
  live.worker.postMessage({ kind: 'load', live: RUNS[run].live, circuits });
}

function hear(answer) {
  if (answer.kind === 'loaded') {
    answer.texts.forEach((text, id) => { RUNS[live.run].tokens[id] ??= text; });
    return;
  }
  if (answer.id !== live.id) return;
  if (answer.kind !== 'losses') live.busy = false;
  if (answer.task !== live.task) {
    // While the question about another circuit waits, that about the one before is still answered.
  } else if (answer.kind === 'failed') live.problem = answer.reason || 'the worker did not start';
  else if (answer.kind === 'losses') live.losses = answer;
  else live.answer = answer;
  if (!live.busy && live.waiting) send(live.waiting);
  live.notify();
}

function send(message) {
  live.waiting = null;
  live.busy = true;
  live.id += 1;
  live.worker.postMessage({ ...message, id: live.id });
}

/** Runs what the state says, if it is not what has been asked for last; while the worker is busy only the newest waits. */
function ask(circuit, state) {
  const node = circuit.byName.get(state.node);
  const edits = readEdits(circuit, state.edits).map(({ node: name, edge, mode, value }) => ({ node: name, edge, mode, value }));
  const message = {
    kind: 'run', task: circuit.task, text: shownPrompt(circuit, state).slice(0, MAX_PROMPT), edits,
    nodes: circuit.nodes.map((each) => each.name), heads: node?.inHead ? [`${node.layer}.${node.head}`] : [],
  };
  const key = JSON.stringify(message);
  if (key === live.asked) return;
  if (live.run !== circuit.run) startWorker(circuit.run);
  if (live.task !== circuit.task) Object.assign(live, { task: circuit.task, answer: null, losses: null, at: null, past: [] });
  if (live.answer && live.answer.text !== message.text) live.at = null;
  live.asked = key;
  live.problem = null;
  if (live.busy) live.waiting = message;
  else send(message);
}

/** Whether the prompt that is shown is the first of the pair, whose token is a part of the address. */
const isOfPair = (circuit, state) => shownPrompt(circuit, state) === circuit.rows[2 * state.pair].text;

/** The token after which the next one is shown. */
function chosenToken() {
  const last = (live.answer?.tokens.length ?? 0) - 1;
  const { circuit, state } = trying.context;
  return Math.min((isOfPair(circuit, state) ? state.token : live.at) ?? last, last);
}

/** Logits after the chosen token, of a side, "before" the edits or "now". */
function logitsOf(when, side) {
  const size = data.live.config.vocab_size;
  const at = chosenToken();
  return live.answer[when][side].logits.subarray(at * size, (at + 1) * size);
}

/** Probabilities of all tokens. */
function softmax(logits) {
  const top = d3.max(logits);
  const shares = Float64Array.from(logits, (logit) => Math.exp(logit - top));
  const total = d3.sum(shares);
  return shares.map((share) => share / total);
}

/** What became of the edits after one for a node or an edge is set, or taken away (null). */
function withEdit(circuit, state, name, edit) {
  const edits = readEdits(circuit, state.edits);
  const at = edits.findIndex((each) => each.name === name);
  if (!edit) return writeEdits(edits.filter((each) => each.name !== name));
  if (at < 0) return writeEdits([...edits, { name, ...edit }]);
  return writeEdits(edits.map((each, i) => (i === at ? { name, ...edit } : each)));
}

/** Nodes by how much their values have changed, at the token where they changed most. */
function changesOfNodes(circuit, side) {
  if (live.answer.before === live.answer.now) return [];
  const [before, now] = [live.answer.before[side].values, live.answer.now[side].values];
  const found = circuit.nodes.map((node) => {
    const [u, v] = [before[node.name], now[node.name]];
    const at = d3.maxIndex(u, (value, t) => Math.abs(v[t] - value));
    return { node, at, before: u[at], now: v[at], size: Math.abs(v[at] - u[at]) };
  });
  // What differs by rounding has not changed.
  return found.filter(({ size }) => size > 1e-6).sort((a, b) => d3.descending(a.size, b.size));
}
