"""The look of the run report: page, style and the little script that lets one compare by ear."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The page may load nothing: whatever is shown is inside it."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #ffffff; --ink: #1f2023; --soft: #63656c; --rule: #e2dfd9;
  --heldout: #0b6e8f; --train: #c2571a; --base: #7b7d85; --third: #6d4aa8; --fourth: #2e7d43; --good: #1c7a3d;
  --bad: #b3261e; --mark: #f0ece4 }
@media (prefers-color-scheme: dark) { :root { --paper: #16171a; --card: #1e2024; --ink: #e9e8e4; --soft: #a3a5ad;
  --rule: #34363c; --heldout: #56b9d8; --train: #f0935a; --base: #8f929b; --third: #b59be6; --fourth: #7cc98f;
  --good: #7cd197; --bad: #ff8a80; --mark: #282a2f } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 74rem; margin: 0 auto; padding: 2.2rem 1.4rem 5rem }
h1 { font-size: 1.9rem; margin: 0; letter-spacing: -.02em } h2 { font-size: 1.25rem; margin: 3rem 0 .3rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem } p { margin: .4rem 0; max-width: 48rem }
.soft, small, figcaption small { color: var(--soft) } .lead { font-size: 1.12rem; margin: .9rem 0 }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1rem 0 0 } a { color: var(--heldout) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.6rem, 1fr)); gap: .7rem; margin: 1.3rem 0 }
.tile, .chart, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px }
.tile { padding: .7rem .9rem } .tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: 13px } .good { color: var(--good) } .bad { color: var(--bad) }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(21rem, 1fr)); gap: .9rem; margin: .9rem 0 }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(12.5rem, 1fr)); gap: .6rem }
.chart { margin: 0; padding: .7rem .8rem } figcaption { font-weight: 600; font-size: 14px }
figcaption small { display: block; font-weight: 400; font-size: 12.5px }
svg { display: block; width: 100%; height: auto }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif } svg .label { font-style: italic }
.small svg text { font-size: 12px } .small .chart { padding: .5rem .6rem } .small .legend { display: none }
.grid { stroke: var(--rule); stroke-width: 1 } .curve { fill: none; stroke-width: 2; stroke-linejoin: round }
.curve.dashed { stroke-dasharray: 5 4; stroke-width: 1.6 } .curve.faint { opacity: .3; stroke-width: 1.2 }
.c-heldout { stroke: var(--heldout); color: var(--heldout) } .c-train { stroke: var(--train); color: var(--train) }
.c-base { stroke: var(--base); color: var(--base) } .c-third { stroke: var(--third); color: var(--third) }
.c-fourth { stroke: var(--fourth); color: var(--fourth) } circle { fill: var(--card); stroke-width: 1.6 }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: 12.5px; color: var(--soft) }
.legend i { display: inline-block; width: 1.2em; border-top: 2px solid currentColor; vertical-align: middle;
  margin-right: .35em } .legend i.dashed { border-top-style: dashed }
table { border-collapse: collapse; width: 100%; font-size: 14px } .scroll { overflow-x: auto }
td, th { text-align: left; vertical-align: top; padding: .28rem .6rem .28rem 0; border-bottom: 1px solid var(--rule) }
th { font-weight: 600 } .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.bars th { font-weight: 400; width: 1%; white-space: nowrap } .bars .bar { width: 70% }
.bar i { display: block; height: .8em; margin-top: .35em; border-radius: 3px; background: currentColor;
  min-width: 1px }
.card { padding: 1rem 1.1rem; margin: .9rem 0 } .card > h3:first-child { margin-top: 0 }
.takes { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .9rem 1.1rem;
  margin: .5rem 0 }
.take b { font-weight: 600 } .take audio { width: 100%; height: 2.3rem; display: block }
.picture { position: relative; height: 96px; border-radius: 6px; overflow: hidden; cursor: pointer; margin: .3rem 0 }
.picture img { width: 100%; height: 100%; display: block }
.picture i { position: absolute; inset: 0 auto 0 0; width: 2px;
  background: #fff; opacity: 0 } .playing .picture i { opacity: .9 } .take small { font-size: 12.5px }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--heldout) }
pre { background: var(--mark); padding: .8rem 1rem; border-radius: 8px; overflow-x: auto; font-size: 12.5px;
  line-height: 1.45; white-space: pre-wrap } code { font-size: .92em; background: var(--mark); padding: .1em .35em;
  border-radius: 4px }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: .4rem 1.8rem }
@media print { details { display: block } audio { display: none } }
"""

SCRIPT = """
const takes = [...document.querySelectorAll('.take')].filter(take => take.querySelector('audio'));
let last = null;
for (const take of takes) {
  const audio = take.querySelector('audio'), picture = take.querySelector('.picture');
  const head = picture && picture.querySelector('i');
  audio.addEventListener('play', () => {
    const other = last && last !== audio && last.closest('.take');
    if (other && !last.paused) {
      if (other.dataset.group === take.dataset.group) audio.currentTime = last.currentTime;
      last.pause();
    }
    last = audio; take.classList.add('playing');
    const follow = () => {
      if (head) head.style.left = 100 * audio.currentTime / (audio.duration || 1) + '%';
      if (!audio.paused) requestAnimationFrame(follow);
    };
    follow();
  });
  if (picture) picture.addEventListener('click', event => {
    const box = picture.getBoundingClientRect();
    audio.currentTime = (event.clientX - box.left) / box.width * (audio.duration || 0); audio.play();
  });
}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading, a sentence on how to read it, and its HTML."""

    title: str
    lead: str
    body: str

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return self.title.lower().replace(" ", "-")


def page(title: str, head: str, sections: Sequence[Section]) -> str:
    """The whole document. `head` is HTML for above the sections; sections without a body are left out."""
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in shown)
    parts = "".join(
        f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>'
        f'<p class="soft">{escape(section.lead)}</p>{section.body}</section>\n'
        for section in shown
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><main>{head}<nav>{links}</nav>\n{parts}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def tile(value: str, label: str, mood: str = "") -> str:
    """A key figure; `mood` is good, bad or nothing."""
    return f'<div class="tile"><b class="{mood}">{escape(value)}</b><span>{escape(label)}</span></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of HTML cells; columns in `numbers` are aligned as numbers."""
    marks = ['class="n"' if column in numbers else "" for column in range(len(head))]
    top = "".join(f"<th {mark}>{escape(name)}" for mark, name in zip(marks, head, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td {mark}>{cell}" for mark, cell in zip(marks, row, strict=True)) for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}{lines}</table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, as text."""
    lines = "".join(f"<tr><th>{escape(name)}<td>{escape(value)}" for name, value in rows)
    return f"<table>{lines}</table>"


def folded(title: str, body: str, opened: bool = False) -> str:
    """HTML that opens on a click."""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>"
