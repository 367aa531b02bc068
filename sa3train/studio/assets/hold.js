/* Elements that the server is about to replace are inert while it answers: an edit made meanwhile would be lost, or end
   up in another row. `more` is 1 when a request is sent and -1 when it is answered or has failed. */
sa3.hold = (() => {
  let asked = 0, focused = null;
  return (ids, more) => {
    if (!asked) focused = document.activeElement;
    asked = Math.max(0, asked + more);
    for (const id of ids) document.getElementById(id)?.toggleAttribute('inert', asked > 0);
    if (!asked && focused?.isConnected && document.activeElement === document.body) focused.focus();
  };
})();
