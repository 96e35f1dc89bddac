// The runs of the page. What `data` says of "the" run is of the one whose circuit is shown.

const OF_RUN = ['run', 'tokens', 'live', 'static', 'mean_edges', 'n_tasks'];
const RUNS = [Object.fromEntries(OF_RUN.map((key) => [key, data[key]])), ...data.others];

const enter = (index) => Object.assign(data, RUNS[index]);

/** A run in a line: its size and its loss. */
function aboutRun({ run }) {
  const size = `${plural(run.model.n_layer, 'layer')} of width ${run.model.d_model}, ${plural(run.model.n_head, 'head')} of ${run.model.d_head}`;
  return [
    size, run.summary.nonzeros ? `${run.summary.nonzeros.toLocaleString('en')} nonzero weights` : null,
    run.summary.val_loss ? `held-out loss ${run.summary.val_loss.toFixed(3)}` : null, `step ${run.step}`,
  ].filter(Boolean).join(' · ');
}

/** The run of some indices in a line, or how many runs they are. */
function aboutRuns(indices) {
  const own = new Set(indices);
  return own.size > 1 ? plural(own.size, 'run') : aboutRun(RUNS[[...own][0]]);
}

const nameOfPage = RUNS.map(({ run }) => run.name).join(', ');
