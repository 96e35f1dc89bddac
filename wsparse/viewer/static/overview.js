// The table of all tasks, and their curves.

const TABLE = [
  ['task', 'task', (row) => row.task, 'what is decided between two next tokens'],
  ['nodes', 'nodes', (row) => row.nodes, 'nodes of the circuit'],
  ['edges', 'edges', (row) => row.edges, 'weights left after single edges were cut'],
  ['all', 'all edges', (row) => row.edges_between_nodes, 'every nonzero weight between the kept nodes'],
  ['loss', 'loss', (row) => row.sufficiency, 'task loss of the circuit alone, everything else at its mean'],
  ['attacked', 'attacked', (row) => row.attacked, 'the largest that 20 steps of an adversary find, which lets removed nodes through in part'],
  ['model', 'model', (row) => row.model_loss, 'task loss of the whole model'],
  ['without', 'without', (row) => row.necessity, 'loss when the circuit is removed and the rest stays; chance is 0.693'],
  ['shuffled', 'shuffled', (row) => row.controls?.shuffled_labels, 'control: least loss of the same search on shuffled labels, on the pairs that circuits are chosen on'],
  ['random', 'random', (row) => row.controls?.random_model, 'the same in a model with weights at random places'],
  ['attribution', 'attrib.', (row) => row.attribution_edges, 'edges of the circuit that gradient attribution finds'],
  ['seconds', 'seconds', (row) => row.seconds, 'search and clean-up'],
];
const WHOLE = new Set(['nodes', 'edges', 'all', 'attribution', 'seconds']);

function drawOverview(state, change, hrefOf) {
  const withCircuit = data.tasks.filter((row) => data.circuits[row.task]);
  const several = RUNS.length > 1;
  const means = RUNS.map((each) => number(each.mean_edges) + (several ? ` in ${each.run.name} (${plural(each.n_tasks, 'task')})` : ''));
  byId('headline').textContent = `${plural(withCircuit.length, 'circuit')}${several ? '' : ` of ${plural(data.n_tasks, 'task')}`}; geometric mean of edges ${means.join(', ')}. Losses are in nats, on the report split: prompts that the search has not seen.`;
  const value = TABLE.find(([key]) => key === state.sort)[2];
  const down = state.order === 'down';
  const rows = [...data.tasks].sort((a, b) => {
    const [u, v] = [value(a), value(b)];
    // What is missing stays at the end.
    if ((u ?? null) === null || (v ?? null) === null) return ((u ?? null) === null) - ((v ?? null) === null);
    return (down ? -1 : 1) * d3.ascending(u, v) || d3.ascending(a.task, b.task);
  });
  byId('tasks').tHead.replaceChildren(el('tr', {}, ...TABLE.map(([key, name, , title]) => el('th', {
    scope: 'col', 'aria-sort': key !== state.sort ? 'none' : down ? 'descending' : 'ascending',
  }, el('button', {
    type: 'button', title,
    click: () => change({ sort: key, order: key === state.sort && !down ? 'down' : 'up' }),
  }, name)))));
  byId('tasks').tBodies[0].replaceChildren(...rows.map((row) => {
    const opens = Boolean(data.circuits[row.task]);
    const cells = TABLE.map(([key, , of]) => {
      if (key === 'task') {
        return el('th', { scope: 'row', 'data-value': row.task }, opens ? el('a', { href: hrefOf(row.task) }, row.task) : row.task,
          el('div', { class: 'quiet' }, opens ? row.summary : row.status),
          opens && row.status !== FOUND ? el('div', { class: 'wrong' }, row.status) : null);
      }
      const given = of(row);
      return el('td', { class: 'number', 'data-value': given ?? '' }, (given ?? null) === null ? '–' : WHOLE.has(key) ? Math.round(given).toLocaleString('en') : loss(given));
    });
    const light = (on) => () => {
      for (const each of byId('curves').querySelectorAll('.curve')) {
        each.classList.toggle('chosen', on && each.dataset.task === row.task);
        each.classList.toggle('other', on && each.dataset.task !== row.task);
      }
    };
    return el('tr', {
      class: opens ? 'opens' : '', pointerenter: light(true), pointerleave: light(false), focusin: light(true), focusout: light(false),
      click: (event) => opens && !event.target.closest('a') && change({ task: row.task }, true),
    }, ...cells);
  }));
  byId('columns').replaceChildren(...TABLE.slice(1).flatMap(([, name, , title]) => [el('dt', {}, name), el('dd', {}, title)]));
  drawCurves(byId('curves'), withCircuit, null, { pick: (task) => change({ task }, true) });
  drawWhole(state, change);
}
