"""The Play page: the form on the left, results on the right.

Generations run in a worker's thread and land in the history; the page only submits and polls. So a reload loses
nothing, and two open pages queue behind each other.
"""

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from sa3train.inference.settings import MODEL_DEFAULTS
from sa3train.studio.play import cards, history
from sa3train.studio.play import form as forms
from sa3train.studio.play.player import Player, check_request, find_missing_contrast, plan_comparison
from sa3train.studio.play.settings import (
    MODES,
    SIBLING_LABEL,
    STRENGTHS_LABEL,
    PlaySettings,
    parse_strengths,
    round_seconds,
)
from sa3train.studio.server.folders import describe_model, list_audio, list_models, load_model_config
from sa3train.studio.server.jobs import Job, Worker
from sa3train.studio.server.widgets import (
    QUIET,
    in_order,
    keep_fresh,
    render_notice,
    render_placeholder,
    show_errors,
    watch_state,
)
from sa3train.studio.server.workspace import StudioError, Workspace

POLL_SECONDS = 0.4
PER_PAGE = 12
"""Results shown at first; `assets/studio.css` hides the button for more below as many."""
RESULTS_IN_ORDER = in_order("play-results")
MAX_TITLE = 60
STATUS_JS = (
    "element.addEventListener('click', event => { const button = event.target.closest('[data-cancel]'); "
    "if (button) trigger('cancel', {number: Number(button.dataset.cancel)}); });"
)
RESULTS_JS = (
    "sa3.list(element.firstElementChild, props, watch, (action, name) => { trigger('act', {action, name}); "
    "document.getElementById('play-model').scrollIntoView(); });"
)
NO_REPORT = "Add adapters and press Check to see which layers match the model and how much each changes it."


@dataclass(frozen=True)
class Results:
    """The components on the right side of the page.

    Attributes:
        status: Pending jobs.
        items: Cards of results.
        more: Button that shows earlier results.
        shown: Number of results shown.
        seen: State that `items` was drawn from.
        watch: Tells of changes.
    """

    status: gr.HTML
    items: gr.HTML
    more: gr.Button
    shown: gr.State
    seen: gr.State
    watch: gr.HTML

    @property
    def outputs(self) -> list[Any]:
        """Outputs of events that refresh the results."""
        return [self.status, self.items, self.seen]


@dataclass(frozen=True)
class PlayPage:
    """What the page's events work with.

    Attributes:
        workspace: The studio's folders.
        player: Generates.
        worker: Runs jobs one after the other.
    """

    workspace: Workspace
    player: Player
    worker: Worker

    def get_state(self, shown: int) -> tuple[str, str]:
        """Return what polling looks at.

        Args:
            shown: Number of results shown.

        Returns:
            The status as HTML, and a text that changes when the results must be drawn again.
        """
        return cards.render_status(self.worker.jobs), f"{shown} {history.compute_state(self.workspace)}"

    def list_items(self, shown: int) -> list[dict[str, str]]:
        """List the cards of the latest results.

        Args:
            shown: How many.

        Returns:
            `key` and `html` of each card.
        """
        groups = history.group_results(history.list_results(self.workspace, shown * 4))
        return cards.list_cards(self.workspace, groups[:shown])

    def refresh(self, shown: int) -> tuple[Any, ...]:
        """Return values for `Results.outputs` after a change.

        Args:
            shown: Number of results shown.

        Returns:
            One value per output.
        """
        status, state = self.get_state(shown)
        return status, self.list_items(shown), state

    def submit(self, request: PlaySettings) -> Job:
        """Check a generation and queue it.

        Args:
            request: What to generate.

        Returns:
            The job.
        """
        check_request(self.workspace, request.resolve(self.workspace))
        return self.worker.submit(_shorten_prompt(request), lambda job: self.player.play(request, job))

    def compare(self, request: PlaySettings, strengths: str, with_sibling: bool) -> Job:
        """Check a comparison and queue it.

        Args:
            request: What to generate.
            strengths: Comma-separated multipliers of the adapters' strengths.
            with_sibling: Whether to compare with the model's sibling too.

        Returns:
            The job.

        Raises:
            StudioError: When there would be nothing to compare.
        """
        factors, resolved = parse_strengths(strengths), request.resolve(self.workspace)
        missing = find_missing_contrast(resolved, factors, with_sibling)
        if missing:
            raise StudioError(missing)
        cells = plan_comparison(resolved, factors, with_sibling)
        # Once per model, with adapters where there are any: factors change nothing that is checked.
        by_adapters = sorted((cell.request for cell in cells), key=lambda cell: len(cell.adapters))
        for each in {cell.model: cell for cell in by_adapters}.values():
            check_request(self.workspace, each)
        title = f"Compare: {_shorten_prompt(request)}"
        return self.worker.submit(title, lambda job: self.player.compare(resolved, factors, with_sibling, job))


def build_play_page(workspace: Workspace) -> None:
    """Build the page inside the open context.

    Args:
        workspace: The studio's folders.
    """
    page = PlayPage(workspace, Player(workspace), Worker())
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=380):
            form = forms.build_form(workspace)
            generate = gr.Button("Generate", variant="primary", elem_id="play-generate")
            with gr.Accordion("Compare, same seed", open=False, elem_id="play-compare-box"):
                strengths = gr.Textbox(
                    "0, 0.5, 1",
                    label=STRENGTHS_LABEL,
                    info="Multiply each adapter's strength; 0 is without adapters.",
                    elem_id="play-strengths",
                )
                sibling = gr.Checkbox(label=SIBLING_LABEL, elem_id="play-sibling")
                compare = gr.Button("Generate grid", elem_id="play-compare")
            with gr.Accordion("Load report", open=False, elem_id="play-report-box"):
                check = gr.Button("Check adapters on this model", size="sm", elem_id="play-check")
                report = gr.HTML(render_placeholder(NO_REPORT), elem_id="play-report", apply_default_css=False)
        with gr.Column(scale=7, min_width=420):
            results = _build_results(page)
    _connect_form(workspace, form)
    _connect_results(page, form, results)

    def read(values: tuple[Any, ...]) -> PlaySettings:
        return forms.read_form(dict(zip(form.inputs, values, strict=True)))

    def on_generate(shown: int, *values: Any) -> tuple[Any, ...]:
        page.worker.forget_failed()
        _notify_queued(page, page.submit(read(values)))
        return page.refresh(shown)

    def on_compare(shown: int, strengths: str, with_sibling: bool, *values: Any) -> tuple[Any, ...]:
        page.worker.forget_failed()
        _notify_queued(page, page.compare(read(values), strengths, with_sibling))
        return page.refresh(shown)

    def on_check(*values: Any) -> str:
        request = read(values)
        if not request.adapters:
            return render_placeholder(NO_REPORT)
        job = page.worker.submit("Check adapters", lambda job: page.player.check_adapters(request, job))
        job.finished.wait()
        return cards.render_load_reports(job.result) if job.state == "done" else render_notice(job.message, "error")

    inputs = list(form.inputs.values())
    generate.click(show_errors(on_generate), [results.shown, *inputs], results.outputs, **RESULTS_IN_ORDER)
    compare_inputs = [results.shown, strengths, sibling, *inputs]
    compare.click(show_errors(on_compare), compare_inputs, results.outputs, **RESULTS_IN_ORDER)
    check.click(show_errors(on_check), inputs, report, concurrency_limit=None, api_visibility="private")


def _build_results(page: PlayPage) -> Results:
    gr.HTML("<h2>Results</h2>", elem_classes="studio-title", apply_default_css=False)
    status = gr.HTML(
        lambda: page.get_state(PER_PAGE)[0], js_on_load=STATUS_JS, elem_id="play-status", apply_default_css=False
    )
    items = gr.HTML(
        lambda: page.list_items(PER_PAGE),
        html_template='<div class="results"></div>',
        js_on_load=RESULTS_JS,
        elem_id="play-results",
        apply_default_css=False,
        padding=False,
    )
    more = gr.Button("Show earlier results", size="sm", elem_id="play-earlier")
    watch = watch_state(lambda: page.get_state(PER_PAGE), POLL_SECONDS)
    return Results(status, items, more, gr.State(PER_PAGE), gr.State(""), watch)


def _connect_form(workspace: Workspace, form: forms.Form) -> None:
    fields = form.inputs

    def on_model(model: str) -> tuple[Any, ...]:
        config = load_model_config(workspace, model)
        defaults = {} if config is None else MODEL_DEFAULTS[config.objective]
        placeholders = [f"{defaults[name]:g}" if defaults else "" for name in ("steps", "cfg_scale")]
        return describe_model(workspace, model), *(gr.update(placeholder=text) for text in placeholders)

    def on_mode(mode: str) -> tuple[Any, ...]:
        code = MODES[mode]
        inpaints = code in ("inpaint", "continue")
        return tuple(gr.update(visible=each) for each in (code != "text", code == "restyle", inpaints, code != "text"))

    def on_source(
        source: str | None, mode: str, duration: float | None, drawn: dict[str, Any] | None, model: str
    ) -> tuple[Any, dict[str, Any]]:
        before, code = drawn or {}, MODES[mode]
        is_known = bool(source) and (before.get("url"), before.get("mode")) == (workspace.get_url(source or ""), code)
        regions = before.get("regions", []) if is_known else []
        # `edited` tells the script whether an answer belongs to what is drawn now or to what was drawn before.
        found = forms.describe_waveform(workspace, source, code, duration, regions) | {
            "edited": before.get("edited", 0)
        }
        continues = code == "continue"
        if is_known or "seconds" not in found or (continues and found["regions"]):
            return gr.skip(), found
        config = load_model_config(workspace, model)
        longest = config.sample_size / config.sample_rate if config else found["seconds"]
        seconds = min(round_seconds(found["seconds"] * (1.5 if continues else 1)), longest)
        if code == "inpaint":
            region = [round(seconds / 3, 2), round(2 * seconds / 3, 2)]
            found |= {"duration": seconds, "regions": [region]}
        return seconds, found

    def list_files() -> tuple[Any, ...]:
        models, audio = list_models(workspace), list_audio(workspace)
        return gr.update(choices=models), gr.update(choices=audio), forms.render_adapter_files(workspace)

    def on_rack(rack: dict[str, Any] | None, seen: list[str]) -> tuple[Any, ...]:
        paths = [row["path"] for row in (rack or {}).get("rows") or []]
        if paths == seen:
            return gr.skip(), gr.skip()
        prompts = forms.list_offered_prompts(workspace, rack)
        return gr.update(choices=prompts, value=None, visible=bool(prompts)), paths

    seen = gr.State([])
    fields["rack"].change(show_errors(on_rack), [fields["rack"], seen], [form.offered, seen], **QUIET)
    form.offered.input(lambda prompt: prompt, form.offered, fields["prompt"], **QUIET)
    lists = [fields["model"], fields["source"], form.adapters]
    keep_fresh(lambda: [str(each) for each in list_files()], show_errors(list_files), None, lists)
    # Without a trigger: when the page is loaded, and when an input changes.
    gr.on(None, show_errors(on_model), fields["model"], [form.facts, fields["steps"], fields["cfg_scale"]], **QUIET)
    drawn = [fields[name] for name in ("source", "mode", "duration", "regions", "model")]
    boxes = [form.source_box, *(fields[name] for name in ("init_noise_level", "keep_exact", "regions"))]
    mode_shown = fields["mode"].change(on_mode, fields["mode"], boxes, **QUIET)
    for event in (mode_shown.then, fields["source"].change, fields["duration"].change):
        event(show_errors(on_source), drawn, [fields["duration"], fields["regions"]], **in_order("play-waveform"))
    form.upload.upload(lambda path: path, form.upload, fields["source"], **QUIET)


def _connect_results(page: PlayPage, form: forms.Form, results: Results) -> None:
    workspace = page.workspace

    def on_tick(shown: int, seen: str) -> tuple[Any, ...]:
        status, state = page.get_state(shown)
        return status, gr.skip() if state == seen else page.list_items(shown), state

    def on_cancel(shown: int, event: gr.EventData) -> tuple[Any, ...]:
        page.worker.cancel(int(event.number))
        return page.refresh(shown)

    def on_more(shown: int) -> tuple[Any, ...]:
        shown += PER_PAGE
        return shown, page.list_items(shown)

    def on_act(rack: dict[str, Any] | None, event: gr.EventData) -> list[Any]:
        result = history.find_result(workspace, str(event.name))
        if event.action == "again":
            request = PlaySettings.from_record(result.record, result.audio.parent)
        elif event.action in MODES.values():
            request = PlaySettings.from_result(result.record, result.audio, event.action)
        else:
            raise StudioError(f"There is no action {event.action!r} for a result.")
        values = forms.fill_form(workspace, request)
        before, after = ([row["path"] for row in (each or {}).get("rows") or []] for each in (rack, values["rack"]))
        if before or after:
            gr.Info(f"Adapters are now those of the result: {', '.join(map(escape, after)) or 'none'}.")
        return [values[name] for name in form.inputs]

    # A change that is told of while the one before is being drawn is drawn after it.
    latest = RESULTS_IN_ORDER | {"trigger_mode": "always_last"}
    results.watch.tick(show_errors(on_tick), [results.shown, results.seen], results.outputs, **latest)
    results.status.cancel(show_errors(on_cancel), results.shown, results.outputs, **RESULTS_IN_ORDER)
    results.more.click(show_errors(on_more), results.shown, [results.shown, results.items], **RESULTS_IN_ORDER)
    # None left out, one after the other: the form shows the action that was asked for last.
    one_by_one = QUIET | {"concurrency_limit": 1, "trigger_mode": "multiple"}
    results.items.act(show_errors(on_act), form.inputs["rack"], list(form.inputs.values()), **one_by_one)


def _notify_queued(page: PlayPage, job: Job) -> None:
    ahead = page.worker.count_ahead(job)
    if ahead:
        gr.Info(f"Queued: {ahead} generation{'s' if ahead > 1 else ''} ahead.")


def _shorten_prompt(request: PlaySettings) -> str:
    prompt = str(request.settings.prompt).strip()
    return prompt if len(prompt) <= MAX_TITLE else f"{prompt[: MAX_TITLE - 3]}…"
