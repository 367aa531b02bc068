/* An error also stands at the field that it names or quotes first, until that field is changed or something else is started. */
(() => {
  const told = new WeakMap();
  let marked = null;
  const clear = () => {
    if (!marked) return;
    delete marked.dataset.error;
    for (const input of marked.querySelectorAll('[aria-invalid]')) for (const name of ['aria-invalid', 'aria-description']) input.removeAttribute(name);
    marked = null;
  };
  const quote = RegExp.escape || (text => text.replace(/[\\^$.*+?()[\]{}|\/-]/g, '\\$&')); // browsers before 2025
  const first = (elements, text, words) => {
    const places = [...elements].filter(one => one.offsetParent !== null).flatMap(one => words(one).filter(word => word.length > 1)
      .map(word => [text.search(new RegExp(`(?<!\\w)${quote(word)}(?![\\w@])`)), one]));
    return places.filter(([at]) => at >= 0).sort(([one], [other]) => one - other)[0]?.[1].closest('fieldset, div.block');
  };
  const labels = '[data-testid="block-info"], label:has(> input[type=checkbox]) > span, legend';
  /* By its label, or else by its value. */
  const find = text => first(document.querySelectorAll(labels), text.charAt(0).toUpperCase() + text.slice(1), one => [one.textContent.trim().split(/ \(|, /)[0]])
    || first(document.querySelectorAll('textarea, input:is([type=text], [role=combobox])'), text, one => one.value.trim().split(/[\n=]/));
  const mark = text => {
    clear();
    marked = find(text) || null;
    if (!marked) return;
    marked.dataset.error = text;
    for (const input of marked.querySelectorAll('input, textarea')) {
      input.setAttribute('aria-invalid', 'true');
      input.setAttribute('aria-description', text);
    }
    marked.scrollIntoView({block: 'nearest'});
  };
  for (const type of ['input', 'change', 'keydown']) document.addEventListener(type, event => {
    if (event.key && event.key !== 'Enter') return; // which takes a choice from a list
    if (marked?.contains(event.target) || event.target.type === 'file') clear();
  }, true);
  /* At the click: with the message gone at the press, the page would move and the click be lost. A choice is gone from its
     list before it is clicked. What folds a box or closes the message starts nothing. */
  const starts = {click: 'button:not(.label-wrap, [data-testid=toast-close])', pointerdown: '[role=option]'};
  for (const [type, what] of Object.entries(starts)) document.addEventListener(type, event => { if (event.target.closest?.(what)) clear(); }, true);
  new MutationObserver(() => {
    for (const message of document.querySelectorAll('.toast-body.error [data-testid="toast-text"]')) {
      const text = message.textContent.trim();
      if (told.get(message) === text) continue;
      told.set(message, text);
      mark(text);
    }
  }).observe(document.documentElement, {childList: true, subtree: true, characterData: true});
})();
