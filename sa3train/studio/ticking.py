"""A timer that ticks while its tab is looked at, and rests otherwise."""

import gradio as gr
from gradio.context import Context


def ticking(seconds: float) -> gr.Timer:
    """A timer for the tab that is being built. Outside of tabs it always ticks."""
    tab = Context.block
    while tab is not None and not isinstance(tab, gr.Tab):
        tab = tab.parent
    tabs = tab.parent if tab is not None else None
    if tab is None or not isinstance(tabs, gr.Tabs):
        return gr.Timer(seconds)
    timer = gr.Timer(seconds, active=False)
    name = tab.label

    def looked_at(chosen: gr.SelectData) -> gr.Timer:
        return gr.Timer(active=chosen.value == name)

    # One after another and none left out, however fast tabs are changed: the last one decides.
    tabs.select(looked_at, None, timer, show_progress="hidden", trigger_mode="multiple", concurrency_limit=1)
    return timer
