/* Shared by all pages of the studio: building elements, copying commands, lists that do not interrupt what plays. */
window.sa3 = (() => {
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, '');
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter(child => child !== null));
    return element;
  };

  const copy = async button => {
    const text = button.dataset.copy;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = make('textarea', {'aria-hidden': 'true'});
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand('copy');
      area.remove();
    }
    button.textContent = 'Copied';
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  };

  /* Starting another player of a group stops the current one and continues at its position, for comparing by ear. */
  let last = null;
  const played = audio => {
    const take = audio.closest('[data-group]'), other = last && last !== audio && last.closest('[data-group]');
    if (other && take && !last.paused) {
      if (other.dataset.group === take.dataset.group) audio.currentTime = last.currentTime;
      last.pause();
    }
    last = audio;
  };
  const follow = audio => {
    const head = audio.closest('.take')?.querySelector('.playhead');
    if (head) head.style.left = 100 * audio.currentTime / (audio.duration || 1) + '%';
  };
  document.addEventListener('click', event => {
    const button = event.target.closest('button.copy');
    if (button) copy(button);
    if (event.target.closest('button:not(.label-wrap, .toast-close)')) for (const one of document.querySelectorAll('.toast-close')) one.click();
    const picture = event.target.closest('.take .picture');
    const audio = picture && picture.closest('.take').querySelector('audio');
    if (audio) {
      const box = picture.getBoundingClientRect();
      audio.currentTime = (event.clientX - box.left) / box.width * (audio.duration || 0);
      audio.play();
    }
  });
  document.addEventListener('play', event => { if (event.target.matches('audio')) played(event.target); }, true);
  document.addEventListener('timeupdate', event => { if (event.target.matches('audio')) follow(event.target); }, true);

  /* Asks for a state while the element is shown, and triggers an event when it is another: soon after a change or a
     click, less often while nothing happens. */
  const poll = (element, server, trigger, seconds, longest) => {
    let last, timer, wait = seconds;
    const ask = async () => {
      const shown = element.offsetParent && !document.hidden;
      const state = shown ? await server.get_state().catch(() => last) : last;
      wait = state === last ? Math.min(Math.max(1.5 * wait, seconds), longest) : seconds;
      if (state !== last) trigger('tick');
      last = state;
      plan();
    };
    const plan = () => {
      clearTimeout(timer);
      if (element.isConnected) timer = setTimeout(ask, 1000 * wait);
    };
    document.addEventListener('click', () => { wait = 0.15; plan(); });
    ask();
  };

  /* Asks now and then, and at each press of a button, whether the server answers: what is pressed while it is gone is
     lost. A server that was started again knows nothing of what the page holds, so the page is loaded again, unless
     captions would be lost with it. */
  let unsaved = false;
  const markUnsaved = is => { unsaved = is; };
  const isUnsaved = () => unsaved || Boolean(document.querySelector('#captions-table textarea'));
  addEventListener('beforeunload', event => { if (isUnsaved()) event.preventDefault(); });
  const gone = make('div', {id: 'studio-gone', class: 'notice error', role: 'alert'});
  let failed = 0, asking = false, next;
  const askServer = async () => {
    clearTimeout(next);
    if (asking || document.hidden) return;
    asking = true;
    let id = null;
    try {
      id = (await (await fetch('gradio_api/app_id', {cache: 'no-store', signal: AbortSignal.timeout(15000)})).json()).app_id;
      failed = 0;
    } catch { failed += 1; }
    asking = false;
    next = setTimeout(askServer, failed === 1 ? 500 : 4000);
    const start = `${document.querySelector('[data-start]')?.dataset.start || 'sa3-studio'} --port ${location.port}`;
    const own = window.gradio_config?.app_id;
    const isOther = Boolean(id && own && id !== own);
    if (isOther && !isUnsaved()) location.reload();
    if (!failed && !isOther) gone.remove();
    if (failed < 2 && !isOther) return;
    const told = isOther
      ? 'The studio was started again. This page has captions that are not saved, and can no longer save them: copy them, then reload the page.'
      : `The studio's server does not answer. Start it again: ${start}\nRuns that were started go on. What you press here meanwhile is lost.`;
    if (gone.isConnected && gone.textContent === told) return;
    gone.textContent = told;
    document.body.append(gone);
  };
  next = setTimeout(askServer, 4000);
  document.addEventListener('visibilitychange', askServer);
  document.addEventListener('click', event => { if (event.target.closest('button')) askServer(); }, true);

  /* What was made from a form says so once the form has been changed. */
  const outdate = (id, isOld) => document.getElementById(id).toggleAttribute('data-old', isOld);

  /* props.value: [{key, html}]. Items stay in place while their HTML is the same, so that playback continues. */
  const list = (element, props, watch, act) => {
    const shown = new Map();
    const draw = () => {
      const items = props.value || [];
      const wanted = new Set(items.map(item => item.key));
      for (const [key, entry] of shown) if (!wanted.has(key)) { entry.node.remove(); shown.delete(key); }
      let before = element.firstElementChild;
      for (const item of items) {
        let entry = shown.get(item.key);
        if (!entry) { entry = {node: make('div', {class: 'item', 'data-key': item.key})}; shown.set(item.key, entry); }
        if (entry.html !== item.html) { entry.html = item.html; entry.node.innerHTML = item.html; }
        if (entry.node === before) before = before.nextElementSibling;
        else element.insertBefore(entry.node, before);
      }
    };
    element.addEventListener('click', event => {
      const button = event.target.closest('[data-action]');
      if (button) act(button.dataset.action, button.dataset.name);
    });
    watch('value', draw);
    draw();
  };

  /* Gradio's table labels an image without the role of one. And it lets the keyboard into an opened cell only a frame
     later: what is typed before that would be lost, so the cell's field gets the focus, and keeps it. Gradio's own
     timer of an error would also close the next one with the same text, so an error has a timer of ours. */
  const opened = new WeakSet(), timers = new WeakMap();
  document.addEventListener('click', event => {
    const toast = event.target.closest('.toast-close')?.closest('.toast-body');
    clearTimeout(timers.get(toast)?.timer);
    timers.delete(toast);
  }, true);
  const patch = () => {
    for (const toast of document.querySelectorAll('.toast-body.error')) {
      const text = toast.textContent, before = timers.get(toast);
      if (before?.text === text) continue;
      clearTimeout(before?.timer);
      const close = () => { if (toast.isConnected) toast.querySelector('.toast-close').click(); };
      timers.set(toast, {text, timer: setTimeout(close, 20000)});
    }
    for (const mark of document.querySelectorAll('.wrapper[aria-label]:not([role])')) mark.setAttribute('role', 'img');
    for (const field of document.querySelectorAll('.virtual-body textarea')) {
      if (!opened.has(field)) { opened.add(field); field.focus(); }
    }
  };
  document.addEventListener('focusin', event => {
    const field = event.target.closest('.virtual-body [role=gridcell]')?.querySelector('textarea');
    if (field && field !== event.target) field.focus();
  });

  /* The address names the page that is shown and the tab on it, so that a reload comes back to them. */
  const getTabs = page => [...document.querySelectorAll(`#tab-${page} [role=tab]:not([aria-hidden=true] *)`)];
  const getWord = tab => tab.textContent.trim().toLowerCase();
  document.addEventListener('click', event => {
    const tab = event.target.closest('#studio-tabs [role=tab]');
    if (!tab) return;
    const isPage = tab.id.startsWith('tab-');
    const page = isPage ? tab.id.slice('tab-'.length, -'-button'.length) : tab.closest('[id^=tab-]').id.slice('tab-'.length);
    const inner = isPage ? getTabs(page).find(one => one.ariaSelected === 'true') : tab;
    history.replaceState(null, '', '#' + page + (inner ? '/' + getWord(inner) : ''));
  });
  const restoreTab = () => {
    const [page, word] = location.hash.slice(1).split('/');
    document.getElementById(`tab-${page}-button`)?.click();
    const open = left => { // the page's own tabs are there once it is shown
      const tab = getTabs(page).find(one => getWord(one) === word);
      if (tab) tab.click(); else if (left) setTimeout(open, 50, left - 1);
    };
    if (word) open(100);
  };
  new MutationObserver(patch).observe(document.documentElement, {childList: true, subtree: true});
  return {make, list, poll, outdate, markUnsaved, restoreTab};
})();
