/* The list of adapters. props.value: {rows: [{path, strength, end_strength, conditioner_strength, low, high,
   exclude_layers, allow_partial}]}.
   The page's datalist #adapter-files has the files to choose from. */
sa3.rack = (element, props, watch, upload) => {
  const {make} = sa3;
  const rows = make('div', {class: 'rows'});
  const error = make('p', {class: 'notice error', role: 'alert', hidden: true});
  const chooser = make('input', {type: 'file', accept: '.safetensors', hidden: true, 'aria-label': 'adapter file to upload'});
  const value = () => props.value || {rows: []};
  const all = () => value().rows || [];
  const files = () => [...document.querySelectorAll('#adapter-files option')].map(option => option.value);
  const put = next => { props.value = {...value(), rows: next}; };
  const change = next => { put(next); draw(); };
  const fresh = path => ({path, strength: 1, end_strength: null, conditioner_strength: null, low: 0, high: 1, exclude_layers: '', allow_partial: false});
  const add = make('button', {type: 'button', class: 'small', onclick: () => {
    const used = all().map(row => row.path), free = files().find(path => !used.includes(path));
    change([...all(), fresh(free || '')]);
    rows.lastElementChild?.querySelector('input')?.focus();
  }}, 'Add adapter');
  const send = make('button', {type: 'button', class: 'small', onclick: () => chooser.click()}, 'Upload adapter…');
  chooser.addEventListener('change', async () => {
    const file = chooser.files[0];
    chooser.value = '';
    error.hidden = true;
    if (!file) return;
    try {
      const {path} = await upload(file);
      change([...all(), fresh(path)]);
    } catch (failure) {
      error.textContent = `${file.name} cannot be uploaded: ${failure && failure.message || failure}`;
      error.hidden = false;
    }
  });
  element.append(rows, error, make('div', {class: 'row'}, add, send), chooser);

  const number = (index, name, label, extra = {}) => make('label', {}, make('span', {}, label), make('input', {
    type: 'number', step: 0.05, value: all()[index][name] ?? '', ...extra,
    oninput: event => {
      put(all().map((row, other) => other === index
        ? {...row, [name]: event.target.value === '' ? null : Number(event.target.value)} : row));
      const twin = event.target.closest('fieldset').querySelector(`input[type=range][data-of=${name}]`);
      if (twin) twin.value = event.target.value;
    }}));

  const fields = (row, index) => make('fieldset', {},
    make('legend', {}, `Adapter ${index + 1}`),
    make('label', {class: 'wide'}, make('span', {}, 'File'), make('input', {
      type: 'text', list: 'adapter-files', value: row.path, spellcheck: 'false', placeholder: 'file, run folder or RUN@STEP',
      onchange: event => put(all().map((old, other) => other === index ? {...old, path: event.target.value} : old)),
      // Not on leaving the field: the button that is being pressed would move away below the pointer.
      oninput: event => { event.target.closest('fieldset').querySelector('.soft').hidden = Boolean(event.target.value); }})),
    make('p', {class: 'soft wide', hidden: Boolean(row.path)}, files().length || !document.getElementById('adapter-files')
      ? 'Choose a file from the list, or enter its path.'
      : 'No adapter found yet. Train one on the Runs page, or upload a file.'),
    number(index, 'strength', 'Strength'),
    make('input', {type: 'range', min: 0, max: 2, step: 0.05, value: row.strength, 'data-of': 'strength',
      'aria-label': `strength of adapter ${index + 1}`,
      oninput: event => {
        const field = event.target.closest('fieldset').querySelector('label:nth-of-type(2) input');
        field.value = event.target.value; field.dispatchEvent(new Event('input'));
      }}),
    make('details', {}, make('summary', {}, 'Conditioner, noise levels, layers'), make('div', {class: 'more'},
      number(index, 'end_strength', 'Strength in the last window', {placeholder: 'same as strength'}),
      number(index, 'conditioner_strength', 'Conditioner strength', {placeholder: 'same as strength'}),
      number(index, 'low', 'Min noise level', {min: 0, max: 1}),
      number(index, 'high', 'Max noise level', {min: 0, max: 1}),
      make('label', {class: 'wide'}, make('span', {}, 'Exclude layers'), make('input', {
        type: 'text', value: row.exclude_layers, placeholder: 'for example cross_attn, layers.[0-5]',
        onchange: event => put(all().map((old, other) => other === index ? {...old, exclude_layers: event.target.value} : old))})),
      make('label', {class: 'tick wide'}, make('input', {type: 'checkbox', checked: row.allow_partial,
        onchange: event => put(all().map((old, other) => other === index ? {...old, allow_partial: event.target.checked} : old))}),
        make('span', {}, 'Allow partial load')))),
    make('button', {type: 'button', class: 'small', 'aria-label': `remove adapter ${index + 1}`,
      onclick: () => { change(all().filter((_, other) => other !== index)); add.focus(); }}, 'Remove'));

  /* A button elsewhere plays an adapter: it takes the place of the others. */
  document.addEventListener('click', event => {
    const button = event.target.closest('[data-play]');
    if (!button) return;
    change([{...fresh(button.dataset.play), strength: Number(button.dataset.strength)}]);
    document.getElementById('tab-play-button').click();
    requestAnimationFrame(() => document.querySelector('#play-prompt textarea').focus());
  });

  const draw = () => rows.replaceChildren(...all().map(fields));
  watch('value', draw);
  draw();
};
