/* The waveform of the source and the regions to regenerate: drag on it, or use the table; both show the same.
   props.value: {peaks, seconds, duration, regions: [[start, end]], url, mode, note, fixed, edited}. `fixed`: not editable; `edited`
   counts changes made here, and comes back in the answer to a request. */
sa3.regions = (element, props, watch) => {
  const {make} = sa3;
  const canvas = make('canvas', {role: 'img', height: 96});
  const audio = make('audio', {controls: true, preload: 'metadata', 'aria-label': 'source audio'});
  const body = make('tbody');
  const table = make('table', {},
    make('caption', {}, 'Regions to regenerate, in seconds'),
    make('thead', {}, make('tr', {}, ...['Start', 'End', 'Remove'].map(name => make('th', {scope: 'col'}, name)))), body);
  const add = make('button', {type: 'button', class: 'small', onclick: () => {
    const end = last(), room = span() - end > 0.2 ? [end, Math.min(span(), end + Math.max(0.5, span() / 6))]
      : [span() / 3, span() * 2 / 3];
    change([...regions(), room.map(round)]);
    body.querySelector('tr:last-child input')?.focus();
  }}, 'Add region');
  const note = make('p', {class: 'soft'});
  element.append(canvas, audio, note, table, add);

  const value = () => props.value || {};
  const regions = () => value().regions || [];
  const span = () => Math.max(value().seconds || 0, value().duration || 0) || 1;
  const last = () => Math.max(0, ...regions().map(region => region[1]));
  const round = seconds => Math.round(seconds * 100) / 100;
  const within = seconds => Math.min(span(), Math.max(0, seconds));
  let drag = null, edits = value().edited || 0, drawn = value();

  const change = next => { edits += 1; props.value = {...value(), regions: next, edited: edits}; draw(); };
  /* An answer to an earlier state updates everything but the regions, which have been changed since. */
  const arrived = () => {
    const came = value(), late = came.edited < edits && came.url === drawn.url && !came.fixed && !drawn.fixed;
    if (late) props.value = {...came, regions: drawn.regions, edited: edits};
    else if (came.edited !== edits) { edits += 1; props.value = {...came, edited: edits}; }
    draw();
  };

  const paint = () => {
    const width = canvas.clientWidth || 480, height = 96, scale = window.devicePixelRatio || 1;
    canvas.width = width * scale; canvas.height = height * scale;
    const context = canvas.getContext('2d'), style = getComputedStyle(element);
    context.scale(scale, scale);
    const {peaks = [], seconds = 0} = value(), to = time => time / span() * width;
    context.fillStyle = style.getPropertyValue('--wave') || '#7b7d85';
    const loudest = Math.max(0.05, ...peaks);
    peaks.forEach((peak, index) => {
      const tall = Math.max(1, peak / loudest * (height - 18));
      context.fillRect(to(index / peaks.length * seconds), (height - 14 - tall) / 2, Math.max(1, to(seconds) / peaks.length), tall);
    });
    const shown = drag && drag.region ? [...regions().filter((_, index) => index !== drag.index), drag.region] : regions();
    for (const [start, end] of shown) {
      context.fillStyle = 'rgba(194, 87, 26, 0.32)';
      context.fillRect(to(start), 0, to(end) - to(start), height - 14);
      context.fillStyle = '#c2571a';
      context.fillRect(to(start), 0, 2, height - 14); context.fillRect(to(end) - 2, 0, 2, height - 14);
    }
    context.fillStyle = style.getPropertyValue('--soft') || '#5a5c63';
    context.font = '11px system-ui, sans-serif';
    for (let tick = 0; tick <= 4; tick++) {
      const text = `${round(span() * tick / 4)} s`;
      const left = Math.min(width - context.measureText(text).width, Math.max(0, to(span() * tick / 4) - 8));
      context.fillText(text, left, height - 2);
    }
  };

  const field = (index, side, name) => make('input', {
    type: 'number', step: 0.01, min: 0, 'aria-label': `region ${index + 1}, ${name} in seconds`, value: regions()[index][side],
    disabled: value().fixed,
    onchange: event => {
      const next = regions().map(region => [...region]);
      next[index][side] = event.target.value === '' ? null : Number(event.target.value);
      change(next);
    }});

  const draw = () => {
    drawn = value();
    const {seconds = 0, url = '', fixed = false} = value();
    element.classList.toggle('nothing', !seconds);
    canvas.setAttribute('aria-label', seconds ? `waveform, ${round(seconds)} seconds, ${regions().length} regions` : 'no audio yet');
    if (audio.getAttribute('src') !== url) { if (url) audio.setAttribute('src', url); else audio.removeAttribute('src'); }
    note.textContent = value().note || '';
    table.hidden = fixed || !regions().length;
    add.hidden = fixed;
    const held = document.activeElement, at = [...body.querySelectorAll('input')].indexOf(held);
    body.replaceChildren(...regions().map((_, index) => make('tr', {},
      make('td', {}, field(index, 0, 'start')), make('td', {}, field(index, 1, 'end')),
      make('td', {}, make('button', {type: 'button', class: 'small', 'aria-label': `remove region ${index + 1}`,
        onclick: () => { change(regions().filter((_, other) => other !== index)); add.focus(); }}, 'Remove')))));
    if (at >= 0) body.querySelectorAll('input')[at]?.focus();
    paint();
  };

  const time = event => {
    const box = canvas.getBoundingClientRect();
    return within((event.clientX - box.left) / box.width * span());
  };
  canvas.addEventListener('pointerdown', event => {
    if (value().fixed || !value().seconds) return;
    const at = time(event), near = 6 / canvas.clientWidth * span();
    let index = regions().findIndex(([start, end]) => Math.min(Math.abs(start - at), Math.abs(end - at)) < near);
    if (index >= 0) {
      const [start, end] = regions()[index];
      drag = {index, anchor: Math.abs(start - at) < Math.abs(end - at) ? end : start};
    } else {
      index = regions().findIndex(([start, end]) => start < at && at < end);
      drag = index >= 0 ? {index, from: at, moved: regions()[index]} : {index: -1, anchor: at};
    }
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener('pointermove', event => {
    if (!drag) return;
    const at = time(event);
    if (drag.moved) {
      const [start, end] = drag.moved, by = Math.min(span() - end, Math.max(-start, at - drag.from));
      drag.region = [start + by, end + by].map(round);
    } else drag.region = [Math.min(drag.anchor, at), Math.max(drag.anchor, at)].map(round);
    paint();
  });
  canvas.addEventListener('pointerup', () => {
    const {region, index} = drag || {};
    drag = null;
    if (!region || region[1] - region[0] < 0.02) return paint();
    change(index >= 0 ? regions().map((old, other) => other === index ? region : old)
      : [...regions(), region].sort((one, other) => one[0] - other[0]));
  });
  new ResizeObserver(paint).observe(canvas);
  watch('value', arrived);
  draw();
};
