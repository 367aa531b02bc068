"""The Play page: settings on the left, what was made on the right.

Work is done by a thread of its own (`work.py`) and lands in the history; the page only asks and looks. So a reload
loses nothing, and two pages at once queue behind each other.
"""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from sa3train.studio.play import cards, history
from sa3train.studio.play.form import Form, build_form, drawing, values_of, wish_of
from sa3train.studio.play.player import Player, without_effect
from sa3train.studio.play.request import MODES, Mode, Wish, factors
from sa3train.studio.server.jobs import Job, Worker
from sa3train.studio.server.widgets import empty, notice, told
from sa3train.studio.server.workspace import (
    StudioError,
    Workspace,
    describe_model,
    get_generation_defaults,
    list_audio,
    list_models,
    read_model_config,
)

TICK = 0.4
IDLE = 5.0
"""Seconds between looks while nothing is at work: a look that is answered late must not end the looking."""
PER_PAGE = 12
STATUS_JS = (
    "element.addEventListener('click', event => { const button = event.target.closest('[data-cancel]'); "
    "if (button) trigger('cancel', {number: Number(button.dataset.cancel)}); });"
)
RESULTS_JS = "sa3.list(element.firstElementChild, props, watch, (action, name) => trigger('act', {action, name}));"
NO_REPORT = "Add adapters and press Check: it says what fits the model, and how much each changes it."


@dataclass(frozen=True)
class Results:
    """The right side of the page."""

    status: gr.HTML
    items: gr.HTML
    more: gr.Button
    shown: gr.State
    seen: gr.State
    timer: gr.Timer


@dataclass(frozen=True)
class Studio:
    """What the page's events work with."""

    workspace: Workspace
    player: Player
    worker: Worker

    def glance(self, shown: int) -> tuple[str, str]:
        """The status as HTML, and a text that changes when the list of results must be drawn anew."""
        return cards.status(self.worker.jobs), f"{shown} {history.state_of(self.workspace)}"

    def items(self, shown: int) -> list[dict[str, str]]:
        """The latest results, for the page's script."""
        groups = history.grouped(history.entries(self.workspace, shown * 4))
        return cards.result_items(self.workspace, groups[:shown])

    def submit(self, wish: Wish) -> Job:
        """Queue a generation."""
        wish.checked(self.workspace)
        return self.worker.submit(_title(wish), lambda job: self.player.play(wish, job))

    def compare(self, wish: Wish, strengths: str, sibling: bool) -> Job:
        """Queue a comparison."""
        values = factors(strengths)
        checked = wish.checked(self.workspace)
        reason = without_effect(checked, values, sibling)
        if reason:
            raise gr.Error(reason, print_exception=False)
        if sibling:
            checked.on_sibling()
        run = self.player.compare
        return self.worker.submit(f"Compare: {_title(wish)}", lambda job: run(checked, values, sibling, job))


def play_page(workspace: Workspace) -> None:
    """Build the page inside the open context."""
    studio = Studio(workspace, Player(workspace), Worker())
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=380):
            form = build_form(workspace)
            generate = gr.Button("Generate", variant="primary", elem_id="play-generate")
            strengths, sibling, compare = _comparing()
            check, report = _reporting()
        with gr.Column(scale=7, min_width=420):
            results = _results(studio)
    outputs = [results.status, results.items, results.seen, results.timer]
    _form_events(workspace, form)
    _result_events(studio, form, results)

    def on_generate(shown: int, *values: Any) -> tuple[Any, ...]:
        _queued(studio, studio.submit(wish_of(*values)))
        return _fresh(studio, shown)

    def on_compare(shown: int, factor_text: str, with_sibling: bool, *values: Any) -> tuple[Any, ...]:
        _queued(studio, studio.compare(wish_of(*values), factor_text, with_sibling))
        return _fresh(studio, shown)

    def on_check(*values: Any) -> str:
        wish = wish_of(*values)
        if not wish.adapters:
            return empty(NO_REPORT)
        job = studio.worker.submit("Check adapters", lambda job: studio.player.check(wish, job))
        job.over.wait()
        return cards.load_reports(job.result) if job.state == "done" else notice(job.message, "error")

    quick: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    inputs = form.fields
    generate.click(told(on_generate), [results.shown, *inputs], outputs, **quick)
    compare.click(told(on_compare), [results.shown, strengths, sibling, *inputs], outputs, **quick)
    check.click(told(on_check), inputs, report, concurrency_limit=None, api_visibility="private")


def _reporting() -> tuple[gr.Button, gr.HTML]:
    with gr.Accordion("Load report", open=False, elem_id="play-report-box"):
        check = gr.Button("Check adapters on this model", size="sm", elem_id="play-check")
        report = gr.HTML(empty(NO_REPORT), elem_id="play-report", apply_default_css=False)
    return check, report


def _comparing() -> tuple[gr.Textbox, gr.Checkbox, gr.Button]:
    with gr.Accordion("Compare, same seed", open=False, elem_id="play-compare-box"):
        strengths = gr.Textbox(
            "0, 0.5, 1", label="Strengths, times each adapter's own (0: without adapters)", elem_id="play-strengths"
        )
        sibling = gr.Checkbox(label="Base and post-trained model side by side", elem_id="play-sibling")
        compare = gr.Button("Generate the grid", elem_id="play-compare")
    return strengths, sibling, compare


def _results(studio: Studio) -> Results:
    gr.HTML("<h2>Results</h2>", elem_classes="studio-title", apply_default_css=False)
    status = gr.HTML(
        lambda: studio.glance(PER_PAGE)[0], js_on_load=STATUS_JS, elem_id="play-status", apply_default_css=False
    )
    items = gr.HTML(
        lambda: studio.items(PER_PAGE),
        html_template='<div class="results"></div>',
        js_on_load=RESULTS_JS,
        elem_id="play-results",
        apply_default_css=False,
        padding=False,
    )
    more = gr.Button("Show earlier results", size="sm", elem_id="play-earlier")
    return Results(status, items, more, gr.State(PER_PAGE), gr.State(""), gr.Timer(TICK))


def _form_events(workspace: Workspace, form: Form) -> None:
    quick: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}

    def on_model(model: str) -> tuple[Any, ...]:
        config = read_model_config(workspace, model)
        if config is None:
            blank = gr.update(placeholder="")
            return describe_model(workspace, model), blank, blank
        steps, cfg, _ = get_generation_defaults(config)
        return describe_model(workspace, model), _default(steps), _default(cfg)

    def on_mode(mode: str) -> tuple[Any, ...]:
        code = MODES[mode]
        inpaints = code in ("inpaint", "continue")
        shown = [code != "text", code == "restyle", inpaints, code != "text"]
        return tuple(gr.update(visible=each) for each in shown)

    def on_source(
        source: str | None, mode: str, duration: float | None, drawn: dict[str, Any] | None
    ) -> dict[str, Any]:
        code = MODES[mode]
        same = bool(source and drawn) and (drawn or {}).get("url") == workspace.url(source or "")
        regions = (drawn or {}).get("regions", []) if same and not (drawn or {}).get("fixed") else []
        # `edited` lets the page tell an answer to what is drawn from one to what was drawn before.
        return drawing(workspace, source, code, duration, regions) | {"edited": (drawn or {}).get("edited", 0)}

    def on_load() -> tuple[Any, ...]:
        return gr.update(choices=list_models(workspace)), gr.update(choices=list_audio(workspace))

    # Without a trigger: when the page is loaded, and when an input changes.
    gr.on(None, told(on_model), form.model, [form.facts, form.steps, form.cfg], **quick)
    gr.on(None, told(on_load), None, [form.model, form.source], **quick)
    drawn = [form.source, form.mode, form.duration, form.regions]
    boxes = [form.source_box, form.level, form.exact, form.regions]
    in_order = quick | {"concurrency_limit": 1, "concurrency_id": "play-drawing"}
    moded = form.mode.change(on_mode, form.mode, boxes, **quick)
    for event in (moded.then, form.source.change, form.duration.change):
        event(told(on_source), drawn, form.regions, **in_order)
    form.upload.upload(lambda path: path, form.upload, form.source, **quick)


def _result_events(studio: Studio, form: Form, results: Results) -> None:
    workspace = studio.workspace
    quick: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    outputs = [results.status, results.items, results.seen, results.timer]

    def on_tick(shown: int, seen: str) -> tuple[Any, ...]:
        status, state = studio.glance(shown)
        items = gr.skip() if state == seen else studio.items(shown)
        return status, items, state, gr.skip() if studio.worker.pending else gr.Timer(IDLE)

    def on_cancel(shown: int, event: gr.EventData) -> tuple[Any, ...]:
        studio.worker.cancel(int(event.number))
        return _fresh(studio, shown)

    def on_more(shown: int) -> tuple[Any, ...]:
        shown += PER_PAGE
        return shown, studio.items(shown)

    def on_act(event: gr.EventData) -> list[Any]:
        found = history.entry(workspace, str(event.name))
        if event.action == "again":
            return values_of(workspace, Wish.of_record(found.record))
        return values_of(workspace, Wish.from_result(found.record, found.audio, _mode(str(event.action))))

    results.timer.tick(told(on_tick), [results.shown, results.seen], outputs, **quick)
    results.status.cancel(told(on_cancel), results.shown, outputs, **quick)
    results.more.click(told(on_more), results.shown, [results.shown, results.items], **quick)
    results.items.act(told(on_act), None, form.fields, **quick)


def _mode(action: str) -> Mode:
    """The mode that a result's button asks for. Raises `StudioError` for no such button."""
    found = next((mode for mode in MODES.values() if mode == action), None)
    if found is None:
        raise StudioError(f"a result cannot be used for {action!r}.")
    return found


def _fresh(studio: Studio, shown: int) -> tuple[Any, ...]:
    status, state = studio.glance(shown)
    return status, studio.items(shown), state, gr.Timer(TICK)


def _queued(studio: Studio, job: Job) -> None:
    ahead = studio.worker.ahead(job)
    if ahead:
        gr.Info(f"Queued: {ahead} generation{'s' if ahead > 1 else ''} before this one.")


def _default(value: float) -> Any:
    return gr.update(placeholder=f"{value:g}")


def _title(wish: Wish) -> str:
    prompt = wish.prompt.strip()
    return prompt if len(prompt) <= 60 else f"{prompt[:57]}…"
