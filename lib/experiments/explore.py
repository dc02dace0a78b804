"""What `notebooks/00_explore` shows: traces to browse, base and tuned model side by side, completions step by step.

    run = explore.find("")               # the run that was trained last; None where there is none
    explore.traces(stages.store())       # filters and a slider in JupyterLab; a table and a card anywhere else

Each view has two forms in one output: ipywidgets, which JupyterLab moves, and HTML that stands still, which is what
papermill stores for the page. Nothing here writes into a run.
"""

from collections.abc import Callable, Sequence
from html import escape
from itertools import islice
from typing import NamedTuple

import ipywidgets as widgets
from IPython.display import Markdown, display

from lib.cards import brief, card, visible
from lib.config import EvaluationConfig, load_config
from lib.data.renderer import encode_prompt, render_prompt
from lib.data.store import Store
from lib.errors import RequestError, RetraceError
from lib.evaluation.evalsets import EvalItem
from lib.evaluation.results import ItemResult, read_results
from lib.evaluation.scoring import extract_answer, reasoning_steps, score_item
from lib.experiments import report, stages
from lib.experiments.display import completion, side_by_side
from lib.experiments.markdown import inline
from lib.experiments.run import CONFIG, Run, find_run, run_folders
from lib.tasks import check_steps
from lib.trace import Trace

BROWSED = 2000  # traces that are held to browse in
LISTED = 5
NOTHING = (
    "**Nothing is trained here yet.** Run `make quickstart` (four minutes) or `python -m lib run configs/smoke.yaml` "
    "(one), or the notebooks from [1 · Traces](01_traces.ipynb) to [5 · Compare](05_compare.ipynb); then run this one "
    "again."
)
ANY = ("any", None)


class Chosen(NamedTuple):
    """A token that a model wrote, with its probability and the likeliest ones at its place."""

    text: str
    probability: float
    likeliest: list[tuple[str, float]]


class Answer(NamedTuple):
    """What one model answered, checked where the item's task is known, and how sure it was of each token."""

    model: str
    item: ItemResult
    tokens: list[Chosen]


def find(run_dir: str) -> Run | None:
    """The run of this folder or name, or else the one that was trained last; None where none is trained.

    Raises RequestError where `run_dir` names no run, or one that is not trained.
    """
    folders = [find_run(run_dir)] if run_dir else run_folders()
    trained = {folder: folder / "checkpoint-final" / "model.json" for folder in folders if (folder / CONFIG).is_file()}
    found = [folder for folder, file in trained.items() if file.is_file()]
    if run_dir and not found:
        raise RequestError(f"{run_dir}: not trained, or not by a run (no checkpoint-final, or no {CONFIG})")
    if not found:
        return None
    folder = max(found, key=lambda folder: trained[folder].stat().st_mtime)
    return Run(folder, load_config(folder / CONFIG))


def about(run: Run | None) -> Run | Markdown:
    """The run, which shows itself, or what to do first."""
    return run or Markdown(NOTHING)


def conclusion(run: Run | None) -> Markdown:
    """What the run came to, or what to do next."""
    said = run and (run.conclusion("05_compare") or run.conclusion("03_train"))
    return Markdown(NOTHING) if run is None else Markdown(inline(said or f"{run.name} is trained."))


# ---- traces ------------------------------------------------------------------------------------------------


def traces(store: Store) -> None:
    """Browse the store: a text that a trace holds, a value of its meta, and a slider over what is left."""
    found = list(islice(store.scan(), BROWSED))
    if not found:
        return display(Markdown(f"The store holds no trace. {NOTHING}"))
    contains = widgets.Text(description="contains", placeholder="question, steps or answer")
    meta = widgets.Dropdown(description="meta", options=[ANY, *_meta_options(found)])
    place = widgets.IntSlider(description="trace", min=1, max=len(found))
    shown = widgets.HTML()

    def draw(_: object = None) -> None:
        chosen = matching(found, contains.value, meta.value)
        place.max = max(1, len(chosen))
        card_of = chosen[place.value - 1]._repr_html_() if chosen else "<p>No trace is left: take a filter away.</p>"
        shown.value = f"<p>{len(chosen):,} of {len(found):,} traces</p>{card_of}"

    _draw_on_change(draw, contains, meta, place)
    some = [{"question": brief(t.prompt, 100), "steps": len(t.steps), "answer": t.final_answer} for t in found[:LISTED]]
    still = f"<p>{store.count():,} traces, of which these are the first</p>{report.show_table(some).data}"
    _live(widgets.VBox([widgets.HBox([contains, meta, place]), shown]), still + found[0]._repr_html_())


def matching(found: Sequence[Trace], contains: str, meta: tuple[str, object] | None) -> list[Trace]:
    """The traces with this text anywhere in question, steps or answer, and this value of this key of their meta."""
    wanted = contains.casefold()
    return [
        trace
        for trace in found
        if (meta is None or trace.meta.get(meta[0]) == meta[1])
        and any(wanted in text.casefold() for text in (trace.prompt, trace.final_answer, *_contents(trace)))
    ]


def _contents(trace: Trace) -> list[str]:
    return [step.content for step in trace.steps]


def _meta_options(found: Sequence[Trace]) -> list[tuple[str, tuple[str, object]]]:
    """Each value that some, but not too many different ones, share: (`game = high_card_duel`, ("game", …))."""
    values: dict[str, set] = {}
    for trace in found:
        for key, value in trace.meta.items():
            if not isinstance(value, dict | list):
                values.setdefault(key, set()).add(value)
    few = {key: sorted(held, key=str) for key, held in values.items() if len(held) <= 20}
    return [(brief(f"{key} = {value}"), (key, value)) for key, held in sorted(few.items()) for value in held]


# ---- base and tuned, side by side --------------------------------------------------------------------------


def ask(run: Run | None, question: str = "") -> None:
    """Ask the base and the tuned model the same question: one of the eval set, or any that is typed.

    Below each answer its tokens, the darker the less sure, and what else the model had in mind at one of them.
    """
    if run is None:
        return display(Markdown(NOTHING))
    both = models(run)
    items = stages.find_eval_set(run.config.evaluation.eval_set).items[: run.config.evaluation.limit]
    of_item = {item.prompt: item for item in items}
    chosen = widgets.Dropdown(description="item", options=[(brief(item.prompt, 90), item.prompt) for item in items])
    typed = widgets.Textarea(description="question", value=question or items[0].prompt, layout={"width": "60%"})
    button = widgets.Button(description="Ask both", button_style="primary")
    place = widgets.IntSlider(description="token", min=1, max=1)
    shown, inside = widgets.HTML(), widgets.HTML()
    answers: list[Answer] = []

    def asked(_: object = None) -> None:
        button.disabled = True
        try:
            answers[:] = answer(both, typed.value, run, of_item.get(typed.value))
            shown.value = _side_by_side(answers)
            place.max = max(1, *(len(given.tokens) for given in answers))
            looked()
        except RetraceError as error:
            shown.value = card("Not asked", {"because": str(error)})
        finally:
            button.disabled = False

    def looked(_: object = None) -> None:
        inside.value = side_by_side([_alternatives(given, place.value - 1) for given in answers])

    def taken(_: object = None) -> None:
        typed.value = chosen.value

    button.on_click(asked)
    place.observe(looked, "value")
    chosen.observe(taken, "value")
    asked()
    unsure = [min(range(len(a.tokens)), key=lambda at: a.tokens[at].probability, default=0) for a in answers]
    least = side_by_side([_alternatives(given, at) for given, at in zip(answers, unsure, strict=True)])
    still = f"{shown.value}<p>Where each was least sure</p>{least}"
    _live(widgets.VBox([chosen, widgets.HBox([typed, button]), shown, place, inside]), still)


def models(run: Run) -> dict[str, object]:
    """The base model and the tuned one of a run, by the names of the evaluation."""
    from lib.model.weights import load_model

    return {"base": stages.model_before(run.config), "tuned": load_model(run.path("checkpoint-final"))}


def answer(both: dict[str, object], question: str, run: Run, item: EvalItem | None = None) -> list[Answer]:
    """The answer of each model, decoded as the run's evaluation does; scored where it is a question of an item.

    Raises RequestError where there is no question.
    """
    if not question.strip():
        raise RequestError("question: expected some words, got none")
    prompt = render_prompt(question, run.config.system_instruction)
    return [_answer(f"{model.name} ({name})", model, prompt, run.config.evaluation, question, item)
            for name, model in both.items()]  # fmt: skip


def _answer(
    label: str, model: object, prompt: str, config: EvaluationConfig, question: str, item: EvalItem | None
) -> Answer:
    from lib.model.gemma import in_dtype
    from lib.model.sampler import chances, generate

    tokenizer, params = model.tokenizer, in_dtype(model.params, model.dtype)
    tokens, stops = encode_prompt(prompt, tokenizer), (tokenizer.end_of_turn_id, tokenizer.eos_id)
    [written] = generate(
        model.graph, params, [tokens], stops, config.max_new_tokens, config.batch_size, config.sampling
    )
    found = chances(model.graph, params, tokens, written.tokens) if written.tokens else []
    text = tokenizer.decode(written.tokens)
    steps = reasoning_steps(text)
    verdict = score_item(item, text, written.truncated).verdict if item else "not scored"
    asked = ItemResult(
        id=item.id if item else "asked", prompt=question, expected=item.expected_answer if item else "", category="",
        group="", completion=text, answer=extract_answer(text) or "(none)", verdict=verdict, steps=steps,
        checks=check_steps(item.task, item.state, steps) if item else [], num_tokens=len(written.tokens),
        logprob=written.logprob,
    )  # fmt: skip
    return Answer(label, asked, [
        Chosen(_piece(tokenizer, one.token), one.probability, [(_piece(tokenizer, t), p) for t, p in one.likeliest])
        for one in found
    ])  # fmt: skip


def _piece(tokenizer: object, token: int) -> str:
    return tokenizer.pieces([token])[0].replace("▁", " ").replace("\n", "↵")


def _side_by_side(answers: Sequence[Answer]) -> str:
    expected = answers[0].item.expected
    said = f"{answers[0].item.prompt} (expected: {expected})" if expected else answers[0].item.prompt
    cards = [completion(given.item, given.model) + shaded(given.tokens) for given in answers]
    return f"<p>{escape(visible(said))}</p>{side_by_side(cards)}"


def shaded(tokens: Sequence[Chosen]) -> str:
    """The tokens as they were written, the darker the less sure; below an unsure one its probability in per cent."""
    after = [*(token.text for token in tokens[1:]), ""]
    ends = ["<br>" if token.text == "↵" != follows else "" for token, follows in zip(tokens, after, strict=True)]
    body = "".join(_shaded(token) + end for token, end in zip(tokens, ends, strict=True))
    return f'<p style="font-family: monospace; line-height: 2">{body}</p>'


def _shaded(token: Chosen) -> str:
    light = round(0xF5 - 0x75 * (1 - token.probability))  # grey, as it must be read without colours too
    unsure = f"<sub>{100 * token.probability:.0f}</sub>" if token.probability < 0.5 else ""
    style = f"background-color: #{light:02x}{light:02x}{light:02x}; color: #000000; white-space: pre-wrap"
    return f'<span style="{style}">{escape(visible(token.text))}{unsure}</span>'


def _alternatives(given: Answer, at: int) -> str:
    if at >= len(given.tokens):
        return card(given.model, {"": "wrote nothing more"})
    token = given.tokens[at]
    ranked = {repr(text): f"{100 * share:.1f} %" for text, share in token.likeliest}
    wrote = f"{token.text!r} ({100 * token.probability:.1f} %)"
    return card(f"{given.model}, token {at + 1} of {len(given.tokens)}", {"wrote": wrote} | ranked)


# ---- a completion, step by step ----------------------------------------------------------------------------


def steps(run: Run | None) -> None:
    """Walk through an evaluated completion: each step, and what the engine says of it."""
    if run is None:
        return display(Markdown(NOTHING))
    file = next((path for name in ("after", "before") if (path := run.path(stages.OUTPUTS[name])).is_file()), None)
    if file is None:
        return display(Markdown("No model of this run was evaluated yet: run [4 · Evaluate](04_evaluate.ipynb)."))
    items = read_results(file).items
    item = widgets.Dropdown(description="item", options=[(f"{i.id}: {i.verdict}", at) for at, i in enumerate(items)])
    upto = widgets.IntSlider(description="steps", min=0, max=1)
    shown = widgets.HTML()

    def draw(_: object = None) -> None:
        upto.max = _count(items[item.value])
        shown.value = walked(items[item.value], upto.value)

    _draw_on_change(draw, item, upto)
    first = next((one for one in items if one.first_wrong), items[0])
    _live(widgets.VBox([widgets.HBox([item, upto]), shown]), walked(first, _count(first)))


def walked(item: ItemResult, upto: int) -> str:
    """A completion so far: its first steps with their checks, and after the last of them its answer."""
    whole = upto >= _count(item)
    facts = {"question": item.prompt, "steps": item.marked_steps[:upto]}
    if whole:
        facts |= {
            "answer": f"{item.answer} ({item.verdict}; expected {item.expected})",
            "first error": item.first_error,
        }
    return card(f"Item {item.id}, step {min(upto, _count(item))} of {_count(item)}", facts, lines=_count(item))


def _count(item: ItemResult) -> int:
    return max(len(item.steps), len(item.checks))


# ---- two forms in one output -------------------------------------------------------------------------------


def _live(widget: widgets.Widget, still: str) -> None:
    """The widget, and for who cannot move it the HTML."""
    display(widget._repr_mimebundle_() | {"text/html": still, "text/plain": "an interactive view"}, raw=True)


def _draw_on_change(draw: Callable[[object], None], *controls: widgets.Widget) -> None:
    for control in controls:
        control.observe(draw, "value")
    draw(None)
